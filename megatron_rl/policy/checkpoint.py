"""Training checkpoints through Megatron's dist_checkpointing: weights, optimizer, schedule and the loop's own state.

A checkpoint is a folder step_NNNNNNNN with Megatron's files (torch_dist), the resolved config.yaml, and hf/:
config.json, tokenizer and generation config, which an export needs beside the weights. It is written into a hidden
folder and renamed when every rank has finished, so a killed save never becomes the newest one. It loads under another
TP, PP or DP. The link `best` names the one with the best evaluation.
"""

import gc
import os
import pickle
import queue
import random
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import yaml
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, is_main_replica
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.tensor_parallel.random import get_all_rng_states
from torch.distributed.checkpoint.api import CheckpointException

from megatron_rl import device, launch
from megatron_rl.config import dump_config
from megatron_rl.convert.disk import clear, fsync_tree, remove, say_once, unused
from megatron_rl.convert.model_files import policy_files, write_files
from megatron_rl.errors import UserError
from megatron_rl.files import free_bytes
from megatron_rl.parallel.groups import Groups
from megatron_rl.policy.adam import (
    begin_torch_adam,
    let_torch_adam_load,
    refresh_host_weights,
    restore_step_0,
)
from megatron_rl.policy.optimizer_state import share_state
from megatron_rl.policy.policy import MegatronPolicy

_NAME = re.compile(r"step_\d{8}")
_OVERHEAD_BYTES, _OVERHEAD_BYTES_PER_TENSOR = 2**20, 2**12  # metadata, archive headers, rounding to blocks


@dataclass(frozen=True, slots=True)
class _Save:
    """One checkpoint on its way to the disk."""

    target: Path
    draft: Path  # where it is written
    needed: int  # bytes
    is_best: bool


