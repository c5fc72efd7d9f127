"""The verdict of a rehearsal, kept beside the config that it is about."""

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_rl.config import Config
from megatron_rl.models.facts import read_hf_config


def kept_path(config: Path) -> Path:
    """Return where the verdict on a config file is kept."""
    return config.with_name(f"{config.stem}.rehearsal.json")


def carry_verdict(file: Path, copy: Path) -> None:
    """Keep the verdict on a config's `file`, if there is one, beside a copy of it as well."""
    if kept_path(file).is_file():
        kept_path(copy).write_bytes(kept_path(file).read_bytes())


def memory_hash(config: Config) -> str:
    """Return a hash of the options that a rehearsal depends on, and of a few others."""
    raw = config.model_dump(mode="json")
    parts = {name: raw[name] for name in ("parallel", "rollout", "loss", "optimizer", "warm_start")}
    parts |= {"model": raw["model"] | {"path": None, "hf_config": read_hf_config(config.model)}}
    parts |= {name: value for name, value in raw["train"].items() if "tokens" in name or "prompts" in name}
    parts |= {"longest prompt": raw["data"]["max_prompt_tokens"]}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def kept_verdict(config: Config, file: Path) -> dict[str, Any] | str:
    """Return the verdict that is kept beside a config's `file`, or why there is none on this config."""
    path = kept_path(file)
    if not path.is_file():
        return "none: megatron-rl rehearse tells without a GPU what fits"
    kept: dict[str, Any] = json.loads(path.read_text())
    return kept if kept["hash"] == memory_hash(config) else f"{path} is about another config: rehearse it again"
