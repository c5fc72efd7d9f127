"""Runs one engine server, and leaves nothing of it behind: `python -I guard.py PARENT_PID COMMAND...`

A server's workers do not all die with it (vLLM's live on when its front is killed), and a trainer that is killed can
stop nobody. The guard holds the server in a process group of its own and kills the group when the server ends, when
SIGTERM asks for it, and when the trainer dies. Its exit code is the server's, 128 + n for signal n. It runs in the
server's environment, isolated from it, and needs the standard library alone.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from types import FrameType

# from SIGTERM to SIGKILL; SGLang looks for the signal every 5 s
TERM_SECONDS = float(os.environ.get("MEGATRON_RL_GUARD_SECONDS", "20"))
_POLL_SECONDS = 0.1
_PR_SET_PDEATHSIG = 1


def main(parent: int, command: list[str]) -> int:
    """Run `command` until it ends or has to be ended; return its exit code."""
    asked: list[int] = []

    def note(signum: int, _frame: FrameType | None) -> None:
        asked.append(signum)

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = subprocess.Popen(command, start_new_session=True, preexec_fn=_die_with_guard)
    try:
        while server.poll() is None and os.getppid() == parent and not asked:
            time.sleep(_POLL_SECONDS)
        if server.poll() is None and os.getppid() == parent:
            server.terminate()  # it then ends its workers itself, in its own order
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(TERM_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        code = server.wait()
    return code if code >= 0 else 128 - code


def _die_with_guard() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
