"""Start the processes of a run on one machine, watch over them, and give each worker its side of the contract.

A worker reads nothing but torchrun's environment variables (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR ...), so the same
worker runs under torchrun on many nodes. On one machine this module stands in for `torchrun --standalone`, which prints
tracebacks of its own for every signal and every failed rank, gives the survivors of a dead rank a fixed 30 seconds,
and leaves its workers running when it is killed itself.
"""

import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from megatron_rl.errors import ConfigError, UserError
from megatron_rl.files import REPORTS, SUPERVISOR, Failure, in_order, read_failures, received, record_failure, refusal

_POLL_SECONDS = 0.05
_SETTLE_SECONDS = 3.0  # after a lost connection: for the rank that caused it to be seen dead or to say why
_PR_SET_PDEATHSIG = 1

_stop_signals: list[int] = []


def cpu_cores() -> list[int]:
    """Return the cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


def say(
    text: str, *, error: bool = False, every_rank: bool = False, write: Callable[[str], None] | None = None
) -> None:
    """Tell the user something at once: every message goes through here, results that a command is asked for do not.

    In a world rank 0 speaks for all, and the others are silent.

    error: on standard error instead of standard output. every_rank: for what this rank alone knows; all ranks then
    speak, those other than 0 with their number. write: prints the text where a display has the terminal.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        if not every_rank:
            return
        text = f"rank {rank}: {text}"
    if write is not None:
        write(text)
    else:
        print(text, file=sys.stderr if error else sys.stdout, flush=True)


# ---------------------------------------------------------------------------------------------------- worker side


def install_stop_handler() -> None:
    """Make SIGTERM, SIGINT and SIGUSR1 (Slurm's warnings) turn `stop_requested()` True instead of ending this
    process."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda signum, _frame: _stop_signals.append(signum))


def stop_requested(run_dir: Path | None = None) -> bool:
    """Return whether this process was asked to stop, by a signal or, given a folder, by a file `stop` in it.

    The file reaches all nodes. Ranks learn of either at different moments: agree on it (a max over the world) at the
    end of each step before acting on it, else one rank leaves while another enters the next collective.
    """
    return bool(_stop_signals) or (run_dir is not None and stop_file(run_dir).exists())


def stop_file(run_dir: Path) -> Path:
    """Return the path of the file that asks a run to save and end after the step it is in; whoever starts the run
    removes it first."""
    return run_dir / "stop"


def local_rank() -> int:
    """Return this process's number among those of its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def run_worker(main: Callable[[], None], run_dir: Path) -> None:
    """Run `main` as one rank of a world.

    Stop signals become a flag; a failure is written to run_dir/failures/rank{r}.json and ends the process with code 1
    at once; and the process dies with the one that started it.
    """
    supervisor = os.environ.get(SUPERVISOR)
    die_with_parent(None if supervisor is None else int(supervisor))
    install_stop_handler()
    try:
        main()
    except Exception as error:
        try:
            record_failure(refusal(error, run_dir) or error, run_dir)
        finally:
            # No interpreter teardown: destroying a process group waits for peers that may wait for this rank.
            os._exit(1)


def die_with_parent(parent: int | None) -> None:
    """Have this process killed when the one that started it dies: the process `parent`, where it is known.

    Raises: OSError when the kernel refuses.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if parent is not None and os.getppid() != parent:
        os._exit(1)  # it died before the line above took effect


# ------------------------------------------------------------------------------------------------ supervisor side


def in_world(
    work: Callable[[], None],
    command: Sequence[str],
    run_dir: Path,
    *,
    processes: int,
    grace_seconds: float = 1.0,
    prepare: Callable[[], None] = lambda: None,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Do `work` as one rank of a world of `processes`, or, outside a world, start the ranks with `megatron-rl COMMAND`;
    return the exit code.

    `prepare` runs in the parent alone, see `run_world`. `environment`: set in a rank before `work`, which imports torch
    and Megatron itself: the parent needs neither.
    Raises: UserError when another run holds the folder; in a rank, every failure is written down and ends the process.
    """
    if not is_rank():
        arguments = [sys.executable, "-m", "megatron_rl", *command]
        return run_world(arguments, processes, run_dir, grace_seconds, prepare)

    def checked() -> None:
        _check_world(processes)
        os.environ.update(environment or {})
        work()

    run_worker(checked, run_dir)
    return 0


