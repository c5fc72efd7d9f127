"""Facts of a model that its config.json tells, read as plain data: nothing here needs torch or transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from megatron_rl.errors import ConfigError

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")


class ModelSource(Protocol):
    """Where the config's section `model` says that the policy comes from."""

    @property
    def path(self) -> str | None:
        """Return the folder with config.json and weights, if there is one."""
        ...

    @property
    def hf_config(self) -> dict[str, Any] | None:
        """Return the contents of a config.json as the YAML states them, if it does."""
        ...


def hf_folder(path: str | Path) -> Path:
    """Where a model's config.json and tokenizer are: the folder itself, or `hf/` inside a Megatron checkpoint."""
    folder = Path(path)
    return folder / "hf" if (folder / "metadata.json").is_file() else folder


def read_config_json(folder: Path) -> dict[str, Any]:
    """A model's config.json. Raises: ConfigError when it cannot be read."""
    path = hf_folder(folder) / "config.json"
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(
            f"model.path: cannot read {path} ({error}); give a folder with a Hugging Face config.json and safetensors, "
            "or a Megatron checkpoint with its sub-folder hf"
        ) from error


def read_hf_config(model: ModelSource) -> dict[str, Any]:
    """The policy's Hugging Face config as a dict: that of model.path; model.hf_config without a path, or where the
    path is not on this machine (then `require_model` refuses to train).

    Raises: ConfigError when model.path has no readable config.json, or one that disagrees with model.hf_config.
    """
    path, stated = model.path, model.hf_config
    if path is None:
        return dict(stated or {})
    if stated is not None and not Path(path).exists():
        return dict(stated)
    found = read_config_json(Path(path))
    if stated is not None:
        shared = [key for key in stated if key in found]  # a config.json leaves out what is the default
        differ = [f"{key}: {stated[key]!r}, there {found[key]!r}" for key in shared if stated[key] != found[key]]
        if differ:
            raise ConfigError(
                f"model.hf_config states another architecture than {hf_folder(path) / 'config.json'} ("
                + "; ".join(differ)
                + "); correct model.path, or model.hf_config"
            )
    return found


def require_model(model: ModelSource) -> None:
    """Raises: ConfigError when the weights that the config names are not on this machine."""
    path = model.path
    if path is not None and not Path(path).exists():
        raise ConfigError(
            f"model.path={path}: no such folder here; download the model into it, name another, or set the environment "
            "variable MEGATRON_RL_MODELS where the config uses it"
        )


def head_width(hf: dict[str, Any]) -> int:
    """Width of one attention head, from the contents of a config.json."""
    return hf.get("head_dim") or (
        128 if hf.get("model_type") == "qwen3" else hf["hidden_size"] // hf["num_attention_heads"]
    )


def is_moe(hf: dict[str, Any]) -> bool:
    """Whether the contents of a config.json describe a mixture of experts."""
    return hf.get("model_type") == "qwen3_moe"


def has_dense_layers(hf: dict[str, Any]) -> bool:
    """Whether a layer has one MLP for all tokens, from the contents of a config.json."""
    return not is_moe(hf) or bool(hf.get("mlp_only_layers")) or hf.get("decoder_sparse_step", 1) != 1


def num_experts(hf: dict[str, Any]) -> int | None:
    """Experts of one layer; transformers 5 writes another key than the checkpoints on the hub have."""
    return hf.get("num_experts") or hf.get("num_local_experts")
