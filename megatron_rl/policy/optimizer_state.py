"""The distributed optimizer's part of a checkpoint: each data-parallel rank writes and reads what it holds.

A weight's state is stored whole under the weight's name, Megatron's `fully_reshardable` format, which any layout reads.
Megatron-Core 0.16.1 gathers all ranks' state for it, on each rank or on one: over three float32 copies of a rank's
model in the host's memory. `dp_reshardable` gathers nothing, but is bound to one TP and PP, and its own ShardedTensor
refuses `fully_sharded_model_space`. Here only weights on the border of two ranks are put together, one at a time.
"""

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


def share_state(optimizer: MegatronOptimizer) -> None:
    """Let the distributed optimizers of the chain describe their state by `sharded_states`."""
    for chained in optimizer.chained_optimizers:
        if isinstance(chained, DistributedOptimizer):
            chained.sharded_param_state_fully_reshardable = partial(sharded_states, chained)


def sharded_states(
    optimizer: DistributedOptimizer, model: dict[str, Any], is_loading: bool, metadata: dict[str, Any]
) -> dict[int, dict[str, Any]]:
    """Return what this rank writes, or wants to read, of each weight's states, by the weight's number in Megatron's
    buffers. A collective when saving.

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
        for name in ("param", "exp_avg", "exp_avg_sq"):
            state: Tensor | None = mine[name].detach() if rank in holders else None
            if len(holders) > 1 and not is_loading:
                state = assemble(state, ranges, owner, group)
            elif len(holders) > 1 and state is not None:
                state = torch.empty(parameter.numel())
            if state is not None:
                entry = entry_of[parameter]
                states.setdefault(index, {})[name] = replace(
                    entry,
                    key=f"optimizer.state.{name}.{entry.key}",
                    data=state.view(entry.data.shape),
                    replica_id=(*entry.replica_id[:2], int(rank != owner)),
                    **({} if isinstance(entry, ShardedTensorFactory) else {"dtype": state.dtype}),
                )
    return states


def _ranges(optimizer: DistributedOptimizer, size: int) -> Iterator[tuple[Tensor, list[tuple[int, int]]]]:
    """Yield each weight, and from where to where each of the `size` ranks holds its state, (0, 0) for not at all:
    every bucket of Megatron's buffers is cut into equal pieces, wherever a weight ends."""
    for buffer in optimizer.buffers:
        for parameter, (start, end, bucket_id) in buffer.param_index_map.items():
            bucket = buffer.buckets[bucket_id]
            piece = bucket.grad_data.numel() // size
            begins = [bucket.offset + rank * piece for rank in range(size)]
            spans = [(max(start, begin) - start, min(end, begin + piece) - start) for begin in begins]
            yield parameter, [span if span[0] < span[1] else (0, 0) for span in spans]