def is_rank() -> bool:
    """Return whether this process was started as one rank of a world: RANK and WORLD_SIZE are set."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def check_address() -> None:
    """Check that a rank knows where the ranks meet. Raises: UserError naming what its environment lacks."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"RANK and WORLD_SIZE are set, {' and '.join(missing)} not: this process cannot find the other ranks; "
            "start it with torchrun or slurm/launch.sh, which set all four, or unset RANK and WORLD_SIZE"
        )


def _check_world(processes: int) -> None:
    world = int(os.environ["WORLD_SIZE"])
    if world != processes:
        raise ConfigError(
            f"this world has {world} processes (WORLD_SIZE), the config asks for {processes} "
            f"(parallel.world_size, or tp * pp * cp); start that many, or set parallel.world_size={world}"
        )
    check_address()


def run_world(
    command: Sequence[str],
    processes: int,
    run_dir: Path,
    grace_seconds: float,
    prepare: Callable[[], None] = lambda: None,
) -> int:
    """Run `command` as `processes` ranks on this machine and wait for them; call from the main thread.

    Rank 0 has the terminal, the others write to run_dir/logs/rank{r}.log. SIGINT, SIGTERM or SIGHUP reach the workers
    as one SIGTERM; what is left after `grace_seconds`, or at a second signal, is killed. No worker outlives this
    process. `prepare` may write into the folder: it runs once no other run can hold it.

    Returns: 0 when every rank ended well; 128 + signal when asked to stop; 1 when a rank failed (the reason is printed
    once).
    Raises: UserError when another run holds `run_dir`, or it cannot be written to.
    """
    with contextlib.ExitStack() as stack:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_hold(run_dir))
            shutil.rmtree(run_dir / "failures", ignore_errors=True)
            stop_file(run_dir).unlink(missing_ok=True)
            (run_dir / "logs").mkdir(exist_ok=True)
            prepare()
        except OSError as error:
            reason = refusal(error) or f"cannot use {run_dir}: {error}"
            raise UserError(f"{reason} (the run's folder is named by logging.run_dir, or --out)") from error
        port, signals = stack.enter_context(_reserved_port()), stack.enter_context(_noted_signals())
        reports, for_workers = (stack.enter_context(end) for end in socket.socketpair(type=socket.SOCK_DGRAM))
        workers: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(processes):
                workers.append(_spawn(command, rank, processes, port, run_dir / "logs", for_workers.fileno()))
            return _supervise(workers, run_dir, grace_seconds, signals, reports)
        finally:
            _kill(workers)


def _spawn(
    command: Sequence[str], rank: int, processes: int, port: int, logs: Path, reports: int
) -> subprocess.Popen[bytes]:
    env = dict(os.environ)
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    env.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # a CPU's step: 2 to 6% less time, 1% more memory
    env.setdefault("PYTHONUNBUFFERED", "1")  # a killed rank leaves its last lines in the log
    env |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
    env |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env |= {SUPERVISOR: str(os.getpid()), REPORTS: str(reports)}
    with contextlib.ExitStack() as stack:
        log = None if rank == 0 else stack.enter_context((logs / f"rank{rank}.log").open("wb"))
        # A session of its own: the terminal's Ctrl-C reaches a worker only through the supervisor, once.
        return subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=(reports,),
        )


