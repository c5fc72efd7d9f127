"""Writes that are whole or not at all, what the user is told when one fails, and the file in which a rank says why it
died: read by the supervisor and by the end of a Slurm job."""

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_rl.errors import UserError

SUPERVISOR = "MEGATRON_RL_SUPERVISOR_PID"
REPORTS = "MEGATRON_RL_REPORTS_FD"  # a socket to the supervisor, for a failure that no disk takes
_MAX_TRACEBACK = 50_000  # characters, so that a failure fits one datagram
# What a rank sees when another one died; the same words come from gloo, NCCL and the TCP store.
_PEER_LOST = re.compile(
    r"connection (closed|reset|refused)|broken pipe|socket (closed|error)|remote process exited|timed? ?out|NCCL|gloo",
    re.I,
)
# What the machine refuses, by the reason; a file that is missing may be a fault of the program, and is not among them.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = _FULL | {errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENAMETOOLONG}
_REFUSED |= {errno.ENOTDIR, errno.EISDIR, errno.EEXIST}  # a file where a folder belongs, or the reverse


def read_asset(module: str, name: str) -> Any:
    """Return what a YAML file says that lies in `assets/` beside the module whose __file__ is `module`."""
    text = (Path(module).parent / "assets" / name).read_text(encoding="utf-8")
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # libyaml's is ten times as fast


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that readers see it whole or not at all. Raises: OSError; the former file is then unchanged."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with naming(path):
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put `path` into an OSError of the writes inside: that of a full disk names no file, or a temporary one."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def refusal(error: BaseException, run_dir: Path | None = None) -> UserError | None:
    """Return the message for a file that the machine refuses to read or write; None for any other error.

    It names the file and, where a disk is full, the bytes that are free. `run_dir`: of the run that it ends; the
    message then says what is safe.
    """
    if not isinstance(error, OSError) or error.errno not in _REFUSED:
        return None
    place = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else run_dir
    if place is None:
        return None
    text = f"cannot use {place}: {error.strerror}"
    if error.errno in _FULL:
        text += f"; {free_bytes(place):,} bytes are free on its disk: make room there, or raise the limits"
    else:
        text += "; mend it, or name another place"
    return UserError(text if run_dir is None else f"{text}. {_what_is_safe(run_dir)}")


def free_bytes(path: Path) -> int:
    """Return the bytes that are free where `path` is, or would be."""
    existing = next((folder for folder in (path, *path.absolute().parents) if folder.exists()), Path("/"))
    return shutil.disk_usage(existing).free


def _what_is_safe(run_dir: Path) -> str:
    saved = sorted((run_dir / "checkpoints").glob("step_*"))
    if saved:
        return f"{saved[-1]} is safe, and the same command goes on from there"
    if any((run_dir / "sets").glob("*/*.jsonl")):
        return f"The samples in {run_dir / 'sets'} are safe, and the same command goes on from them"
    return "Nothing was saved yet: the same command starts from the beginning"


@dataclass(frozen=True)
class Failure:
    """The reason why one rank died, as it wrote it down itself."""

    rank: int
    seconds: float  # since the epoch, to order the ranks of all machines
    message: str
    traceback: str
    from_user: bool  # the message stands alone
    lost_peer: bool  # a consequence of another rank's death, most likely


def record_failure(error: Exception, run_dir: Path) -> None:
    """Write down why this rank fails, into run_dir/failures/rank{r}.json or, when no disk takes it, to the
    supervisor."""
    text = "".join(traceback.format_exception(error))[-_MAX_TRACEBACK:]
    name = type(error).__name__
    failure = Failure(
        rank=int(os.environ.get("RANK", "0")),
        seconds=time.time(),
        message=str(error) if isinstance(error, UserError) else f"{name}: {error}",
        traceback=text,
        from_user=isinstance(error, UserError),
        lost_peer=is_lost_peer(error),
    )
    path = run_dir / "failures" / f"rank{failure.rank}.json"
    record = json.dumps(asdict(failure), indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, record)
    except OSError:  # the disk may be the very reason
        if REPORTS in os.environ:
            with contextlib.suppress(OSError), socket.socket(fileno=int(os.environ[REPORTS])) as reports:
                reports.send(record.encode())
    with contextlib.suppress(OSError):  # a rank's log may lie on that disk too
        if SUPERVISOR not in os.environ or failure.rank > 0:  # rank 0 shares the supervisor's terminal: it prints there
            brief = failure.lost_peer or failure.from_user
            sys.stderr.write(f"rank {failure.rank}: {failure.message}\n" if brief else text)
        sys.stdout.flush()
        sys.stderr.flush()


def is_lost_peer(error: BaseException) -> bool:
    """Return whether an error is what a rank sees when another one died."""
    if isinstance(error, UserError):  # its text may quote anything: a user's traceback, a server that timed out
        return error.__cause__ is not None and is_lost_peer(error.__cause__)
    is_distributed = any(cls.__name__ == "DistError" for cls in type(error).__mro__)
    is_connection = isinstance(error, RuntimeError | OSError) and _PEER_LOST.search(str(error)) is not None
    return is_distributed or is_connection


def in_order(failures: list[Failure]) -> list[Failure]:
    """Sort failures: causes by time, then those that follow from a lost peer."""
    return sorted(failures, key=lambda failure: (failure.lost_peer, failure.seconds))


def read_failures(run_dir: Path) -> list[Failure]:
    """Read the failures that ranks wrote down since the run was started."""
    return [Failure(**json.loads(path.read_text())) for path in sorted((run_dir / "failures").glob("rank*.json"))]


def received(reports: socket.socket) -> list[Failure]:
    """Return the failures that came since the last call."""
    failures = []
    with contextlib.suppress(BlockingIOError):
        while True:
            failures.append(Failure(**json.loads(reports.recv(1 << 20, socket.MSG_DONTWAIT))))
    return failures
