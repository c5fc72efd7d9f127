"""Benchmarks beside training, on real servers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from megatron_rl.config import parse_config
from tests.eval.test_beside import SETS, Noted, answers, beside, evaluated, noting
from tests.rollout.servers.servers_case import HF, python_of
from tests.tiny import rows_of, trained
from tests.worlds import Worlds

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1800)]
LIMIT = 1500.0


def _served(folder: Path, samples: int, **train: Any) -> dict[str, Any]:
    server = {"python": str(python_of("sglang"))}
    raw = beside(folder, hf=HF, parallel={"tp": 1, "world_size": 1}, rollout={"server": server})
    raw["eval"] |= {"server": server | {"max_concurrency": 1}}
    raw["eval"]["options"]["mine"]["samples"] = samples
    raw["train"] |= train
    return raw


def _killed_once(raw: dict[str, Any]) -> Noted:
    """Train; the evaluation's server dies by SIGKILL before the third answer of its first evaluation."""
    pids: list[int] = []

    def kill(noted: Noted, engine: Any) -> None:
        if len(noted.sampled) == 2 and not pids:
            guard = engine._fleet._owned[0].process._process.pid
            pids.append(psutil.Process(guard).children()[0].pid)
            os.kill(pids[0], signal.SIGKILL)

    with noting(kill, real=True) as noted, trained(raw) as run:
        assert run.beside._served.engine._fleet.failures == len(pids) == 1
        assert run.served.engine._fleet.failures == 0
    noted.started = []
    return noted


def test_servers_answer_as_in_the_step_though_one_dies(worlds: Worlds, tmp_path: Path) -> None:
    raw = _served(tmp_path, samples=8)
    (noted,) = worlds.run(1, _killed_once, raw, timeout=LIMIT)
    run_dir, rows = parse_config(raw).run_dir, rows_of(raw)
    for steps in (2, 4):
        assert evaluated(rows[steps - 1]) == noted.in_step[steps]
        for name in SETS:
            assert answers(run_dir, steps, name) == answers(Path(f"{run_dir}_in_step"), steps, name)
    assert answers(run_dir, 2) != answers(run_dir, 4), "the weights hardly moved: stale ones would pass"
    assert {version for version, _ in noted.sampled} == {2, 4}
    assert any(version == 2 and logged >= 3 for version, logged in noted.sampled), "training did not go on meanwhile"


def test_a_killed_run_evaluates_anew_what_it_had_begun(tmp_path: Path) -> None:
    raw = _served(tmp_path, samples=60, num_steps=4, save_every=2)
    run_dir, config, out = parse_config(raw).run_dir, tmp_path / "run.yaml", tmp_path / "out.txt"
    config.write_text(yaml.safe_dump(raw))
    part = run_dir / "eval" / "step_000002" / "sets" / "mine" / "part0000.jsonl"

    def start() -> subprocess.Popen[bytes]:
        with out.open("w") as file:
            command = [sys.executable, "-m", "megatron_rl", "train", str(config)]
            return subprocess.Popen(command, stdout=file, stderr=file)

    process, deadline = start(), time.monotonic() + LIMIT / 2
    while not (part.is_file() and part.stat().st_size and (run_dir / "checkpoints" / "step_00000002").is_dir()):
        assert process.poll() is None and time.monotonic() < deadline, out.read_text()
        time.sleep(0.02)
    family = psutil.Process(process.pid).children(recursive=True)
    assert sum("sglang.launch_server" in child.cmdline() for child in family) == 2 * 2  # each with its guard
    process.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive, [child.cmdline() for child in alive]
    process.wait()
    assert not any(map(evaluated, rows_of(raw)))

    assert start().wait(LIMIT / 2) == 0, out.read_text()
    assert "the evaluation after step 2 had not ended, and begins anew" in out.read_text()
    rows = rows_of(raw)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [bool(evaluated(row)) for row in rows] == [False, True, False, True]
    assert len(answers(run_dir, 2)) == len(answers(run_dir, 4)) == 180
    assert answers(run_dir, 2) != answers(run_dir, 4)
