"""The process group of the trainer's source rank and the engine servers' workers, in which weights are broadcast."""

import datetime

import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroup
from torch.distributed.distributed_c10d import Backend, GroupName, _new_process_group_helper, _world

from megatron_rl.types import Shaped


def join_engine_group(
    host: str, port: int, *, world_size: int, name: str, backend: str, seconds: float
) -> ProcessGroup:
    """Join as rank 0, and serve the store at host:port; returns when all `world_size - 1` workers have joined.

    It stands beside torch's default group, which the workers are no part of; the steps are those of the workers' side,
    because both must derive the same store keys. Raises: RuntimeError (torch's) after `seconds`.
    Source: `init_custom_process_group` of sglang.srt.utils.
    """
    timeout = datetime.timedelta(seconds=seconds)
    # made here and not by torch's rendezvous, which under torchrun would look for torchrun's own store
    store = dist.TCPStore(host, port, world_size, is_master=True, timeout=timeout, wait_for_workers=False)
    group: ProcessGroup
    group, _ = _new_process_group_helper(
        world_size, 0, [], Backend(backend), PrefixStore(name, store), group_name=GroupName(name), timeout=timeout
    )
    _world.pg_group_ranks[group] = {i: i for i in range(world_size)}
    return group


def broadcast_bucket(flat: Shaped[Tensor, "_"], group: ProcessGroup) -> None:
    """Send one flat bucket of bytes to every worker; returns when it has left."""
    dist.broadcast(flat, src=0, group=group)


def leave_engine_group(group: ProcessGroup) -> None:
    """Free the group on this side."""
    dist.destroy_process_group(group)
