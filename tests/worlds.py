"""Real gloo worlds for tests: a pool of worker processes that outlives the single test.

Importing torch costs seconds, so workers start on first use and are reused; each run gets a fresh process group.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import gc
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MAX_WORKERS = 8  # more than 4 in slow tests only: importing torch and Megatron takes each some 400 MiB
_START_SECONDS = 180.0  # importing torch on a busy machine
_STRAGGLER_SECONDS = 0.5  # after one rank failed: for the others to report before they are killed
_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


class RankError(Exception):
    """The traceback of the rank that failed, as the cause of the exception that the test sees."""


class Worlds:
    """Runs functions on gloo worlds of 1 to 8 ranks. Get it from the fixture `worlds`."""

    def __init__(self) -> None:
        self._workers: list[_Worker] = []

    def run(self, size: int, fn: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
        """`fn(*args)` on ranks 0..size-1 of a fresh gloo group of exactly `size` ranks; the results in rank order.

        `fn` is a module-level function. Arguments and results are pickled by value. Every run starts with
        `torch.manual_seed(0)`; process groups and megatron.core's parallel state are destroyed after it.
        A failure costs new workers (seconds): to test that something raises, catch it inside `fn`.

        Raises: what the first failing rank raised, caused by a RankError with its traceback; RuntimeError if a worker
        died; TimeoutError with their stacks if ranks have not returned after `timeout` seconds.
        """
        from torch.distributed import TCPStore

        if not 1 <= size <= MAX_WORKERS:
            raise ValueError(f"a world of {size} ranks: expected 1 to {MAX_WORKERS}")
        name = f"{fn.__module__}.{fn.__qualname__}"
        self._grow(size)
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        workers = self._workers[:size]
        try:
            for rank, worker in enumerate(workers):
                worker.send((rank, size, store.port, timeout, pickle.dumps((fn, args))))
            return _collect(workers, name, timeout)
        except BaseException:
            for worker in workers:
                worker.kill()
            self._workers = self._workers[size:]
            raise

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def _grow(self, size: int) -> None:
        self._workers = [worker for worker in self._workers if worker.process.poll() is None]
        fresh = [_Worker() for _ in range(size - len(self._workers))]
        self._workers += fresh
        for worker in fresh:
            if not worker.connection.poll(_START_SECONDS):
                self.close()
                raise TimeoutError(f"a worker process did not start within {_START_SECONDS} s")
            worker.connection.recv_bytes()


class _Worker:
    def __init__(self) -> None:
        self.connection, child = Pipe()
        self.stack = tempfile.TemporaryFile("w+")  # written by the worker on SIGUSR1
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            "MEGATRON_RL_DEVICE": "cpu",  # gloo worlds, also on a machine with a GPU
            "TORCHDYNAMO_DISABLE": "1",  # must precede the import of torch
            "GLOO_SOCKET_IFNAME": _LOOPBACK,  # else gloo resolves the host's name, which a sandbox may not
        }
        code = f"from tests.worlds import _serve; _serve({child.fileno()}, {self.stack.fileno()})"
        fds = [child.fileno(), self.stack.fileno()]
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], env=env, cwd=ROOT, pass_fds=fds, stdin=subprocess.DEVNULL
        )
        child.close()

    def send(self, task: tuple[int, int, int, float, bytes]) -> None:
        self.connection.send_bytes(pickle.dumps(task))

    def read_stack(self) -> str:
        self.stack.seek(0)
        return self.stack.read()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()
        self.stack.close()


def _collect(workers: list[_Worker], name: str, timeout: float) -> list[Any]:
    ranks = {worker.connection: rank for rank, worker in enumerate(workers)}
    results: list[Any] = [None] * len(workers)
    failure: tuple[int, BaseException, str] | None = None
    deadline = time.monotonic() + timeout
    while ranks:
        ready = wait(list(ranks), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for connection in ready:
            assert isinstance(connection, Connection)  # wait() is typed for sockets too
            rank = ranks.pop(connection)
            try:
                ok, value, trace = pickle.loads(connection.recv_bytes())
            except EOFError:
                ok, trace = False, ""
                value = RuntimeError(f"{name}: rank {rank} died with exit code {workers[rank].process.wait()}")
            if ok:
                results[rank] = value
            elif failure is None:
                failure = rank, value, trace
                deadline = min(deadline, time.monotonic() + _STRAGGLER_SECONDS)
    if failure is not None:
        rank, error, trace = failure
        raise error from RankError(f"rank {rank} of {len(workers)} in {name}\n{trace}")
    if ranks:
        for rank in ranks.values():
            workers[rank].process.send_signal(signal.SIGUSR1)
        time.sleep(0.2)  # for the stacks to be written
        late = sorted(ranks.values())
        stacks = "\n".join(f"rank {rank}: {workers[rank].read_stack()}" for rank in late)
        raise TimeoutError(f"{name}: ranks {late} of {len(workers)} not done after {timeout} s\n{stacks}")
    return results


def _serve(fd: int, stack_fd: int) -> None:
    """A worker's life: tasks from the pipe until its end, which is also how the parent's death shows."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which then closes the pipe
    faulthandler.register(signal.SIGUSR1, file=stack_fd, all_threads=False)
    import torch

    from tests import shape_checks

    shape_checks.install()
    torch.set_num_threads(1)
    connection = Connection(fd)
    tasks: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read() -> None:
        # a thread of its own, so that a rank that hangs in a collective ends with its parent too
        with contextlib.suppress(EOFError, OSError):
            while True:
                tasks.put(connection.recv_bytes())
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    connection.send_bytes(b"ready")
    while True:
        connection.send_bytes(_run_task(*pickle.loads(tasks.get())))


