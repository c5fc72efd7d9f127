"""What a process that only waits costs another one on the same GPU: beside a wait in gloo, and in NCCL.

Ranks that wait for an engine share the GPU with it. A wait in NCCL is a kernel that spins, and without MPS the driver
gives it time of its own; the trainer therefore waits in gloo. Two ranks of NCCL on one GPU are two hosts to it
(NCCL_HOSTID); where it refuses, a kernel that spins stands for the wait.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist  # noqa: TID251  no part of the trainer
from gpu_answer import Answer, Skip

from megatron_rl import device

SECONDS = 4.0
START_SECONDS = 45.0
LAYERS, ROWS, WIDTH = 24, 64, 2048


def slices(answer: Answer) -> None:
    """Measure decode-like steps per second alone, then beside waiting processes. Raises: Skip without a GPU."""
    if not device.ON_GPU:
        raise Skip("two processes share a GPU here; this process has none")
    step = decode_step()
    alone = steps_per_second(step)
    answer.figure("steps per second alone", alone)
    with TemporaryDirectory() as name:
        folder = Path(name)
        processes = [start(folder, rank) for rank in range(2)]
        try:
            if not wait_for(folder, "gloo", processes):
                answer.check("gloo and NCCL of two ranks on one GPU", False, last_words(folder))
            else:
                share = steps_per_second(step) / alone
                answer.check("beside a wait in gloo", share >= 0.9, f"{share:.2f} of the speed alone")
                (folder / "end gloo").touch()
                in_nccl(answer, folder, step, alone, processes)
        finally:
            for process in processes:
                process.kill()
        steps_again = steps_per_second(step) / alone
        answer.figure("alone again", steps_again)
        spinning(answer, folder, step, alone)


def in_nccl(
    answer: Answer, folder: Path, step: Callable[[], None], alone: float, processes: list[subprocess.Popen[bytes]]
) -> None:
    """Add the line of a wait in NCCL."""
    if not wait_for(folder, "nccl", processes):
        answer.skip("beside a wait in NCCL", f"NCCL takes no two ranks on this GPU: {last_words(folder)}")
        return
    time.sleep(1.0)  # for the waiting kernel to start
    share = steps_per_second(step) / alone
    (folder / "end nccl").touch()
    answer.check("beside a wait in NCCL", True, f"{share:.2f} of the speed alone; why ranks wait in gloo")


def spinning(answer: Answer, folder: Path, step: Callable[[], None], alone: float) -> None:
    """Add the line of a kernel of one thread that does nothing but count cycles."""
    process = start(folder, -1)
    try:
        if not wait_for(folder, "spin", [process]):
            answer.check("beside a spinning kernel", False, last_words(folder))
            return
        share = steps_per_second(step) / alone
        answer.check("beside a spinning kernel", True, f"{share:.2f} of the speed alone")
    finally:
        process.kill()


def decode_step() -> Callable[[], None]:
    """Return a function that replays a graph of small products and waits for it, as decoding does for each token."""
    where = device.device()
    x = torch.randn(ROWS, WIDTH, dtype=torch.bfloat16, device=where)
    weights = [torch.randn(WIDTH, WIDTH, dtype=torch.bfloat16, device=where) / WIDTH**0.5 for _ in range(LAYERS)]

    def compute() -> torch.Tensor:
        y = x
        for weight in weights:
            y = torch.relu(y @ weight)
        return y

    side = torch.cuda.Stream()  # noqa: TID251  no part of the trainer
    side.wait_stream(torch.cuda.current_stream())  # noqa: TID251
    with torch.cuda.stream(side):  # noqa: TID251  capturing needs a warm-up elsewhere
        for _ in range(3):
            compute()
    torch.cuda.current_stream().wait_stream(side)  # noqa: TID251
    graph = torch.cuda.CUDAGraph()  # noqa: TID251
    with torch.cuda.graph(graph):  # noqa: TID251
        compute()

    def step() -> None:
        graph.replay()
        device.synchronize()

    return step


def steps_per_second(step: Callable[[], None]) -> float:
    for _ in range(20):
        step()
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS:
        step()
        steps += 1
    return steps / (time.perf_counter() - began)


# --- processes that wait ----------------------------------------------------------------------------------------------


def start(folder: Path, rank: int) -> subprocess.Popen[bytes]:
    """Start rank 0 or 1 of a world of two, or (-1) the process whose kernel spins."""
    environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "NCCL_HOSTID": f"host{rank}"}
    environment |= {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1", "NCCL_DEBUG": "WARN"}
    with (folder / f"rank{rank}.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, __file__, str(folder)], env=environment, stdout=log, stderr=subprocess.STDOUT
        )


def wait_for(folder: Path, name: str, processes: list[subprocess.Popen[bytes]]) -> bool:
    """Return whether every process got as far as `name`, before one ended or too long a time."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if len(list(folder.glob(f"{name} *"))) >= len(processes):
            return True
        if any(process.poll() is not None for process in processes):
            return False
        time.sleep(0.05)
    return False


def last_words(folder: Path) -> str:
    lines = [line for log in sorted(folder.glob("*.log")) for line in log.read_text(errors="replace").splitlines()]
    telling = [line for line in lines if "WARN" in line or "Error" in line] or lines
    return " / ".join(telling[-3:])[:500]


def wait_as(folder: Path) -> None:
    """Wait as rank 0 does, for rank 1, which sleeps until the measurement is over."""
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(0)  # noqa: TID251
    if rank < 0:
        torch.zeros(1, device="cuda")
        torch.cuda._sleep(1000)  # noqa: TID251
        torch.cuda.synchronize()  # noqa: TID251
        (folder / "spin ready").touch()
        while True:  # until it is killed
            torch.cuda._sleep(200_000_000)  # noqa: TID251  a tenth of a second
            torch.cuda.synchronize()  # noqa: TID251
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    torch.zeros(1, device="cuda")
    dist.barrier()
    (folder / f"gloo {rank}").touch()
    if rank:
        sleep_until(folder / "end gloo")
    dist.barrier()
    nccl = dist.new_group(backend="nccl", timeout=timedelta(seconds=60))
    values = torch.ones(1024, device="cuda")
    dist.all_reduce(values, group=nccl)
    torch.cuda.synchronize()  # noqa: TID251
    (folder / f"nccl {rank}").touch()
    if rank:
        sleep_until(folder / "end nccl")
    dist.all_reduce(values, group=nccl)
    torch.cuda.synchronize()  # noqa: TID251
    dist.barrier()


def sleep_until(path: Path) -> None:
    while not path.exists():
        time.sleep(0.02)


if __name__ == "__main__":
    wait_as(Path(sys.argv[1]))
