"""A server's process: how it is started, how its end is told, and that nothing of it stays."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_rl.rollout.servers.processes import EngineProcess, free_port
from tests.worlds import ROOT

# a server with a worker of its own; both write their process ids
TREE = """
import os, pathlib, subprocess, sys, time
folder = pathlib.Path(sys.argv[1])
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
(folder / "pids.tmp").write_text(f"{os.getpid()} {worker.pid}")
(folder / "pids.tmp").rename(folder / "pids")
time.sleep(600)
"""
# one that does not listen to SIGTERM
STUBBORN = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + TREE


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def start(folder: Path, code: str, **env: str) -> EngineProcess:
    return EngineProcess([sys.executable, "-c", code, str(folder)], env, folder / "logs" / "server.log")


def family(folder: Path) -> list[int]:
    until((folder / "pids").exists)
    return [int(pid) for pid in (folder / "pids").read_text().split()]


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("code", [TREE, STUBBORN], ids=["polite", "stubborn"])
def test_stop_ends_the_server_and_its_workers(tmp_path: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATRON_RL_GUARD_SECONDS", "1")
    server = start(tmp_path, code)
    pids = family(tmp_path)
    assert server.alive() and "it runs" in server.obituary()
    server.stop()
    assert not server.alive() and all(gone(pid) for pid in pids)
    assert ("SIGTERM" if code == TREE else "SIGKILL") in server.obituary()
    server.stop()  # nothing left to do


def test_the_server_dies_with_a_trainer_that_is_killed(tmp_path: Path) -> None:
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests.rollout.servers import test_processes as me
me.start(Path({str(tmp_path)!r}), me.TREE)
time.sleep(600)
"""
    trainer = subprocess.Popen([sys.executable, "-c", code])
    server, worker = family(tmp_path)
    try:
        trainer.kill()
        trainer.wait()
        until(lambda: gone(server) and gone(worker))
    finally:
        for pid in (trainer.pid, server, worker):
            if not gone(pid):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("code", "how"),
    [("raise SystemExit(3)", "exit code 3"), ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL")],
)
def test_the_obituary_says_how_and_quotes_the_last_lines_of_this_start(tmp_path: Path, code: str, how: str) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "server.log").write_text("of an earlier server\n")
    server = start(tmp_path, f"for i in range(30): print('line', i, flush=True)\n{code}")
    until(lambda: not server.alive())
    text = server.obituary()
    assert how in text and "line 29" in text and "line 10" in text
    assert "line 9\n" not in text and "earlier" not in text


def test_the_server_is_no_rank_of_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torchrun's TORCHELASTIC_USE_AGENT_STORE a server looks for torchrun's store and never starts."""
    of_a_rank = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE", "PYTHONPATH"}
    for name in (*of_a_rank, "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("KEPT", "kept")
    monkeypatch.setenv("REMOVED", "removed")
    code = "import os\nfor item in os.environ.items(): print(*item)"
    server = start(tmp_path, code, REMOVED="", OMP_NUM_THREADS="1", ADDED="added")
    until(lambda: not server.alive())
    seen = dict(line.split(" ", 1) for line in server.log.read_text().splitlines() if " " in line)
    assert (seen["KEPT"], seen["ADDED"], seen["OMP_NUM_THREADS"]) == ("kept", "added", "1")
    assert not (of_a_rank | {"REMOVED"}) & set(seen)


def test_what_cannot_be_started_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        EngineProcess([str(tmp_path / "nothing")], {}, tmp_path / "log")


def test_a_free_port_can_be_listened_on() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", free_port()))
        listener.listen()
