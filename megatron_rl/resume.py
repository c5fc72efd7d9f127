"""Decide whether, and from where, a run goes on, and what may differ from the run that wrote the checkpoint."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import PretrainedConfig

from megatron_rl.config import Config
from megatron_rl.errors import UserError
from megatron_rl.metrics.entropy_law import LawMonitor
from megatron_rl.models.architecture import resolve_hf_config
from megatron_rl.policy.checkpoint import CheckpointStore
from megatron_rl.run import Run
from megatron_rl.types import Prompt

# Options by what a change of them does to a run that goes on; a key stands for all below it. All others are warned of:
# from there on the run is another experiment, which the config in force describes.
_HARMLESS = (
    "name logging parallel rollout.batch_size rollout.server.kv_tokens rollout.server.memory_fraction "
    "rollout.weight_sync.checksums optimizer.lr optimizer.cpu_offload model.hf_config model.logits_block_rows "
    "model.fused_linear_stats model.recompute model.recompute_method model.recompute_layers model.recompute_modules "
    "model.layers train.num_steps train.micro_batch_tokens train.share_prompts train.deterministic "
    "train.max_nonfinite_updates train.entropy_probe train.entropy_tangent train.entropy_tangent_every "
    "train.eval_every train.save_every train.save_final train.keep_checkpoints train.keep_best train.async_save "
    "train.save_hf train.resume train.grace_seconds warm_start.cache_dir reward.workers eval"
).split()
_DATA = ("data", "seed")
_DATA_PATHS = ("data.train_path", "data.eval_path", "data.tokenizer")  # what counts is what they hold: `data_digest`
_INITIAL_POLICY = ("model.path", "warm_start")
# of config.json: what is no part of the architecture
_NOT_ARCHITECTURE = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}


class Checkpoints:
    """What a run saves, when, and from where it goes on. Every method is a collective."""

    def __init__(self, run: Run) -> None:
        """The checkpoints of `run`'s own folder."""
        self._run = run
        self._store = CheckpointStore(run.config.run_dir / "checkpoints", run.policy, run.groups, run.tokenizer)
        self._data_digest, self._eval_digest = data_digest(run.train_prompts), data_digest(run.eval_prompts)

    def restore(self) -> tuple[int, list[str]]:
        """Continue from the checkpoint that train.resume asks for; returns the first step, and what the user should
        know.

        The reference policy is not restored: `set_up` built it, from the same initial weights as ever.
        Raises: UserError when the run in the folder, or the checkpoint's config, is not one to go on from.
        """
        run, config = self._run, self._run.config
        path = checkpoint_to_resume(config, run.world.gather_objects(self._store.newest())[0])
        if path is None:
            return 0, []
        own = path.parent == self._store.folder
        notes = check_drift(path, config, run.policy.hf_config, own=own)
        step, state = self._store.load(path)
        if has_same_data(path, state, self._data_digest, self._eval_digest, seed=config.seed, own=own):
            run.collector.cursor.restore(state["cursor"])
        else:
            notes.append(f"other problems or another seed than {path}: they are drawn from the start")
        if own:
            run.best_accuracy = state["best_accuracy"]
            run.law = LawMonitor(**state["law"])
        run.controller.state = state["control"]
        run.served.weight_version = state["weight_version"]
        return step, [*notes, f"continuing from {path}, {step} steps"]

    def save_when_due(self, step: int, accuracy: float | None, *, stopping: bool) -> None:
        """Save after this step when it is due: every save_every steps, when stopping, at the end, and with keep_best
        when this step's evaluation has a higher `accuracy` than all before it."""
        run, train = self._run, self._run.config.train
        self._store.finish(wait=False)
        is_best = accuracy is not None and accuracy > run.best_accuracy
        if accuracy is not None and is_best:
            run.best_accuracy = accuracy
        due = train.save_every and (step + 1) % train.save_every == 0
        last = step + 1 == train.num_steps
        if due or stopping or (last and train.save_final) or (is_best and train.keep_best):
            state = self._state(run.collector.cursor_state())
            self._store.save(step + 1, state, is_best=is_best and train.keep_best)

    def rescue(self, step: int) -> int:
        """Save what the steps before this one reached, in which the engine failed for good; returns the number of steps
        that the new checkpoint holds, 0 when theirs is there already.

        Engines fail before a step's first update, or in the evaluation after its last, so that the weights are whole.
        """
        run = self._run
        steps = run.served.weight_version
        newest = run.world.gather_objects(self._store.newest())[0]
        if steps == 0 or newest == self._store.path(steps):
            return 0
        cursor = run.collector.resume_point if steps == step else run.collector.cursor_state()
        self._store.save(steps, self._state(cursor), is_best=False)
        self._store.finish()
        return steps

    def finish(self) -> None:
        """Wait until what was saved is whole on the disk."""
        self._store.finish()

    def _state(self, cursor: dict[str, int]) -> dict[str, Any]:
        """Return what a checkpoint keeps besides the policy."""
        run = self._run
        return {
            "cursor": cursor,
            "weight_version": run.served.weight_version,
            "best_accuracy": run.best_accuracy,
            "data_digest": self._data_digest,
            "eval_digest": self._eval_digest,
            "control": run.controller.state,
            "law": run.law.state(),
        }


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
