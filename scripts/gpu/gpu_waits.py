"""Where a step waits for the device, as torch's sync-debug mode sees it, against the list that the tests keep."""

from __future__ import annotations

import ast
import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from gpu_answer import Answer
from gpu_cases import config_of, join
from torch.overrides import TorchFunctionMode

from megatron_rl import device, train
from megatron_rl.rehearse.frames import frames, place

ROOT = Path(__file__).resolve().parents[2]
LIST = ROOT / "tests" / "device_reads.py"
_MESSAGE = "called a synchronizing"
_UPLOADS = {"tensor", "as_tensor", "asarray", "new_tensor"}  # make a tensor of Python's numbers
# Generation and evaluation are one of the engine's jobs; servers do it on a cluster.
RUNS: dict[str, dict[str, Any]] = {
    "kl_cov, bfloat16": {
        "model": {"dtype": "bfloat16"},
        "loss": {"type": "kl_cov", "select_fraction": 0.05, "ref_kl_coef": 0.1},
        "train": {"num_steps": 2, "entropy_tangent": True, "eval_every": 2, "save_every": 2},
    },
    "clip_cov, float32": {
        "loss": {"type": "clip_cov", "select_fraction": 0.05, "cov_low": 0.01},
        "train": {"num_steps": 1},
    },
}


def waits(answer: Answer) -> None:
    """Train a few steps with the embedded engine; compare where `run_step` waited with the list."""
    known = known_reads()
    for name, sections in RUNS.items():
        with TemporaryDirectory() as folder:
            config = config_of(Path(folder), **sections)
            groups = join(config)
            with recorded() as seen:
                train.train(config, groups)
        reads = Counter({place: count for (place, kind), count in seen.items() if kind == "read"})
        uploads = Counter({place: count for (place, kind), count in seen.items() if kind == "upload"})
        new = sorted(reads.keys() - known)
        answer.figure(name, {"reads": dict(reads), "uploads": dict(uploads), "not in the list": new})
        text = f"{sum(reads.values())} reads at {len(reads)} places, {sum(uploads.values())} uploads at {len(uploads)}"
        answer.check(name, not new, f"{text}; not in {LIST.name}: {', '.join(new[:4])}" if new else text)
        if device.ON_GPU:
            answer.check(f"{name}: the mode sees", bool(reads), "a step that waits nowhere would be a broken record")


def known_reads() -> set[str]:
    """Return the keys of READS, without importing the tests."""
    for node in ast.parse(LIST.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "READS":
            return set(ast.literal_eval(node.value))
    raise ValueError(f"{LIST} has no READS")


class _Calls(TorchFunctionMode):
    """Knows the outermost call of torch that is under way."""

    def __init__(self) -> None:
        super().__init__()
        self.call: tuple[str, list[Any]] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outer, self.call = self.call, self.call or (getattr(func, "__name__", ""), list(args))
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.call = outer

    def kind(self) -> str:
        """Return whether the device is asked for a value (read) or given one that lies in pageable memory (upload)."""
        name, args = self.call or ("", [])
        if name in _UPLOADS:
            return "upload"
        if name in ("to", "cuda") and args and isinstance(args[0], torch.Tensor):
            return "read" if args[0].is_cuda else "upload"
        if name in ("copy_", "__setitem__") and isinstance(args[-1], torch.Tensor | float | int):
            source = args[-1]
            return "read" if isinstance(source, torch.Tensor) and source.is_cuda and not args[0].is_cuda else "upload"
        return "read"


@contextlib.contextmanager
def recorded() -> Iterator[Counter[tuple[str, str]]]:
    """Count where steps wait within the block, by ("file function", read or upload)."""
    seen: Counter[tuple[str, str]] = Counter()
    calls = _Calls()

    def note(message: Any, category: Any, *_: Any, **__: Any) -> None:
        if _MESSAGE in str(message) and any(frame.f_code.co_name == "run_step" for frame in frames()):
            seen[place(), calls.kind()] += 1

    with warnings.catch_warnings(), calls:
        warnings.simplefilter("always")
        warnings.showwarning = note
        if device.ON_GPU:
            torch.cuda.set_sync_debug_mode("warn")  # noqa: TID251  no part of the trainer
        try:
            yield seen
        finally:
            if device.ON_GPU:
                torch.cuda.set_sync_debug_mode("default")  # noqa: TID251