class CheckpointStore:
    """The checkpoints of one run, under `folder`. Every method but `newest` is collective."""

    def __init__(self, folder: Path, policy: MegatronPolicy, groups: Groups, tokenizer: Any = None) -> None:
        """`folder` need not exist; all nodes must see it, and room is looked up from rank 0's. `tokenizer` travels in
        hf/; None: hf/ holds the model's part alone. What hf/ carries over is read now: its source may go away later."""
        self.folder, self.policy, self.groups = folder, policy, groups
        self._beside_weights = policy_files(policy, tokenizer) if groups.rank == 0 else {}
        self._world = groups.all_ranks
        one_file = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
        # ranks that share weights deal them out among themselves, once: a run's checkpoints are all alike
        self._writer = FullyParallelSaveStrategyWrapper(one_file, groups.dp_cp, do_cache_distribution=True)
        self._background = AsyncCallsQueue()
        self._unfinished: _Save | None = None
        let_torch_adam_load()

    def newest(self) -> Path | None:
        """The finished checkpoint with the most steps."""
        return max(self._finished(), default=None)

    def path(self, step: int) -> Path:
        """Return where the checkpoint after `step` steps is, or would be."""
        return self.folder / f"step_{step:08d}"

    def save(self, step: int, extra: dict[str, Any], *, is_best: bool = False) -> Path:
        """Write the state after `step` steps; `extra` is plain data that `load` gives back.

        It is the newest checkpoint on return, or with train.async_save once a later `finish` sees it complete. Then
        those beyond the train.keep_checkpoints newest and the one of the last `is_best` are removed.
        Raises: UserError, on every rank, when there is no room for it or it cannot be written; the others then stay.
        """
        self.finish()
        with self.policy.without_gradients():
            return self._save(step, extra, is_best)

    def _save(self, step: int, extra: dict[str, Any], is_best: bool) -> Path:
        state = self._state(is_loading=False) | {"step": step, "extra": extra}
        target = self.path(step)
        save = _Save(target, target.with_name(f".{target.name}"), self._bytes_of(state), is_best)
        self._unfinished = save = replace(save, draft=self._on_rank_0(lambda: self._prepare(save), save))
        try:
            request = self._request(state, save.draft)
            if self.policy.config.train.async_save:
                self._background.schedule_async_request(request)
                return save.target
            request.execute_sync()
        except CheckpointException as error:  # torch's, and no Exception
            self._fail(error)
        self._publish()
        return save.target

    def copies(self) -> list[torch.Tensor]:
        """Return the tensors that this rank would write, in the host's memory. A collective."""
        shards, _ = save_preprocess(self._state(is_loading=False), False)
        self._writer.apply_saving_parallelization(shards)
        mine = [shard.data for shard in nested_values(shards) if is_main_replica(shard.replica_id)]
        return [data.to("cpu") for data in mine if isinstance(data, torch.Tensor)]

    def finish(self, *, wait: bool = True) -> None:
        """Make a checkpoint that was written in the background the newest one; without `wait`, if it is complete.

        Raises: UserError, on every rank, when it could not be written.
        """
        if self._unfinished is None:
            return
        try:
            is_done = self._background.maybe_finalize_async_calls(blocking=wait)
        except CheckpointException as error:
            self._fail(error)
        if is_done:
            self._publish()

    def load(self, path: Path) -> tuple[int, dict[str, Any]]:
        """Restore the checkpoint `path`, of this run or another one, into the policy: (step, extra).

        The states of random generators come back where the layout is the one that saved them.
        Raises: UserError naming a checkpoint that cannot be read.
        """
        try:
            written_by = yaml.safe_load((path / "config.yaml").read_text())
            strategy = FullyParallelLoadStrategyWrapper(get_default_load_sharded_strategy(str(path)), self.groups.dp_cp)
            wanted = self._state(is_loading=True)
            saved, layout = dist_checkpointing.load_common_state_dict(str(path))["layout"], wanted["layout"]
            if (saved["ep"] > 1) != (layout["ep"] > 1):
                raise ValueError(
                    f"saved with parallel.ep={saved['ep']}, and here it is {layout['ep']}: Megatron keeps an optimizer "
                    "of their own for experts under ep > 1, which no other layout can take over"
                )
            if saved != layout:
                del wanted["random"]
            with warnings.catch_warnings():  # Megatron calls functions that torch deprecates; no user can mend it
                warnings.simplefilter("ignore", FutureWarning)
                state = dist_checkpointing.load(wanted, str(path), strategy)
        except (Exception, CheckpointException) as error:
            raise UserError(
                f"cannot load the checkpoint {path}: {_reasons(error)}\nIf it belongs to another model, use another "
                "run name or train.resume=never; if it is damaged, remove it"
            ) from error
        self.policy.model.load_state_dict(state["model"])
        self._load_optimizer(state)
        self._place_schedule(state["scheduler"], written_by)
        self.policy.skipped_in_a_row = state["skipped_in_a_row"]
        if "random" in state:
            _set_random_states(state["random"])
        return int(state["step"]), state["extra"]

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """Restore the moments and their number of updates. All else of a group stays this run's, whose config and whose
        Adam (of a CPU or a GPU) may have changed since the save: Megatron would take it from the checkpoint."""
        optimizer = self.policy.optimizer
        own = [{k: v for k, v in group.items() if k not in ("params", "step")} for group in optimizer.param_groups]
        restore_step_0(state["optimizer"])
        optimizer.load_state_dict(state["optimizer"])
        refresh_host_weights(optimizer)
        for group, values in zip(optimizer.param_groups, own, strict=True):
            group.update(values)
            if "step" in group:
                group["step"] = int(group["step"])  # torch's Adam saves a float, which no kernel of the other takes

    def _place_schedule(self, saved: dict[str, Any], written_by: dict[str, Any]) -> None:
        """Put the schedule where the run is, counted in steps: with mini-batches of another size that is another number
        of updates. A warm-up that the config still asks for keeps its length in steps too."""
        config, scheduler = self.policy.config, self.policy.scheduler
        train = written_by["train"]
        scale = config.minibatches_per_step / (train["prompts_per_step"] // train["prompts_per_minibatch"])
        if written_by["optimizer"]["warmup_steps"] == config.optimizer.warmup_steps:
            scheduler.lr_warmup_steps = saved["lr_warmup_steps"] * scale
        place = round(saved["num_steps"] * scale)
        scheduler.step(increment=place - scheduler.num_steps)  # sets lr and weight_decay

    def _state(self, *, is_loading: bool) -> dict[str, Any]:
        metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "chained_optim_avoid_prefix": True,
            "singleton_local_shards": False,
            "dp_cp_group": self.groups.dp_cp,
        }
        begin_torch_adam(self.policy.optimizer)
        share_state(self.policy.optimizer)
        model = self.policy.model.sharded_state_dict(metadata)
        gc.freeze()  # Megatron collects garbage in the next line: a second of walking through all that was imported
        optimizer = self.policy.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
        gc.unfreeze()
        rank, size, parallel = self.groups.rank, self.groups.world_size, self.policy.config.parallel
        return {
            "model": model,
            "optimizer": optimizer,
            "scheduler": self.policy.scheduler.state_dict(),
            "skipped_in_a_row": self.policy.skipped_in_a_row,
            "layout": {**parallel.model_dump(exclude={"sp", "distributed_optimizer"}), "world_size": size},
            "random": ShardedObject("random", _random_states(), (size,), (rank,)),
        }

    def _bytes_of(self, state: dict[str, Any]) -> int:
        """Return the bytes that all ranks together will write, a little overestimated."""
        shards = [v for v in nested_values(state) if isinstance(v, ShardedBase) and is_main_replica(v.replica_id)]
        tensors = [shard.data for shard in shards if isinstance(shard.data, torch.Tensor)]
        mine = sum(tensor.numel() * tensor.itemsize + _OVERHEAD_BYTES_PER_TENSOR for tensor in tensors)
        return int(self._world.sum(torch.tensor([mine], device=device.device()))) + _OVERHEAD_BYTES

    def _request(self, state: dict[str, Any], draft: Path) -> AsyncRequest:
        """Megatron's plan of the writing, with a writer and a way back for its results that leave no process behind."""
        filesystem_async._results_queue = _Results()
        request = dist_checkpointing.save(state, str(draft), self._writer, async_sharded_save=True)
        assert request is not None
        if request.async_fn is None:  # this rank has nothing to write
            return request
        (transforms, _) = request.async_fn.args
        parent = os.getpid() if self.policy.config.train.async_save else None
        return request._replace(async_fn=partial(_write_files, transforms, parent))

    def _prepare(self, save: _Save) -> Path:
        """Return an empty draft: of another name when what was left of an earlier one cannot be removed."""
        for leftover in self.folder.glob(".step_*"):  # of killed saves and killed removals
            remove(leftover)
        draft = unused(save.draft)
        draft.mkdir(parents=True)
        if free_bytes(draft) < save.needed:
            draft.rmdir()
            raise UserError(self._story(save, "there is no room for it"))
        return draft

    def _publish(self) -> None:
        """The draft of a written save becomes a checkpoint, and those that are no longer kept go."""
        save, self._unfinished = self._unfinished, None
        assert save is not None
        self._on_rank_0(lambda: self._rename(save), save)

    def _rename(self, save: _Save) -> None:
        (save.draft / "config.yaml").write_text(dump_config(self.policy.config))
        write_files(save.draft / "hf", self._beside_weights)
        fsync_tree(save.draft)
        best = self.folder / "best"
        if save.is_best:  # before the renaming: a process killed between the two comes by here again
            link = self.folder / ".best"
            link.unlink(missing_ok=True)
            link.symlink_to(save.target.name)
            link.replace(best)
        clear(save.target)  # the same step again
        save.draft.rename(save.target)
        fsync_tree(self.folder, recursive=False)
        kept = sorted(self._finished())[-self.policy.config.train.keep_checkpoints :]
        for path in self._finished():
            if path not in kept and not (best.is_symlink() and best.readlink().name == path.name):
                try:
                    clear(path)
                except OSError as error:
                    say_once(f"cannot remove {path} ({error}); the run goes on")

    def _finished(self) -> list[Path]:
        return [path for path in self.folder.glob("step_*") if _NAME.fullmatch(path.name)]

    def _on_rank_0(self, work: Callable[[], Any], save: _Save) -> Any:
        """Return on all ranks what one does for all, and fail on all if it fails. Raises: UserError."""
        problem, result = None, None
        if self.groups.rank == 0:
            try:
                result = work()
            except UserError as error:
                problem = str(error)
            except OSError as error:
                problem = self._story(save, f"{type(error).__name__}: {error}")
                remove(save.draft)
        problem, result = self._world.gather_objects((problem, result))[0]
        if problem is not None:
            self._unfinished = None
            raise UserError(problem)
        return result

    def _fail(self, error: CheckpointException) -> NoReturn:
        """Megatron raises it on all ranks, and tells rank 0 alone why."""
        save, self._unfinished = self._unfinished, None
        assert save is not None

        def explain() -> None:
            story = self._story(save, _reasons(error))
            remove(save.draft)
            raise UserError(story)

        self._on_rank_0(explain, save)
        raise AssertionError("unreachable")

    def _story(self, save: _Save, reason: str) -> str:
        newest, train = self.newest(), self.policy.config.train
        return (
            f"cannot save the checkpoint {save.target}: {reason}\nIt needs {save.needed:,} bytes, and "
            f"{free_bytes(self.folder):,} are free there. "
            + (f"The last good checkpoint is {newest}" if newest else "There is no earlier checkpoint")
            + f"; make room, lower train.keep_checkpoints={train.keep_checkpoints} or move logging.run_dir: the same "
            "command continues"
        )


