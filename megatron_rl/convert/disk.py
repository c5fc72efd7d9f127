"""Write folders whole or not at all, and clean up without standing in the way when that fails."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron_rl import launch

_SAY = partial(launch.say, error=True)


def remove(path: Path, say: Callable[[str], None] = _SAY) -> bool:
    """Remove a folder, a file or a link (not what it points to), if it is there; return whether it is gone.

    What cannot be removed is no reason to fail; `say` hears of it.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        say(f"cannot remove {path} ({type(error).__name__}: {error}); nothing needs it, remove it yourself")
        return False
    return True


def unused(path: Path) -> Path:
    """Return `path`, or the first of `path`.1, `path`.2, ... when something that could not be removed has its name."""
    numbered = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    return next(name for name in itertools.chain([path], numbered) if not os.path.lexists(name))


def fsync_tree(folder: Path, *, recursive: bool = True) -> None:
    """Put a folder's names, and its files, on the disk before something else relies on them."""
    for path in [*(folder.rglob("*") if recursive else ()), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
