"""Which line of the project or of Megatron is at work."""

import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

_ROOT = re.escape(str(Path(__file__).resolve().parents[2]))
_OWN = re.compile(rf"(?:{_ROOT}/(?=megatron_rl/)|.*/(?=megatron/core/))(.*)")


def frames() -> Iterator[FrameType]:
    """Yield the caller's frames, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def own_frames() -> Iterator[tuple[str, FrameType]]:
    """Yield the caller's frames that belong to the project or to Megatron, innermost first, each with the name of its
    file from `megatron_rl/` or `megatron/core/` on."""
    return ((name, frame) for frame in frames() if (name := _name_of(frame.f_code.co_filename)))


def place() -> str:
    """Return "file function" of the innermost own frame, without `megatron_rl/`: no line, which would rot."""
    for name, frame in own_frames():
        function = frame.f_code.co_qualname.split(".<locals>.<")[0].replace(".<locals>", "")
        return f"{name.removeprefix('megatron_rl/')} {function}"
    return "elsewhere"


@functools.cache
def _name_of(file: str) -> str:
    found = _OWN.fullmatch(file)
    return found[1] if found and file != __file__ else ""
