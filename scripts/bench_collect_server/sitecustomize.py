"""Gives an SGLang server of bench_collect.py the pace of a GPU, whose decode step takes as long for few requests as for
many, and notes each step; Python runs this at start-up where the folder comes first on PYTHONPATH.

BENCH_STEP_SECONDS: the least time from the end of the step before to the end of a decode step. BENCH_STEP_LOG: a folder
for one file per server; a line has the monotonic seconds of a step's begin and end, its kind and the number of its
requests, each of which gets one token.
"""

import functools
import importlib.abc
import importlib.machinery
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SCHEDULER = "sglang.srt.managers.scheduler"
_STEP_SECONDS = float(os.environ["BENCH_STEP_SECONDS"])
_LOG = Path(os.environ["BENCH_STEP_LOG"])


class _BeforeScheduler(importlib.abc.MetaPathFinder):
    """Wraps `Scheduler.run_batch` when its module has been loaded."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != _SCHEDULER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def load_and_wrap(module: Any) -> None:
            load(module)
            module.Scheduler.run_batch = _paced(module.Scheduler.run_batch)

        spec.loader.exec_module = load_and_wrap  # type: ignore[method-assign]
        return spec


def _paced(run_batch: Callable[..., Any]) -> Callable[..., Any]:
    before = 0.0  # when the step before ended
    log = None

    @functools.wraps(run_batch)
    def paced(scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal before, log
        if log is None:
            _LOG.mkdir(parents=True, exist_ok=True)
            log = (_LOG / f"{os.getpid()}.txt").open("a", buffering=1)
        began = time.monotonic() if scheduler._sched_idled else before
        kind, count = "decode" if batch.forward_mode.is_decode() else "prefill", len(batch.reqs)
        result = run_batch(scheduler, batch, *args, **kwargs)
        if kind == "decode":
            time.sleep(max(0.0, began + _STEP_SECONDS - time.monotonic()))
        before = time.monotonic()
        log.write(f"{began:.4f} {before:.4f} {kind} {count}\n")
        return result

    return paced


def _run_next() -> None:
    """Run the sitecustomize that this one hides: the project's own, for servers on a CPU."""
    here = Path(__file__).resolve()
    for folder in sys.path:
        other = Path(folder) / "sitecustomize.py"
        if other.is_file() and other.resolve() != here:
            kept.append(runpy.run_path(str(other)))
            return


kept: list[Any] = []  # what it defines must live as long as the process
_run_next()
sys.meta_path.insert(0, _BeforeScheduler())
