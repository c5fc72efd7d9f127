"""The end of a job: the reason on top of the merged log, and whether steps are left."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_rl.cluster.conclude import conclude, has_steps_left
from megatron_rl.files import Failure

MERGED = "[rank 0] step 1\ntorchrun: rank 3 got signal 9\n[rank 1] step 1\n"
LOST = Failure(0, 1.0, "RuntimeError: Connection closed", "LOST", from_user=False, lost_peer=True)
CAUSE = Failure(5, 9.0, "ValueError: boom", "Traceback\nValueError: boom\n", from_user=False, lost_peer=False)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "failures").mkdir()
    (tmp_path / "merged.log").write_text(MERGED)
    return tmp_path


def write(run_dir: Path, *failures: Failure) -> None:
    for failure in failures:
        path = run_dir / "failures" / f"rank{failure.rank}.json"
        path.write_text(json.dumps(dataclasses.asdict(failure)))


def test_the_cause_comes_before_those_who_lost_a_peer(run_dir: Path) -> None:
    write(run_dir, LOST, CAUSE, dataclasses.replace(CAUSE, rank=6, seconds=10.0, traceback="LATER"))
    reason = conclude(run_dir, run_dir / "merged.log", failed=True)
    text = (run_dir / "merged.log").read_text()
    assert text.startswith("rank 5 failed first") and reason.endswith("Traceback\nValueError: boom")
    assert "LOST" not in text and "LATER" not in text and MERGED.strip() in text


def test_without_a_traceback_torchrun_has_the_word(run_dir: Path) -> None:
    reason = conclude(run_dir, run_dir / "merged.log", failed=True)
    assert reason.splitlines()[1:] == ["torchrun: rank 3 got signal 9"]


def test_a_job_that_ended_well_has_no_reason(run_dir: Path) -> None:
    assert conclude(run_dir, run_dir / "merged.log", failed=False) == ""
    assert (run_dir / "merged.log").read_text() == MERGED


@pytest.mark.parametrize(("done", "left"), [(None, True), (0, True), (2, True), (3, False)])
def test_steps_left(tmp_path: Path, done: int | None, left: bool) -> None:
    (tmp_path / "config.yaml").write_text("train: {num_steps: 3}\n")
    if done is not None:
        (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(done)))
    assert has_steps_left(tmp_path) is left