def _supervise(
    workers: list[subprocess.Popen[bytes]],
    run_dir: Path,
    grace_seconds: float,
    signals: list[int],
    reports: socket.socket,
) -> int:
    stopping, deadline = False, float("inf")
    unwritten: list[Failure] = []
    while any(worker.poll() is None for worker in workers):
        unwritten += received(reports)
        failures = [*read_failures(run_dir), *unwritten]
        if signals and not stopping:
            stopping, deadline = True, time.monotonic() + grace_seconds
            say(f"stopping: up to {grace_seconds:g} s to finish the step; once more to stop at once", error=True)
            for worker in workers:
                worker.terminate()
        elif not stopping and any(not failure.lost_peer for failure in failures):
            break
        elif not stopping and deadline == float("inf") and (failures or any(worker.poll() for worker in workers)):
            deadline = time.monotonic() + _SETTLE_SECONDS
        if len(signals) > 1 or time.monotonic() > deadline:
            break
        time.sleep(_POLL_SECONDS)
    late = [rank for rank, worker in enumerate(workers) if worker.poll() is None]
    codes = {rank: worker.returncode for rank, worker in enumerate(workers) if worker.returncode}
    _kill(workers)
    if late and sys.stdout.isatty():
        sys.stdout.write("\x1b[?25h")  # a progress display that was killed cannot give the cursor back
    failures = [*read_failures(run_dir), *unwritten, *received(reports)]
    return _conclude(failures, codes, late, run_dir, signals)


def _conclude(
    failures: list[Failure], codes: dict[int, int], late: list[int], run_dir: Path, signals: list[int]
) -> int:
    """Say what happened and return the exit code."""
    causes = in_order(failures)
    if signals:
        if late:
            say(f"killed: {_ranks(late)} did not stop in time", error=True)
        if causes and not causes[0].lost_peer:  # a checkpoint that failed must not pass for a clean stop
            _explain(causes[0], run_dir)
        return 128 + signals[0]
    silent = {rank: code for rank, code in codes.items() if rank not in {failure.rank for failure in failures}}
    if causes and not (causes[0].lost_peer and silent):
        _explain(causes[0], run_dir)
    elif silent:
        rank, code = min(silent.items(), key=lambda item: item[1])  # a signal (negative) rather than an exit code
        _explain_silent(rank, code, run_dir)
    return 1 if causes or silent else 0


def _explain(failure: Failure, run_dir: Path) -> None:
    if failure.from_user:
        say(f"error: {failure.message}", error=True)
        return
    say(f"rank {failure.rank} failed:\n{failure.traceback.rstrip()}", error=True)
    record = run_dir / "failures" / f"rank{failure.rank}.json"
    where = f"this traceback: {record}; " if record.exists() else ""
    say(f"({where}what other ranks printed: {run_dir}/logs/)", error=True)


def _explain_silent(rank: int, code: int, run_dir: Path) -> None:
    ending = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
    hint = "; the kernel's out-of-memory killer does that" if code == -signal.SIGKILL else ""
    say(f"rank {rank} {ending} without a Python traceback{hint}", error=True)
    log = run_dir / "logs" / f"rank{rank}.log"
    if rank > 0:
        say(f"the last lines of {log}:", error=True)
        say("\n".join(f"  {line}" for line in log.read_text(errors="replace").splitlines()[-20:]), error=True)


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _kill(workers: list[subprocess.Popen[bytes]]) -> None:
    for worker in workers:  # those that ended too: a process they started may still be there
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
    for worker in workers:
        worker.wait()


@contextlib.contextmanager
def _hold(run_dir: Path) -> Iterator[None]:
    with (run_dir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{run_dir} is in use by a run that is still going; stop it, or give this one another name"
            ) from None
        yield


@contextlib.contextmanager
def _reserved_port() -> Iterator[int]:
    """Give a free port and keep it from other processes: it is bound without listening, so that rank 0's store, which
    sets SO_REUSEADDR as well, can still bind it."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@contextlib.contextmanager
def _noted_signals() -> Iterator[list[int]]:
    received: list[int] = []
    watched = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = [signal.signal(number, lambda signum, _frame: received.append(signum)) for number in watched]
    try:
        yield received
    finally:
        for number, handler in zip(watched, previous, strict=True):
            signal.signal(number, handler)
