"""Decide whether, and from where, a run goes on, and what may differ from the run that wrote the checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import PretrainedConfig

from megatron_rl.config import Config
from megatron_rl.errors import UserError
from megatron_rl.models.architecture import resolve_hf_config
from megatron_rl.types import Prompt

# Options by what a change of them does to a run that goes on; a key stands for all below it. All others are warned of:
# from there on the run is another experiment, which the config in force describes.
_HARMLESS = (
    "name logging parallel rollout.batch_size optimizer.lr optimizer.cpu_offload model.hf_config "
    "model.logits_block_rows model.fused_linear_stats model.recompute model.recompute_method model.recompute_layers "
    "model.recompute_modules train.num_steps train.micro_batch_tokens train.share_prompts "
    "train.max_nonfinite_updates train.entropy_probe train.entropy_tangent train.eval_every train.save_every "
    "train.save_final train.keep_checkpoints train.keep_best train.async_save train.save_hf train.resume "
    "train.grace_seconds warm_start.cache_dir reward.workers eval"
).split()
_DATA = ("data", "seed")
_DATA_PATHS = ("data.train_path", "data.eval_path", "data.tokenizer")  # what counts is what they hold: `data_digest`
_INITIAL_POLICY = ("model.path", "warm_start")
# of config.json: what is no part of the architecture
_NOT_ARCHITECTURE = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}


def checkpoint_to_resume(config: Config, newest: Path | None) -> Path | None:
    """Return the checkpoint from which to go on; None: a new run. `newest`: of this run's own.

    A run that began from another's checkpoint (train.resume=PATH) goes on from its own once it has one, so that the
    same command continues it.
    Raises: UserError when an earlier run is in the way.
    """
    resume, run_dir = config.train.resume, config.run_dir
    if resume == "never":
        metrics = run_dir / "metrics.jsonl"
        if newest is not None or (metrics.is_file() and metrics.stat().st_size):
            raise UserError(
                f"{run_dir} holds an earlier run and train.resume=never would overwrite it; choose another name, "
                "remove the folder, or continue it with train.resume=auto"
            )
        return None
    if resume == "auto" or newest is None:
        return newest if resume == "auto" else Path(resume)
    path, own = Path(resume).resolve(), newest.resolve()
    if path == own:
        return newest
    if path.parent == own.parent:
        raise UserError(
            f"train.resume={resume} would go back behind {newest} of the same run; choose another name to branch off "
            f"from it, or remove the later checkpoints and set train.resume=auto"
        )
    began = str(_saved_config(newest).get("train", {}).get("resume"))
    if began in ("auto", "never") or Path(began).resolve() != path:
        raise UserError(
            f"{run_dir} holds a run that did not begin from train.resume={resume} (its checkpoint {newest.name} says "
            f"{began}); choose another name, or continue it with train.resume=auto"
        )
    return newest


def check_drift(path: Path, config: Config, hf_config: PretrainedConfig, *, own: bool) -> list[str]:
    """Return what the user should know of changes between the config that wrote the checkpoint `path` and this one.

    `hf_config`: the policy's. `own`: of this run, which must then be the same experiment; a new
    run that starts from another's checkpoint may bring other data.
    Raises: UserError naming changes under which going on would be wrong.
    """
    saved_config = _flat(_saved_config(path))
    given = _flat(config.model_dump(mode="json"))
    changed = {
        key: f"{key}: {saved_config.get(key)!r} -> {given.get(key)!r}"
        for key in sorted(saved_config.keys() | given.keys())
        if saved_config.get(key) != given.get(key) and not _is_under(key, _HARMLESS)
    }
    refused = _architecture_changes(path, hf_config)
    refused += [text for key, text in changed.items() if key == "model.dtype"]
    if own:
        refused += [text for key, text in changed.items() if _is_under(key, _DATA) and key not in _DATA_PATHS]
        if config.loss.ref_kl_coef > 0:
            refused += [f"{text} (the reference)" for key, text in changed.items() if _is_under(key, _INITIAL_POLICY)]
    if refused:
        raise UserError(
            f"cannot go on from {path}, whose run had other options:\n"
            + "\n".join(f"  - {text}" for text in refused)
            + "\nRestore them; or choose another name, with train.resume=never to start afresh"
            + (f", or with train.resume={path} to take over all but the data order" if own else "")
        )
    notes = [f"changed since {path.name}: {text}" for text in changed.values()]
    if config.optimizer.schedule != "constant" and saved_config.get("train.num_steps") != config.train.num_steps:
        notes.append(
            f"changed since {path.name}: optimizer.schedule now ends at train.num_steps={config.train.num_steps}"
        )
    return notes


def data_digest(prompts: Sequence[Prompt]) -> str:
    """Return a fingerprint of problems as the policy sees them, in order: rows, tokens and answers."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(repr((prompt.prompt_id, prompt.token_ids, prompt.answer)).encode())
    return digest.hexdigest()[:16]


def has_same_data(path: Path, state: dict[str, Any], digest: str, eval_digest: str, *, seed: int, own: bool) -> bool:
    """Return whether the checkpoint's cursor fits the training problems, of fingerprint `digest`, and the seed.

    `state`: what the loop saved in `path`, a checkpoint of this run if `own`, whose held-out problems must then be the
    same too (`eval_digest`). Raises: UserError when a run's own problems are others, wherever they lie.
    """
    is_same = state["data_digest"] == digest and state["cursor"]["seed"] == seed
    if own and not is_same:
        what, why = "training problems", "the order of its data would be another"
    elif own and state.get("eval_digest", eval_digest) != eval_digest:
        what, why = "held-out problems", "accuracies before and after would not compare"
    else:
        return is_same
    raise UserError(
        f"cannot go on from {path}: the {what} are not those of its run, though only paths of the options differ, and "
        f"{why}; restore them, or choose another name with train.resume={path}"
    )


def _architecture_changes(path: Path, hf_config: PretrainedConfig) -> list[str]:
    raw = json.loads(_read(path, path / "hf" / "config.json"))  # without what is the default
    saved, given = resolve_hf_config(raw).to_dict(), hf_config.to_dict()
    keys = sorted((saved.keys() | given.keys()) - _NOT_ARCHITECTURE)
    return [f"the model's {k}: {saved.get(k)!r} -> {given.get(k)!r}" for k in keys if saved.get(k) != given.get(k)]


def _saved_config(path: Path) -> dict[str, Any]:
    # not load_config: what it refers to, the other run's data for instance, may be gone
    return yaml.safe_load(_read(path, path / "config.yaml"))


def _read(checkpoint: Path, file: Path) -> str:
    try:
        return file.read_text()
    except OSError as error:
        raise UserError(
            f"cannot load the checkpoint {checkpoint}: {error}\nIt is damaged, or not of this program; remove it"
        ) from error


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return leaves


def _is_under(key: str, prefixes: Iterable[str]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)
