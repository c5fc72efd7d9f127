"""One engine server as a child process: start, look after, stop with everything that it started."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

# What a launcher tells the ranks of the trainer. A server that reads it takes itself for one of them: under torchrun,
# torch would look for the launcher's store instead of making the server's own. PYTHONPATH holds the trainer's packages.
_OF_THE_TRAINER = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_.*|GROUP_.*|ROLE_.*|MASTER_.*|TORCHELASTIC_.*|OMP_NUM_THREADS|GLIBC_TUNABLES|PYTHONPATH)$"
)
_GUARD = Path(__file__).parent / "guard.py"
_TAIL_LINES = 20


class EngineProcess:
    """A server under a guard (guard.py), which ends it with all its workers when it is told to or this process dies."""

    def __init__(self, argv: list[str], env: dict[str, str], log: Path) -> None:
        """Start `argv` with `env` on top of this process's environment; output is appended to `log`. An empty value
        removes a variable. Raises: OSError when it cannot be started."""
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        if shutil.which(argv[0]) is None:
            raise FileNotFoundError(f"{argv[0]} is no program that can be run")
        inherited = {name: value for name, value in os.environ.items() if not _OF_THE_TRAINER.match(name)}
        merged = {name: value for name, value in (inherited | env).items() if value != ""}
        with log.open("ab") as output:
            self._began = output.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(_GUARD), str(os.getpid()), *argv],
                env=merged,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                # the supervisor kills the process group of a rank, and the guard must outlive the rank to do its duty
                start_new_session=True,
            )

    def alive(self) -> bool:
        """Return whether the server's main process runs."""
        return self._process.poll() is None

    def obituary(self) -> str:
        """Return a text on how it ended, with the last lines of its log."""
        code = self._process.poll()
        if code is None:
            ending = "it runs, but does not answer"
        elif code < 0 or code > 128:
            ending = f"killed by {signal.Signals(-code if code < 0 else code - 128).name}"
        else:
            ending = f"exit code {code}"
        with self.log.open("rb") as log:
            log.seek(self._began)
            lines = log.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]
        return "\n".join([f"{ending}; the last lines of {self.log}:", *(f"  {line}" for line in lines)])

    def terminate(self) -> None:
        """Ask it to end, without waiting for it; it ends its own workers."""
        if self.alive():
            self._process.terminate()

    def stop(self) -> None:
        """End it and all its descendants; return when they are gone."""
        self.terminate()
        self._process.wait()


def free_port() -> int:
    """Return a TCP port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
