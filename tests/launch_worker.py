"""The program that tests/test_launch.py runs as the ranks of a world: `python launch_worker.py MODE RUN_DIR`."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_rl.errors import UserError
from megatron_rl.files import naming
from megatron_rl.launch import run_worker, stop_requested

MODE, RUN_DIR = sys.argv[1], Path(sys.argv[2])
RANK = int(os.environ["RANK"])


def _mark(name: str) -> None:
    (RUN_DIR / f"{name}{RANK}").write_text(str(os.getpid()))


def _barriers_until_rank_1_acts(act: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    dist.barrier()
    _mark("ready")
    if RANK == 1:
        if act == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("boom on rank 1")
    while True:
        dist.barrier()


def _main() -> None:
    if MODE in ("raise", "die"):
        _barriers_until_rank_1_acts(MODE)
    elif MODE in ("raise_alone_0", "raise_alone_1"):  # the other rank never notices
        if MODE.endswith(str(RANK)):
            raise ValueError(f"boom on rank {RANK}")
        time.sleep(600)
    elif MODE == "user_error":
        raise UserError("the data set is empty")
    elif MODE == "full_disk":  # from here on no file takes a byte: neither rows, nor the failure, nor rank 1's log
        (RUN_DIR / "checkpoints" / "step_00000004").mkdir(parents=True, exist_ok=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        if RANK == 0:
            time.sleep(600)
        with naming(RUN_DIR / "metrics.jsonl"), (RUN_DIR / "metrics.jsonl").open("w") as file:
            file.write("{}")
    elif MODE == "work":
        _mark("ready")
        while not stop_requested(RUN_DIR):
            time.sleep(0.02)
        _mark("checkpoint")
    elif MODE == "stubborn":  # and with a child process of its own
        child = subprocess.Popen(["sleep", "600"])
        (RUN_DIR / f"child{RANK}").write_text(str(child.pid))
        _mark("ready")
        time.sleep(600)
    elif MODE == "environment":
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
        (RUN_DIR / f"env{RANK}").write_text(" ".join(os.environ[name] for name in names))
        print(f"hello from rank {RANK}")


run_worker(_main, RUN_DIR)
