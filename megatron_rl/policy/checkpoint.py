"""Training checkpoints through Megatron's dist_checkpointing: weights, optimizer, schedule and the loop's own state.

A checkpoint is written into a hidden folder and renamed when every rank has finished, so a killed save never becomes
the newest one. It loads under another TP, PP or DP.
"""

from __future__ import annotations

import queue
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_rl import device
from megatron_rl.errors import UserError
from megatron_rl.parallel.groups import CheckpointException, Groups, barrier
from megatron_rl.parallel.reduce import Reducer
from megatron_rl.policy.policy import MegatronPolicy

_NAME = re.compile(r"step_(\d{8})")
_HYPERPARAMETERS = ("max_lr", "min_lr", "betas", "eps")  # of an optimizer's group, besides those that the schedule sets


class CheckpointStore:
    """The checkpoints of one run, under `folder`. Every method but `newest` is collective."""

    def __init__(self, folder: Path, policy: MegatronPolicy, groups: Groups) -> None:
        """`folder` need not exist."""
        self.folder, self.policy, self.groups = folder, policy, groups
        if not device.ON_GPU:
            _let_torch_adam_load()

    def newest(self) -> Path | None:
        """The finished checkpoint with the most steps."""
        if not self.folder.is_dir():
            return None
        finished = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]
        return max(finished, key=lambda path: path.name, default=None)

    def save(self, step: int, extra: dict[str, Any]) -> Path:
        """Write the state after `step` steps; `extra` is plain data that `load_newest` gives back. Keeps only this
        checkpoint."""
        target = self.folder / f"step_{step:08d}"
        draft = self.folder / f".{target.name}"
        if self.groups.rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
        barrier(self.groups)
        state = self._state(is_loading=False) | {"step": step, "extra": extra}
        # Megatron's own queue lives in a manager process: seconds to start, and it outlives a rank that is killed, with
        # that rank's terminal held open. This save is synchronous: its results never leave the process.
        filesystem_async._results_queue = queue.SimpleQueue()
        dist_checkpointing.save(state, str(draft))
        barrier(self.groups)
        if self.groups.rank == 0:
            older = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]
            if target in older:  # the same step again, after a resume from it
                shutil.rmtree(target)
            draft.rename(target)
            for path in older:
                if path != target:
                    shutil.rmtree(path)
        barrier(self.groups)
        return target

    def load_newest(self) -> tuple[int, dict[str, Any]] | None:
        """Restore the newest checkpoint into the policy: (step, extra), or None without one.

        Raises: UserError naming a checkpoint that cannot be read.
        """
        path: Path | None = Reducer(self.groups.world, device.device()).gather_objects(self.newest())[0]
        if path is None:
            return None
        try:
            strategy = get_default_load_sharded_strategy(str(path))
            state = dist_checkpointing.load(self._state(is_loading=True), str(path), strategy)
        except (Exception, CheckpointException) as error:  # the latter is torch's and no Exception
            raise UserError(
                f"cannot load the checkpoint {path}: {_reasons(error)}\nIf it belongs to another model, use another "
                "run name or train.resume=never; if it is damaged, remove it"
            ) from error
        self.policy.model.gpt.load_state_dict(state["model"])
        self._load_optimizer(state)
        return int(state["step"]), state["extra"]

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """Moments and the number of updates. Hyper-parameters stay the config's, which may have changed since the save:
        Megatron would take them from the checkpoint, and the run would not be the one that its config.yaml tells."""
        optimizer, scheduler = self.policy.optimizer, self.policy.scheduler
        configured = [{name: group[name] for name in _HYPERPARAMETERS} for group in optimizer.param_groups]
        optimizer.load_state_dict(state["optimizer"])
        for group, values in zip(optimizer.param_groups, configured, strict=True):
            group.update(values)
        scheduler.step(increment=state["scheduler"]["num_steps"] - scheduler.num_steps)  # sets lr and weight_decay

    def _state(self, *, is_loading: bool) -> dict[str, Any]:
        metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "chained_optim_avoid_prefix": True,
            "singleton_local_shards": False,
            "dp_cp_group": self.groups.dp,
        }
        model = self.policy.model.gpt.sharded_state_dict(metadata=metadata)
        optimizer = self.policy.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
        return {"model": model, "optimizer": optimizer, "scheduler": self.policy.scheduler.state_dict()}


def _reasons(error: BaseException) -> str:
    """What went wrong, without the tracebacks of all ranks that torch puts into its message."""
    causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    return "; ".join(sorted({f"{type(cause).__name__}: {cause}" for cause in causes}))


def _let_torch_adam_load() -> None:
    """Without Transformer Engine the distributed optimizer runs torch's AdamW, and 0.16.1 cannot load its state: a
    fresh state has no `step`, restoring expects one, and then all parameters share one `step` tensor, which AdamW would
    count once per
    parameter."""
    if getattr(DistributedOptimizer, "_loads_torch_adam", False):
        return
    DistributedOptimizer._loads_torch_adam = True
    sharded_state_dict = DistributedOptimizer.sharded_state_dict
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states
    load_state_dict = DistributedOptimizer.load_state_dict

    def with_state(self: Any, model_state: Any, is_loading: bool = False, **options: Any) -> Any:
        if is_loading and not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()
        return sharded_state_dict(self, model_state, is_loading, **options)

    def with_step(self: Any, parameter: Any, tensors: dict[str, Any]) -> None:
        group, index = self.model_param_group_index_map[parameter]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][index]]
        kept = {"step": state["step"]} if "step" in state else {}
        with torch.no_grad():
            set_states(self, parameter, kept | tensors)

    def with_own_steps(self: Any, state_dict: Any) -> None:
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    DistributedOptimizer.sharded_state_dict = with_state
    DistributedOptimizer._set_main_param_and_optimizer_states = with_step
    DistributedOptimizer.load_state_dict = with_own_steps