def _run_task(rank: int, size: int, port: int, timeout: float, call: bytes) -> bytes:
    try:
        # plain pickle copies tensors; multiprocessing's own would share file descriptors with a process that may die
        return pickle.dumps((True, _run_in_world(rank, size, port, timeout, call), ""))
    except BaseException as error:
        trace = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(f"{type(error).__name__}: {error}")
        return pickle.dumps((False, error, trace))


def _run_in_world(rank: int, size: int, port: int, timeout: float, call: bytes) -> Any:
    import torch
    import torch.distributed as dist

    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), **address)
    torch.manual_seed(0)
    limit = datetime.timedelta(seconds=timeout)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=limit)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
    fn, args = pickle.loads(call)
    result = fn(*args)
    if dist.is_initialized():
        dist.barrier()  # a rank that leaves early resets connections that its peers still read from
    leave_layout()
    if dist.is_initialized():
        dist.destroy_process_group()
    return result


def leave_layout() -> None:
    """Drop Megatron's layout and every process group but the world, on all ranks: each gloo group keeps threads."""
    import torch.distributed as dist

    if "megatron.core.parallel_state" in sys.modules:
        sys.modules["megatron.core.parallel_state"].destroy_model_parallel()
    if dist.is_initialized():
        dist.barrier()  # a peer may still read from a group that this rank closes
        for group in list(dist.distributed_c10d._world.pg_map):
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)
        group = None
        # models and optimizers refer to their groups in cycles, and a group ends its threads when it is freed
        _part_from_graphs()
        gc.collect()


def _part_from_graphs() -> None:
    """Megatron's DDP hangs hooks that refer to it on the graph, where the collector cannot follow: a graph that is kept
    (a MoE dispatcher keeps its last probabilities) keeps the model, hence all its groups."""
    ddp = sys.modules.get("megatron.core.distributed.distributed_data_parallel")
    if ddp is not None:
        for model in [x for x in gc.get_objects() if type(x) is ddp.DistributedDataParallel]:
            model.__dict__.clear()
