"""The world of ranks, the groups on which they wait for each other, and how fast the world reduces."""

import datetime
import os
import time

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_rl import device
from megatron_rl.parallel.reduce import Reducer

_WARM_UP = 2


def join_world(seconds: float, waiting_seconds: float) -> Reducer:
    """Join the world that torchrun's environment describes, unless this process is in one; return all its ranks.

    Collectives of numbers give up after `seconds`, those for which ranks wait after `waiting_seconds`
    (rollout/clocks.py). On a CPU both are one group's.
    """
    device.set_local_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        longest = max(seconds, waiting_seconds) if device.BACKEND == dist.Backend.GLOO else seconds
        dist.init_process_group(device.BACKEND, timeout=datetime.timedelta(seconds=longest))
    world = dist.group.WORLD
    assert world is not None
    return Reducer(world, device.device(), host_group(world, None, waiting_seconds))


def host_group(group: ProcessGroup, world: Reducer | None, seconds: float) -> ProcessGroup:
    """Return a gloo group of the ranks of `group`, which is the group itself where that is gloo's. A collective over
    `world`; None: `group` holds all ranks."""
    if dist.get_backend(group) == dist.Backend.GLOO:
        return group
    ranks = dist.get_process_group_ranks(group)
    every = [ranks] if world is None else [list(row) for row in sorted(set(map(tuple, world.gather_objects(ranks))))]
    limit = datetime.timedelta(seconds=seconds)
    own: ProcessGroup
    own, _ = dist.new_subgroups_by_enumeration(every, timeout=limit, backend=dist.Backend.GLOO)
    return own


def leave_world() -> None:
    """Undo `join_world`."""
    dist.destroy_process_group()


def join_smaller_world(port: int, rank: int, size: int, seconds: float) -> None:
    """Join a world of the first `size` ranks of one that was left, whose rank 0 listens on a free `port`."""
    timeout = datetime.timedelta(seconds=seconds)
    store = dist.TCPStore(os.environ["MASTER_ADDR"], port, size, is_master=rank == 0, timeout=timeout)
    dist.init_process_group(device.BACKEND, store=store, rank=rank, world_size=size, timeout=timeout)


def all_reduce_bandwidth(world: Reducer, *, nbytes: int, repeats: int) -> tuple[float, bool]:
    """Return the bus bandwidth of an all-reduce of `nbytes` over `world`, bytes/s, and whether the sums were right.

    Bus bandwidth is 2 (n - 1) / n * nbytes / seconds, which for large messages is that of the slowest link whatever n
    is, and 0 for one rank. Source: nccl-tests, doc/PERFORMANCE.md.
    """
    values = torch.ones(nbytes // 4, dtype=torch.float32, device=world.device)
    began = 0.0
    for turn in range(_WARM_UP + repeats):
        if turn == _WARM_UP:
            device.synchronize()
            world.barrier()
            began = time.perf_counter()
        values.fill_(1.0)
        dist.all_reduce(values, group=world.group)
    device.synchronize()
    seconds = (time.perf_counter() - began) / repeats
    right = bool((values == world.size).all())
    return 2 * (world.size - 1) / world.size * nbytes / seconds, right
