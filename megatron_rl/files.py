"""Writes that are whole or not at all, and what the user is told when one fails."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_rl.errors import UserError

# What the machine refuses, by the reason; a file that is missing may be a fault of the program, and is not among them.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = _FULL | {errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENAMETOOLONG}
_REFUSED |= {errno.ENOTDIR, errno.EISDIR, errno.EEXIST}  # a file where a folder belongs, or the reverse


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
        text += f"; {_free_bytes(place):,} bytes are free on its disk: make room there, or raise the limits"
    else:
        text += "; mend it, or name another place"
    return UserError(text if run_dir is None else f"{text}. {_what_is_safe(run_dir)}")


def _free_bytes(path: Path) -> int:
    existing = next((folder for folder in (path, *path.absolute().parents) if folder.exists()), Path("/"))
    return shutil.disk_usage(existing).free


def _what_is_safe(run_dir: Path) -> str:
    saved = sorted((run_dir / "checkpoints").glob("step_*"))
    if saved:
        return f"{saved[-1]} is safe, and the same command goes on from there"
    if any((run_dir / "sets").glob("*/*.jsonl")):
        return f"The samples in {run_dir / 'sets'} are safe, and the same command goes on from them"
    return "Nothing was saved yet: the same command starts from the beginning"
