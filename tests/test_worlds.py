from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.worlds import ROOT, RankError, Worlds


def _sum_and_rank(offset: torch.Tensor) -> tuple[int, int, torch.Tensor, str, int]:
    total = offset + dist.get_rank()
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total, os.environ["RANK"], os.getpid()


def _raise_on_last_rank() -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        raise KeyError("broken on purpose")
    dist.barrier()


def _hang_on_rank_1() -> None:
    if dist.get_rank() == 1:
        time.sleep(600)


def _die() -> None:
    os._exit(7)


def _is_running(status: Path) -> bool:
    try:
        return "State:\tZ" not in status.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_results_come_in_rank_order_and_workers_are_reused(worlds: Worlds) -> None:
    first = worlds.run(2, _sum_and_rank, torch.tensor([10.0, 20.0]))
    assert [r[:2] for r in first] == [(0, 2), (1, 2)]
    assert [r[3] for r in first] == ["0", "1"]
    assert all(r[2].tolist() == [21.0, 41.0] for r in first)
    wider = worlds.run(3, _sum_and_rank, torch.tensor([0.0]))
    assert [r[2].item() for r in wider] == [3.0] * 3
    assert [r[4] for r in wider[:2]] == [r[4] for r in first]
    assert worlds.run(1, _sum_and_rank, torch.tensor([4.0]))[0][2].item() == 4.0


def test_failures_are_raised_and_leave_a_working_pool(worlds: Worlds) -> None:
    with pytest.raises(KeyError, match="broken on purpose") as caught:
        worlds.run(2, _raise_on_last_rank)
    assert isinstance(caught.value.__cause__, RankError)
    assert "rank 1 of 2" in str(caught.value.__cause__) and "in _raise_on_last_rank" in str(caught.value.__cause__)
    with pytest.raises(TimeoutError, match=r"_hang_on_rank_1: ranks \[0, 1\] of 2 not done after 1 s") as late:
        worlds.run(2, _hang_on_rank_1, timeout=1)
    assert re.search("rank 1: .*in _hang_on_rank_1", str(late.value), re.DOTALL)
    with pytest.raises(RuntimeError, match="rank 0 died with exit code 7"):
        worlds.run(1, _die)
    assert [r[2].item() for r in worlds.run(2, _sum_and_rank, torch.tensor([1.0]))] == [3.0, 3.0]


def test_workers_die_with_the_process_that_started_them() -> None:
    code = (
        "from tests.worlds import Worlds; from tests.test_worlds import _sum_and_rank; import os, torch; "
        "print(Worlds().run(1, _sum_and_rank, torch.zeros(1))[0][-1], flush=True); os._exit(0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=180, check=True
    )
    status = Path(f"/proc/{int(done.stdout)}/status")
    deadline = time.monotonic() + 20
    while _is_running(status):
        assert time.monotonic() < deadline, "the worker outlives its parent"
        time.sleep(0.05)


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _threads_with_a_trained_mixture(folder: Path) -> int:
    from tests.policy.tiny import make_batch, make_config, policy_of

    config = make_config(folder)
    with policy_of(config) as policy:
        policy.update(make_batch(config, policy.groups).mini_batches[0], config.loss)
    return _threads()


def test_a_policy_that_keeps_a_graph_gives_its_threads_back(worlds: Worlds, tmp_path: Path) -> None:
    from tests.policy.tiny import hf_model, save

    moe = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    folder = save(hf_model(**moe, norm_topk_prob=True), tmp_path / "moe")
    (before,) = worlds.run(1, _threads)
    (during,) = worlds.run(1, _threads_with_a_trained_mixture, folder)
    (after,) = worlds.run(1, _threads)
    assert during > before + 20 and after <= before + 10, (before, during, after)
