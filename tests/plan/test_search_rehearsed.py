"""A search whose best layouts are rehearsed. (The planner against rehearsals of the recipes: tests/rehearse.)"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from megatron_rl.config import load_config
from megatron_rl.models.hardware import GIB, HARDWARE
from megatron_rl.plan.command import print_search
from megatron_rl.plan.search import Proposal
from megatron_rl.plan.step import Load, plan_step

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_search_rehearses_its_best_three(tmp_path: Path) -> None:
    config = shutil.copy(ROOT / "configs/quickstart.yaml", tmp_path)
    command = [sys.executable, "-m", "megatron_rl", "plan", config, "--search", "--rehearse", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    proposals = json.loads(done.stdout)["search"]
    assert len(proposals) > 3 and all("rehearsal" not in each for each in proposals[3:])
    for each in proposals[:3]:
        assert each["rehearsal"]["fits"] and 0 < each["rehearsal"]["peak"] < each["peak_bytes"] * 1.1
    assert [path.name for path in tmp_path.iterdir()] == ["quickstart.yaml"]


def test_a_layout_that_does_not_fit_in_its_rehearsal_is_dropped() -> None:
    plan = plan_step(load_config(ROOT / "configs/7b_kl_cov.yaml"), HARDWARE["h100"], Load(200, 2500))
    seen = [{"fits": fits, "peak": 50 * GIB, "where": "update 2 on rank 0"} for fits in (False, True)]
    proposals = [Proposal({"parallel.tp": 2**i}, plan, verdict) for i, verdict in enumerate([*seen, None])]
    text = io.StringIO()
    print_search(Console(file=text, width=400), proposals)
    dropped, title, *rows = text.getvalue().splitlines()
    assert dropped.startswith("dropped, does not fit: parallel.tp=1 (rehearsed: 50.0 GiB, update 2 on rank 0)")
    assert title.startswith("2 layouts fit") and not any("tp=1 " in row for row in rows)
    assert any("parallel.tp=2 (rehearsed: 50.0 GiB" in row for row in rows)
    assert any("parallel.tp=4 " in row for row in rows)
