"""One engine server as a child process: start, look after, stop with everything that it started."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil

from megatron_rl.launch import die_with_parent

# What a launcher tells the ranks of the trainer. A server that reads it takes itself for one of them: under torchrun,
# torch would look for the launcher's store instead of making the server's own.
_OF_THE_TRAINER = re.compile(r"(RANK|WORLD_SIZE|LOCAL_.*|GROUP_.*|ROLE_.*|MASTER_.*|TORCHELASTIC_.*|OMP_NUM_THREADS)$")
_TAIL_LINES = 20
_TERM_SECONDS = 20.0  # from SIGTERM to SIGKILL; SGLang looks for the signal every 5 s


class EngineProcess:
    """A server, in the process group of this process: the run's supervisor, which kills the group, leaves none behind.

    Start it from a thread that lives as long as the run: the kernel kills a child with the *thread* that forked it.
    """

    def __init__(self, argv: list[str], env: dict[str, str], log: Path) -> None:
        """Starts `argv` with `env` on top of this process's environment; output is appended to `log`. An empty value
        removes a variable. Raises: OSError when it cannot be started."""
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        parent = os.getpid()
        inherited = {name: value for name, value in os.environ.items() if not _OF_THE_TRAINER.match(name)}
        merged = {name: value for name, value in (inherited | env).items() if value != ""}
        with log.open("ab") as output:
            self._began = output.tell()
            self._process = subprocess.Popen(
                argv,
                env=merged,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                preexec_fn=lambda: die_with_parent(parent),
            )

    def alive(self) -> bool:
        """Whether the server's main process runs."""
        return self._process.poll() is None

    def obituary(self) -> str:
        """How it ended, with the last lines of its log."""
        code = self._process.poll()
        if code is None:
            how = "it runs, but does not answer"
        elif code < 0:
            how = f"killed by {signal.Signals(-code).name}"
        else:
            how = f"exit code {code}"
        with self.log.open("rb") as log:
            log.seek(self._began)
            lines = log.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]
        return "\n".join([f"{how}; the last lines of {self.log}:", *(f"  {line}" for line in lines)])

    def terminate(self) -> None:
        """Ask it to end, without waiting; it ends its workers itself, in its own order."""
        if self.alive():
            self._process.terminate()

    def stop(self) -> None:
        """End it and all its descendants; returns when they are gone."""
        try:
            workers = psutil.Process(self._process.pid).children(recursive=True) if self.alive() else []
        except psutil.NoSuchProcess:
            workers = []
        self.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_TERM_SECONDS)
        if self.alive():
            self._process.kill()
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
        deadline = time.monotonic() + _TERM_SECONDS
        while any(_runs(worker) for worker in workers) and time.monotonic() < deadline:
            time.sleep(0.05)
        self._process.wait()


def _runs(process: psutil.Process) -> bool:
    """A zombie does not: it waits for an heir to read its exit code, which some containers' init never does."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
