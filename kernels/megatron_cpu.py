"""Megatron-Core on a CPU: its source, which names CUDA literally, is rewritten while it is imported. Nothing in torch
is patched, so transformers and the engines in the same process see an untouched torch."""

import importlib.abc
import importlib.machinery
import re
import sys
import warnings
from types import CodeType
from typing import Any

# What Megatron says on every CPU run and nobody can act on. On a GPU a fallback is worth a warning, so nothing is
# hidden there.
_EXPECTED_ON_CPU = (
    r"(Transformer Engine and )?Apex (is|are) not installed",
    r"full scope is deprecated",
    r"When using async grad allreduce",
    r"`sequence_parallel` is set to `True`, but tensor model parallel size is 1",  # experts that stay whole
    r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",
    r"The \.grad attribute of a Tensor that is not a leaf",
    r"TypedStorage is deprecated",  # its freeing of gradients
)

# Each row: what Megatron-Core 0.16.1 says, what a CPU needs.
REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"torch\.cuda\.current_device\(\)", 'torch.device("cpu")'),
        (r"""device=(["'])cuda\1""", 'device="cpu"'),
        (r"""\.init_data\((["'])cuda\1\)""", '.init_data("cpu")'),
        (r"'torch\.cuda\.(Float|Half|BFloat16)Tensor'", r"'torch.\1Tensor'"),  # optimizer, clip_grads: type checks
        (r"torch\.cuda\.(Float|Half|BFloat16)Tensor\b", r"torch.\1Tensor"),
        (r"\.cuda\(\)", '.to("cpu")'),
        (r"torch\.cuda\.(synchronize|empty_cache)\(\)", "None"),
        (r"torch\.cuda\.device_count\(\)", "1"),  # async_utils: rank % device_count
        (r"torch\.cuda\.manual_seed", "torch.manual_seed"),
        (r"torch\.cuda\.(random\.)?get_rng_state\((device=device)?\)", "torch.get_rng_state()"),
        (r"_lazy_call\(cb\)", "torch.set_rng_state(new_state)"),  # tensor_parallel/random.py: _set_cuda_rng_state
        (r"jit_fuser = torch\.compile", "jit_fuser = noop_decorator"),
        (r"torch\.cuda\.(Stream|Event)\(", r"_cpu_null("),
        (r"torch\.cuda\.(current_stream|default_stream)\(\)", "_cpu_null()"),
        (r"torch\.cuda\.stream\(", "_cpu_null("),
        (r"tensor\.is_cuda:\n(\s+cpu_tensor)", r"True:\n\1"),  # moe_utils: split sizes become numpy
        # utils.py: a viewless tensor is its input's kind; a norm waits for no number, as that of Transformer Engine
        (r"torch\.empty\(\(1,\), dtype=inp\.dtype, device=inp\.device", "inp.new_empty((1,)"),
        (r"torch\.norm\(torch\.tensor\(l2\)\)", "torch.linalg.vector_norm(torch.stack(l2[0]))"),
        (r"torch\.tensor\(\[float\(l2_reduced\)\][^)]*\)", "l2_reduced.reshape(1)"),
        # tensor_parallel/layers.py: the products of a linear layer, see kernels/linear_cpu.py
        (r"torch\.matmul\((total_input), weight\.t\(\)\)", r"_linear_cpu.linear(\1, weight)"),
        (r"grad_output\.matmul\(weight\)", "_linear_cpu.input_gradient(grad_output, weight)"),
        (r"grad_output\.t\(\)\.matmul\(total_input\)", "_linear_cpu.weight_gradient(grad_output, total_input)"),
        # transformer/mlp.py: build.py takes silu alone, and no clamp or offset
        (r"= glu\((intermediate_parallel)\)", r"= _swiglu_cpu.swiglu(\1)"),
    ]
]
# of its optimizer on the host, which asks each weight where it is: on a CPU all begin as if on a GPU
_HOST_OPTIMIZER = "megatron.core.optimizer.cpu_offloading.hybrid_optimizer"
_HOST_OPTIMIZER_REWRITES = {
    "for param in params if param.is_cuda": "for param in params",
    "param.is_cuda": "not cpu_copy",
    ".cpu().pin_memory()": ".cpu()",
    '.to("cuda")': '.to("cpu")',
}
# A rehearsal's tensors have no values; its device is the second name of a CPU, see device.device. Each row: what
# Megatron-Core 0.16.1 says, what says the same to such tensors or allocates what a GPU's kernel would.
_REHEARSED = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"jit_fuser = torch\.compile", "from megatron_rl.kernels.standins import fused as jit_fuser"),
        (r'\.to\("cuda"\)', '.to("cpu:0")'),
        (r"validate_sharding_integrity\(determine_global\w+\(\w+\)\[1\]\)", "None"),  # the other ranks' are not there
        (r"(?<!not )\b([pv]|param|tensor)\.is_cuda", r"(\1.device.index == 0)"),
        (r"not ([pv])\.is_cuda", r"\1.device.index != 0"),
    ]
]
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
            for text, replacement in _HOST_OPTIMIZER_REWRITES.items():
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
    for message in _EXPECTED_ON_CPU:
        warnings.filterwarnings("ignore", message=message)
