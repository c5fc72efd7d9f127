"""Write folders whole or not at all, and clean up without standing in the way when that fails."""

import functools
import glob
import itertools
import os
import shutil
from pathlib import Path

from megatron_rl import launch


def remove(path: Path) -> bool:
    """Remove a folder, a file or a link (not what it points to), if it is there; return whether it is gone.

    What cannot be removed is no reason to fail: the user is told, once.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        say_once(f"cannot remove {path} ({type(error).__name__}: {error}); nothing needs it, remove it yourself")
        return False
    return True


@functools.cache
def say_once(text: str) -> None:
    """Tell the user on standard error, unless this process said the same before."""
    launch.say(text, error=True)


def clear(path: Path) -> None:
    """Make the name `path` free: hide what has it, then remove it, and what earlier calls could not remove.

    Under its own name a folder is whole at every moment. Raises: OSError when it cannot be renamed.
    """
    hidden = path.with_name(f".{path.name}.removed")
    if os.path.lexists(path):
        path.rename(unused(hidden))
    for leftover in path.parent.glob(f"{glob.escape(hidden.name)}*"):
        remove(leftover)


def unused(path: Path) -> Path:
    """Return `path`, or the first of `path`.1, `path`.2, ... when something that could not be removed has its name."""
    numbered = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    return next(name for name in itertools.chain([path], numbered) if not os.path.lexists(name))


def replace(draft: Path, target: Path) -> None:
    """Give a folder the name `target`, and remove what had it. Under that name a folder is whole at every moment.

    Raises: OSError when one cannot be renamed.
    """
    fsync_tree(draft)
    old = unused(target.with_name(f".{target.name}.old"))
    if os.path.lexists(target):
        target.rename(old)
    draft.rename(target)
    fsync_tree(target.parent, recursive=False)
    remove(old)


def fsync_tree(folder: Path, *, recursive: bool = True) -> None:
    """Put a folder's names, and its files, on the disk before something else relies on them."""
    for path in [*(folder.rglob("*") if recursive else ()), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
