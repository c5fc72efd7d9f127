"""A world without Megatron's groups, and how fast it reduces: what preflight needs."""

from __future__ import annotations

import datetime
import os
import socket
import time

import torch
import torch.distributed as dist

from megatron_rl import device
from megatron_rl.parallel.reduce import Reducer

_WARM_UP = 2


def join_world(timeout_minutes: float = 5) -> Reducer:
    """Join the world that torchrun's environment describes, with collectives that give up after `timeout_minutes`."""
    device.set_local_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(device.BACKEND, timeout=datetime.timedelta(minutes=timeout_minutes))
    return Reducer(dist.group.WORLD, device.device())


def leave_world() -> None:
    """Undo `join_world`."""
    dist.destroy_process_group()


def free_address() -> tuple[str, int]:
    """Return this process's host name and a TCP port that nobody listens on there, for `join_smaller_world`."""
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")  # rank 0's own, as its peers reach it
    with socket.socket() as probe:
        probe.bind(("", 0))
        return host, probe.getsockname()[1]


def join_smaller_world(host: str, port: int, rank: int, size: int, timeout_minutes: float = 30) -> None:
    """Join a world of the first `size` ranks of one that was left, whose rank 0 listens at `host`:`port`."""
    timeout = datetime.timedelta(minutes=timeout_minutes)
    store = dist.TCPStore(host, port, size, is_master=rank == 0, timeout=timeout)
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
            dist.barrier(group=world.group)
            began = time.perf_counter()
        values.fill_(1.0)
        dist.all_reduce(values, group=world.group)
    device.synchronize()
    seconds = (time.perf_counter() - began) / repeats
    right = bool((values == world.size).all())
    return 2 * (world.size - 1) / world.size * nbytes / seconds, right