class _Results:
    """How Megatron's writer, which may run in a forked process, tells this one what it wrote.

    Megatron's own queue lives in a manager process: seconds to start, and it outlives a rank that is killed, with that
    rank's terminal held open. This is a file in memory: no process, no pipe to fill, and a full disk does not touch it.
    """

    def __init__(self) -> None:
        self._file = os.fdopen(os.memfd_create("checkpoint_results"), "w+b")

    def put(self, results: Any) -> None:
        pickle.dump(results, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        """Raises: queue.Empty when the writer died."""
        self._file.seek(0)
        written = self._file.read()
        if not written:
            raise queue.Empty
        return pickle.loads(written)


def _write_files(transforms: list[Any], parent: int | None, rank: int, buckets: list[Any], results: _Results) -> None:
    """Megatron's writing of a rank's files, in this process: forked by the rank `parent`, or the rank itself (None).

    Megatron's own function forks a process for each file. Those would go on writing into the draft after their rank was
    killed, while the next run writes there.
    """
    if parent is not None:
        launch.die_with_parent(parent)
    written: dict[int, Any] = {}
    for index, bucket in enumerate(buckets):
        answers: queue.Queue[Any] = queue.Queue()
        in_work: queue.Queue[int] = queue.Queue()
        in_work.put(index)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, answers, in_work, True)
        _, answer = answers.get()
        if isinstance(answer, Exception):
            results.put(answer)
            return
        written[index] = answer
    results.put(written)


def _random_states() -> dict[str, Any]:
    """Return the state of every generator that a step could draw from: Megatron's and torch's (dropout), and those of
    Python and NumPy, which a reward function may use. The trainer's own randomness is a hash, which has no state."""
    tracked = {name: state.clone() for name, state in get_all_rng_states().items()}
    states = {"megatron": tracked, "python": random.getstate(), "numpy": np.random.get_state()}
    return states | {"torch": torch.get_rng_state(), "device": _device_generator().get_rng_state()}


def _set_random_states(states: dict[str, Any]) -> None:
    get_all_rng_states().update(states["megatron"])
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    _device_generator().set_rng_state(states["device"])
    torch.set_rng_state(states["torch"])


def _device_generator() -> Any:
    return torch.get_device_module(device.device()) if device.ON_GPU and not device.REHEARSES else torch


def _reasons(error: BaseException) -> str:
    """Return what went wrong, without the tracebacks of all ranks that torch puts into its message."""
    causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    return "; ".join(sorted({f"{type(cause).__name__}: {cause}" for cause in causes}))
