"""Grading in processes of its own beside generation, with a deadline per answer.

The deadline is in CPU time, so that a verdict does not depend on what else the machine does.

An answer that hangs the verifier, crashes it or takes all its memory costs that answer: its process is killed and the
next answer gets a new one. The processes start from a bare interpreter, not by fork (the trainer holds threads, sockets
and device memory), import no torch, and die with the thread that started them, however that ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import Pipe
from typing import Any

import psutil

from megatron_rl.grading.registry import RewardError
from megatron_rl.grading.verdict import Verdict, Verifier

# an interpreter takes under 1 s, a user's module with torch many more, on a machine under load a multiple
_START_SECONDS = 300.0
_TICK_SECONDS = 0.1
_GONE = (EOFError, OSError, psutil.NoSuchProcess)  # what talking to a process that has ended raises
_WAITING = (psutil.STATUS_SLEEPING, psutil.STATUS_DISK_SLEEP, psutil.STATUS_IDLE, psutil.STATUS_ZOMBIE)
_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from megatron_rl.grading.worker import main; main(int(sys.argv[2]))"
)


class GradingPool:
    """Up to `workers` processes, started as answers queue up. Verdicts do not depend on which one grades."""

    def __init__(
        self,
        verifiers: Sequence[Verifier],
        *,
        workers: int = 2,
        deadline_seconds: float = 10.0,
        memory_gib: float | None = 8.0,
    ) -> None:
        """Starts one worker, to learn whether the functions load. The first verifier's value is the score.

        `deadline_seconds`: for all verifiers of one answer, as `_Worker.ask` counts them. `memory_gib`: private memory
        of a worker; None: no limit.
        Raises: RewardError when a function cannot be loaded.
        """
        self._count, self._deadline = len(verifiers), deadline_seconds
        self._setup = {
            "parent": os.getpid(),
            "memory_bytes": None if memory_gib is None else int(memory_gib * 2**30),
            "verifiers": [{"function": v.function, "options": dict(v.options)} for v in verifiers],
        }
        self._threads = ThreadPoolExecutor(workers, "grading")
        self._mine = threading.local()  # each thread has a worker of its own
        self._lock = threading.Lock()
        self._alive: set[_Worker] = set()
        self._closed = False
        try:
            self._threads.submit(self._worker).result()
        except RewardError:
            self.close()
            raise

    def submit(self, response: str, answer: str) -> Future[Verdict]:
        """Queue one answer. The future raises RewardError when no worker can be started any more."""
        return self._threads.submit(self._grade, response, answer)

    def close(self) -> None:
        """Kill the workers; answers under way or queued are not graded."""
        with self._lock:
            self._closed = True
            workers, self._alive = self._alive, set()
        for worker in workers:
            worker.process.kill()  # a thread that waits for it sees the end of its socket
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in workers:
            worker.kill()

    def _grade(self, response: str, answer: str) -> Verdict:
        worker = self._worker()
        reply, problem = None, "deadline"
        try:
            reply = worker.ask([response, answer], self._deadline)
        except _GONE:
            problem = "crash"
        if reply is None:
            self._drop(worker)
            return Verdict((0.0,) * self._count, unfinished=problem)
        return Verdict(tuple(reply["values"]), reply["error"])

    def _worker(self) -> _Worker:
        """This thread's worker, started when there is none."""
        worker: _Worker | None = getattr(self._mine, "worker", None)
        if worker is not None:
            return worker
        worker = _Worker()
        with self._lock:
            if self._closed:
                worker.kill()
                raise RewardError("the grading pool is closed")
            self._alive.add(worker)
        try:
            reply = worker.ask(self._setup, _START_SECONDS, by_the_clock=True)
            problem = f"it did not start within {_START_SECONDS:g} s" if reply is None else reply.get("error", "")
        except _GONE:
            problem = f"a grading process ended with code {worker.process.wait()} while it loaded the reward functions"
        if problem:
            self._drop(worker)
            raise RewardError(problem)
        self._mine.worker = worker
        return worker

    def _drop(self, worker: _Worker) -> None:
        self._mine.worker = None
        with self._lock:
            self._alive.discard(worker)
        worker.kill()


class _Worker:
    """A grading process and the socket to it."""

    def __init__(self) -> None:
        self._connection, child = Pipe()
        env = os.environ | {
            "OMP_NUM_THREADS": "1",  # the cores are the trainer's
            "PYTHONHASHSEED": "0",  # the order of a set, so that a verdict never depends on the process
        }
        command = [sys.executable, "-c", _CODE, json.dumps(sys.path), str(child.fileno())]
        self.process = subprocess.Popen(command, env=env, pass_fds=[child.fileno()], stdin=subprocess.DEVNULL)
        self._usage = psutil.Process(self.process.pid)
        child.close()

    def ask(self, message: object, seconds: float, *, by_the_clock: bool = False) -> dict[str, Any] | None:
        """The reply, or None when the time is over. Raises: one of _GONE.

        `seconds`: of computing, and of waiting for anything but the CPU, as for a reply from the network: every tick in
        which the process used no CPU and was neither running nor stopped counts in full. `by_the_clock`: all ticks do.
        """
        cpu, at = self._cpu_seconds(), time.monotonic()
        self._connection.send_bytes(json.dumps(message).encode())
        while not self._connection.poll(_TICK_SECONDS):
            used, passed = self._cpu_seconds() - cpu, time.monotonic() - at
            cpu, at = cpu + used, at + passed
            waits = used == 0 and self._usage.status() in _WAITING
            seconds -= passed if by_the_clock or waits else used
            if seconds <= 0:
                return None
        reply: dict[str, Any] = json.loads(self._connection.recv_bytes())
        return reply

    def _cpu_seconds(self) -> float:
        times = self._usage.cpu_times()
        return float(times.user + times.system)

    def kill(self) -> None:
        """End the process and what it started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in self._usage.children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        self.process.kill()
        self.process.wait()
        self._connection.close()
