"""Megatron-Core on a CPU: its source, which names CUDA literally, is rewritten while it is imported. Nothing in torch
is patched, so transformers and the engines in the same process see an untouched torch."""

import importlib.abc
import importlib.machinery
import re
import sys
import warnings
from pathlib import Path
from types import CodeType
from typing import Any

import yaml

_STATED = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in _STATED["cpu"]]
_REHEARSED = [(re.compile(pattern), replacement) for pattern, replacement in _STATED["rehearsal"]]
_HOST_OPTIMIZER = "megatron.core.optimizer.cpu_offloading.hybrid_optimizer"
_NULL = '''
class _cpu_null:
    """Stands for a stream or an event: every method does nothing."""
    def __init__(self, *args, **kwargs): pass
    def __enter__(self): return self
    def __exit__(self, *args): pass
    def elapsed_time(self, other): return 0.0
    def __getattr__(self, name): return lambda *args, **kwargs: self
'''


def _of_rehearsal() -> list[tuple[re.Pattern[str], str]]:
    """Return the rows for a GPU that is not there: products and activations stay Megatron's own."""
    of_device = [(pattern, text.replace('"cpu"', '"cpu:0"')) for pattern, text in REWRITES if "_cpu." not in text]
    return _REHEARSED + of_device


class _MegatronLoader(importlib.machinery.SourceFileLoader):
    rehearses = False

    def path_stats(self, path: str) -> Any:
        raise OSError  # neither read nor write .pyc: the cache would outlive the rewrite

    def source_to_code(self, data: Any, path: Any, **options: Any) -> CodeType:  # type: ignore[override]
        source = data.decode()
        for pattern, replacement in _of_rehearsal() if self.rehearses else REWRITES:
            source = pattern.sub(replacement, source)
        if self.name == _HOST_OPTIMIZER and not self.rehearses:
            for text, replacement in _STATED["host_optimizer"]:
                source = source.replace(text, replacement)
        if "_cpu_null" in source:
            source += _NULL  # appended, so that line numbers in tracebacks stay true
        for kernels in ("linear_cpu", "swiglu_cpu"):
            if f"_{kernels}" in source:
                source += f"\nfrom megatron_rl.kernels import {kernels} as _{kernels}\n"
        return super().source_to_code(source.encode(), path, **options)


class _MegatronFinder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if not name.startswith("megatron.core") or "megatron_fsdp" in name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _MegatronLoader(spec.loader.name, spec.loader.path)
        return spec


def install(*, rehearses: bool = False) -> None:
    """Rewrite all that is imported of `megatron.core` from here on; a second call does nothing. `rehearses`: for
    tensors without values, on a device that is not there.

    Raises: RuntimeError when megatron.core was imported before.
    """
    if any(isinstance(finder, _MegatronFinder) for finder in sys.meta_path):
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "megatron.core was imported before device.prepare_megatron(); import megatron_rl.policy first"
        )
    _MegatronLoader.rehearses = rehearses
    sys.meta_path.insert(0, _MegatronFinder())
    # found, it would give Megatron its Adam, which runs on GPUs alone
    sys.modules.setdefault("transformer_engine", None)  # type: ignore[arg-type]
    for message in _STATED["expected_warnings"]:
        warnings.filterwarnings("ignore", message=message)
