"""The distributed optimizer's part of a checkpoint: each data-parallel rank writes and reads what it holds.

Adam's state of a weight is stored whole under the weight's name, as Megatron's `fully_reshardable` format has it, so
that any other layout can read it. Megatron-Core 0.16.1 gathers the state of all ranks for that, on each rank or, with
`distrib_optim_fully_reshardable_mem_efficient`, on one of them: three float32 copies of a rank's model and more in the
host's memory. Its format without gathering, `dp_reshardable`, is bound to one TP and PP, and the one in model space
(`fully_sharded_model_space`) is refused by its own ShardedTensor. But a rank holds most of its weights whole; only
those on the border of two ranks are put together here, one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_rl.parallel.pieces import assemble

_STATES = ("param", "exp_avg", "exp_avg_sq")


def share_state(optimizer: MegatronOptimizer) -> None:
    """Let the distributed optimizers of the chain describe their state by `sharded_states`; the others keep to
    Megatron's way."""
    for chained in optimizer.chained_optimizers:
        if isinstance(chained, DistributedOptimizer):
            chained.sharded_param_state_fully_reshardable = partial(sharded_states, chained)


def sharded_states(
    optimizer: DistributedOptimizer, model: dict[str, Any], is_loading: bool, metadata: dict[str, Any]
) -> dict[int, dict[str, Any]]:
    """Return what this rank writes, or wants to read, of the states of each weight: by the weight's number, as
    Megatron's `load_parameter_state_from_fully_reshardable` counts. A collective when saving.

    What lies whole on this rank is the optimizer's own tensor. Of a weight on a border the one among its ranks that has
    the least to write gets the whole; all of them read it. `model`: the weights' own entries of the checkpoint.
    """
    entries, _ = extract_sharded_tensors_and_factories(model)
    entry_of = {entry.data: entry for entry in nested_values(entries)}
    group = optimizer.data_parallel_group
    rank, written = group.rank(), [0] * group.size()
    states: dict[int, dict[str, Any]] = {}
    for index, (parameter, ranges) in enumerate(_ranges(optimizer, group.size())):
        holders = [holder for holder, (start, end) in enumerate(ranges) if start < end]
        owner = min(holders, key=lambda holder: written[holder])
        written[owner] += parameter.numel()
        mine = optimizer._get_main_param_and_optimizer_states(parameter) if rank in holders else {}
        for name in _STATES:
            state: Tensor | None = mine[name].detach() if rank in holders else None
            if len(holders) > 1 and not is_loading:
                state = assemble(state, ranges, owner, group)
            elif len(holders) > 1 and state is not None:
                state = torch.empty(parameter.numel())
            if state is not None:
                entry = _entry(entry_of[parameter], name, state, is_main=rank == owner)
                states.setdefault(index, {})[name] = entry
    return states


def _ranges(optimizer: DistributedOptimizer, size: int) -> Iterator[tuple[Tensor, list[tuple[int, int]]]]:
    """Yield each weight, and from where to where each of the `size` ranks holds its state, (0, 0) for not at all.
    Every bucket of Megatron's buffers is cut into equal pieces, without regard to where a weight ends."""
    for buffer in optimizer.buffers:
        for parameter, (start, end, bucket_id) in buffer.param_index_map.items():
            bucket = buffer.buckets[bucket_id]
            piece = bucket.grad_data.numel() // size
            cuts = [bucket.offset + rank * piece for rank in range(size + 1)]
            spans = [(max(start, a) - start, min(end, b) - start) for a, b in zip(cuts, cuts[1:], strict=False)]
            yield parameter, [(a, b) if a < b else (0, 0) for a, b in spans]


def _entry(of_weight: Any, name: str, state: Tensor, *, is_main: bool) -> Any:
    """Return the checkpoint's entry for a state of a weight, next to the weight's own."""
    dtype = {} if isinstance(of_weight, ShardedTensorFactory) else {"dtype": state.dtype}
    return replace(
        of_weight,
        key=f"optimizer.state.{name}.{of_weight.key}",
        data=state.view(of_weight.data.shape),
        replica_id=(*of_weight.replica_id[:2], 0 if is_main else 1),
        **dtype,
    )
