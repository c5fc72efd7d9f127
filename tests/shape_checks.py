"""Checks the shapes in signatures at every call of the folders where they are written: megatron_rl/types.py."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import beartype
import jaxtyping

FOLDERS = ["megatron_rl.algorithms", "megatron_rl.parallel"]
DATA = "megatron_rl.types"

check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))  # an int is a float, as mypy sees it


def install() -> None:
    """Check the functions of modules that are imported from here on."""
    jaxtyping.install_import_hook([*FOLDERS, DATA], f"{__name__}.check")


@contextlib.contextmanager
def off() -> Iterator[None]:
    """Call functions as a run does, to see what they make of a wrong shape themselves."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
