"""The supervisor, on real processes: what ends a run ends all of it, soon, and says why once."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_rl import files, launch
from megatron_rl.errors import UserError
from megatron_rl.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
WORKER = ROOT / "tests" / "launch_worker.py"
START_SECONDS = 120.0  # importing torch on a busy machine
DRIVER = """
import sys
from pathlib import Path
from megatron_rl.launch import run_world
mode, run_dir, grace = sys.argv[1:]
sys.exit(run_world([sys.executable, {worker!r}, mode, run_dir], 2, Path(run_dir), float(grace)))
"""


class Run:
    """One supervisor with two ranks."""

    def __init__(self, mode: str, run_dir: Path, grace: float) -> None:
        self.run_dir = run_dir
        env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        env |= {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, "-c", DRIVER.format(worker=str(WORKER)), mode, str(run_dir), str(grace)]
        self.process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def pids(self, name: str) -> list[int]:
        """Written by both ranks, once both are there."""
        paths = [self.run_dir / f"{name}{rank}" for rank in range(2)]
        until(lambda: all(path.exists() and path.read_text() for path in paths), START_SECONDS)
        return [int(path.read_text()) for path in paths]

    def end(self, seconds: float) -> tuple[int, str, str]:
        """(exit code, stdout, stderr). Raises: TimeoutExpired."""
        out, err = self.process.communicate(timeout=seconds)
        return self.process.returncode, out, err


def until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # nobody may reap an orphan in a container


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def _start(mode: str, grace: float = 20.0) -> Run:
        runs.append(Run(mode, tmp_path / "run", grace))
        return runs[-1]

    yield _start
    for run in runs:
        with contextlib.suppress(ProcessLookupError):
            run.process.kill()
        run.process.wait()


def test_each_rank_gets_the_environment_of_torchrun(start: Callable[..., Run]) -> None:
    run = start("environment")
    code, out, err = run.end(START_SECONDS)
    assert (code, err) == (0, "")
    assert [(run.run_dir / f"env{rank}").read_text() for rank in range(2)] == ["0 0 2 2 127.0.0.1", "1 1 2 2 127.0.0.1"]
    assert out == "hello from rank 0\n"
    assert (run.run_dir / "logs" / "rank1.log").read_text() == "hello from rank 1\n"


@pytest.mark.parametrize(("mode", "rank"), [("raise", 1), ("raise_alone_0", 0), ("raise_alone_1", 1)])
def test_a_failing_rank_ends_the_run_and_its_traceback_is_shown_once(
    start: Callable[..., Run], mode: str, rank: int
) -> None:
    run = start(mode)
    until(lambda: (run.run_dir / "failures" / f"rank{rank}.json").exists(), START_SECONDS)
    code, out, err = run.end(10)
    assert code == 1
    assert err.count("Traceback (most recent call last)") == 1
    assert err.count(f"ValueError: boom on rank {rank}") == 1
    assert err.startswith(f"rank {rank} failed:\n")
    assert "Traceback" not in out


def test_a_killed_rank_is_named_rather_than_the_peer_that_lost_it(start: Callable[..., Run]) -> None:
    run = start("die")
    run.pids("ready")
    code, _, err = run.end(15)
    assert code == 1
    assert err.startswith("rank 1 was killed by SIGKILL")
    assert "Traceback (most" not in err


def test_a_user_error_is_a_message_without_traceback(start: Callable[..., Run]) -> None:
    code, _, err = start("user_error").end(START_SECONDS)
    assert (code, err) == (1, "error: the data set is empty\n")


def test_a_full_disk_is_the_message_though_no_file_takes_it(start: Callable[..., Run]) -> None:
    run = start("full_disk")
    code, _, err = run.end(START_SECONDS)
    assert code == 1 and err.count("\n") == 1
    assert err.startswith(f"error: cannot use {run.run_dir}/metrics.jsonl: File too large; ")
    assert "bytes are free on its disk: make room there" in err
    assert f"{run.run_dir}/checkpoints/step_00000004 is safe, and the same command goes on from there" in err


@pytest.mark.parametrize("folder", ["file/run", "name/config.yaml"])
def test_a_run_folder_that_cannot_be_used_is_named(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("")
    run_dir = tmp_path / ("file/run" if folder == "file/run" else "name")

    def prepare() -> None:
        (run_dir / "config.yaml").mkdir()
        write_atomically(run_dir / "config.yaml", "")

    with pytest.raises(UserError, match=rf"cannot use {tmp_path}/{folder}: .* is named by logging\.run_dir, or --out"):
        launch.run_world(["true"], 1, run_dir, 1.0, prepare)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_lets_every_rank_finish(start: Callable[..., Run], number: signal.Signals) -> None:
    run = start("work")
    pids = run.pids("ready")
    run.process.send_signal(number)
    code, _, err = run.end(10)
    assert code == 128 + number
    assert run.pids("checkpoint") == pids
    assert "Traceback" not in err and "killed" not in err


def test_a_file_stops_a_run_and_one_left_over_does_not(start: Callable[..., Run], tmp_path: Path) -> None:
    stop = tmp_path / "run" / "stop"
    stop.parent.mkdir()
    stop.touch()
    run = start("work")
    pids = run.pids("ready")
    assert not stop.exists() and run.process.poll() is None
    stop.touch()
    code, _, err = run.end(10)
    assert (code, err) == (0, "") and run.pids("checkpoint") == pids


def test_a_rank_that_ignores_the_stop_is_killed_after_the_grace(start: Callable[..., Run]) -> None:
    run = start("stubborn", grace=1.0)
    pids = run.pids("ready") + run.pids("child")
    began = time.monotonic()
    run.process.send_signal(signal.SIGTERM)
    code, _, err = run.end(10)
    assert code == 143 and time.monotonic() - began >= 1.0
    assert "ranks 0, 1 did not stop in time" in err
    until(lambda: not any(map(is_alive, pids)), 5)


def test_a_second_signal_does_not_wait(start: Callable[..., Run]) -> None:
    run = start("stubborn", grace=600.0)
    pids = run.pids("ready")
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.3)  # two signals of one kind that arrive together are one
    run.process.send_signal(signal.SIGINT)
    assert run.end(10)[0] == 130
    assert not any(map(is_alive, pids))


def test_no_rank_outlives_a_killed_supervisor(start: Callable[..., Run]) -> None:
    run = start("work")
    pids = run.pids("ready")
    assert all(map(is_alive, pids))
    run.process.kill()
    until(lambda: not any(map(is_alive, pids)), 5)


def test_a_run_folder_has_one_run_at_a_time(start: Callable[..., Run]) -> None:
    first = start("work")
    first.pids("ready")
    code, _, err = start("work").end(30)
    assert code == 1 and "is in use by a run" in err
    assert first.process.poll() is None


def test_the_same_worker_runs_under_torchrun(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, str(WORKER), "environment", str(tmp_path)], env=env, check=True, timeout=START_SECONDS)
    names = [(tmp_path / f"env{rank}").read_text().split()[:4] for rank in range(2)]
    assert names == [["0", "0", "2", "2"], ["1", "1", "2", "2"]]


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242"), True),
        (ConnectionResetError(104, "Connection reset by peer"), True),
        (RuntimeError("the size of tensor a (3) must match the size of tensor b (4)"), False),
        (ValueError("timeout must be positive"), False),
    ],
)
def test_a_lost_peer_is_told_from_a_cause(error: Exception, is_lost: bool) -> None:
    assert files.is_lost_peer(error) is is_lost


def test_an_earlier_lost_peer_does_not_hide_the_cause(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lost = files.Failure(0, 1.0, "RuntimeError: Connection closed by peer", "LOST", from_user=False, lost_peer=True)
    late = files.Failure(2, 3.0, "ValueError: later", "LATER", from_user=False, lost_peer=False)
    cause = files.Failure(1, 2.0, "ValueError: boom", "CAUSE", from_user=False, lost_peer=False)
    assert launch._conclude([lost, late, cause], {0: 1, 1: 1, 2: 1}, [], tmp_path, []) == 1
    err = capsys.readouterr().err
    assert "rank 1 failed:\nCAUSE" in err and "LOST" not in err and "LATER" not in err
