"""Every difference between cuda and cpu: device, backend, timers, memory, and the shim that lets Megatron-Core run on a
CPU.

The device is chosen once, at import: a visible GPU, unless MEGATRON_RL_DEVICE=cpu asks for the CPU.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import re
import resource
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import torch
from torch.multiprocessing import reductions

from megatron_rl.errors import UserError

ON_GPU: bool = os.environ.get("MEGATRON_RL_DEVICE", "") != "cpu" and torch.cuda.is_available()
BACKEND: str = "nccl" if ON_GPU else "gloo"
_local_rank = 0
# torch.compile of Megatron's fused pointwise functions needs a C++ compiler on a CPU and gains nothing there
if not ON_GPU:
    os.environ["TORCHDYNAMO_DISABLE"] = "1"


def device() -> torch.device:
    """Return where this process keeps its tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if ON_GPU else torch.device("cpu")


def set_local_device(local_rank: int) -> None:
    """Bind the process to its GPU; on a CPU, to one thread unless OMP_NUM_THREADS says more (ranks share the cores)."""
    global _local_rank
    _local_rank = local_rank
    if ON_GPU:
        torch.cuda.set_device(local_rank)
    else:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def use_local_device() -> None:
    """Bind a new thread to the process's GPU, which CUDA keeps per thread."""
    if ON_GPU:
        torch.cuda.set_device(_local_rank)


def synchronize() -> None:
    """Wait for the device, so that wall-clock phases mean what they say."""
    if ON_GPU:
        torch.cuda.synchronize()


def local_gpus() -> int:
    """GPUs that this process sees."""
    return torch.cuda.device_count() if ON_GPU else 0


def gpu_memory() -> tuple[str, int, int]:
    """(name, free bytes, all bytes) of this process's GPU; call it where ON_GPU."""
    return (torch.cuda.get_device_name(), *torch.cuda.mem_get_info())


def memory_bytes() -> int:
    """All memory that this rank may count on: its GPU's, or its share of the machine's among the ranks there."""
    if ON_GPU:
        return gpu_memory()[2]
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return machine // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def gpu_versions() -> dict[str, str]:
    """Versions of the libraries under torch; empty on a CPU."""
    if not ON_GPU:
        return {}
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return {"CUDA": str(torch.version.cuda), "NCCL": nccl}


# for another interpreter: prints what gpu_versions calls NCCL
NCCL_VERSION_CODE = "import torch; print('.'.join(map(str, torch.cuda.nccl.version())))"


def peak_memory_bytes() -> int:
    """Peak device memory allocated by torch, or peak resident memory of the process on a CPU."""
    if ON_GPU:
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# What profiling asks of a device.


def mark() -> Any:
    """A moment of device time, for `seconds_between`: an event on the current stream, or on a CPU the seconds of
    processor time that all threads of the process have used."""
    if not ON_GPU:
        return time.process_time()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Any, end: Any) -> float:
    """Device seconds between two marks that the device has passed (`synchronize` after the second): on a GPU gaps
    count, on a CPU several threads count several times and waiting does not."""
    return start.elapsed_time(end) / 1e3 if ON_GPU else end - start


def reset_peak() -> None:
    """Begin a new measurement of `peak_since_reset`; `peak_memory_bytes` begins anew as well."""
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # proc(5): resets the peak resident set size to the present one


def peak_since_reset() -> int:
    """Bytes: most device memory that torch had allocated, or most resident memory of the process on a CPU."""
    if ON_GPU or sys.platform != "linux":
        return peak_memory_bytes()
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def push_range(name: str) -> None:
    """Open an NVTX range, which nsys shows; nothing on a CPU."""
    if ON_GPU:
        torch.cuda.nvtx.range_push(name)


def pop_range() -> None:
    """Close the innermost range."""
    if ON_GPU:
        torch.cuda.nvtx.range_pop()


def profiler_activities() -> list[torch.profiler.ProfilerActivity]:
    """Return what torch's profiler shall record."""
    activities = torch.profiler.ProfilerActivity
    return [activities.CPU, activities.CUDA] if ON_GPU else [activities.CPU]


def record_memory_history() -> None:
    """Let torch remember from here on where device memory was allocated, for `save_memory_snapshot`; nothing on a
    CPU."""
    if ON_GPU:
        torch.cuda.memory._record_memory_history(max_entries=100_000)


def save_memory_snapshot(path: Path) -> None:
    """Write what pytorch.org/memory_viz reads, and stop remembering; nothing on a CPU."""
    if ON_GPU:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
        torch.cuda.memory._record_memory_history(enabled=None)


_GEMM_SIZE, _GEMM_REPEATS = 1024, 5


def name() -> str:
    """Return the device's name."""
    return torch.cuda.get_device_name() if ON_GPU else f"CPU, {torch.get_num_threads()} threads a process"


def measured_flops(dtype: torch.dtype) -> tuple[float, str]:
    """Return the FLOP/s that a CPU process reaches, the best of a few matrix products beside whatever else runs on its
    cores at that moment, and a text that says so."""
    a = torch.ones(_GEMM_SIZE, _GEMM_SIZE, dtype=dtype)
    seconds = []
    for _ in range(_GEMM_REPEATS):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return 2 * _GEMM_SIZE**3 / min(seconds), f"best of {_GEMM_REPEATS} matrix products of {_GEMM_SIZE} rows"


def visible_devices(indices: Sequence[int]) -> dict[str, str]:
    """Environment of a process that shall see these GPUs alone, counted among those that this process sees; an empty
    value removes a variable.

    Expandable segments cannot be shared between processes, which colocated engines need; a single hardware queue is for
    Megatron's overlap alone.
    Raises: UserError when there are fewer GPUs.
    """
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if names == [""]:
        names = [str(index) for index in range(torch.cuda.device_count())]
    if max(indices) >= len(names):
        raise UserError(
            f"an engine server needs GPU {max(indices)}, and {len(names)} are visible, counted from 0; lower the "
            "trainer's ranks, rollout.server.count or .tp, or share the GPUs (rollout.weight_sync.mode=colocated)"
        )
    chosen = ",".join(names[index].strip() for index in indices)
    removed = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "CUDA_DEVICE_MAX_CONNECTIONS")
    return {"CUDA_VISIBLE_DEVICES": chosen, **dict.fromkeys(removed, "")}


def portable_handle(reduced: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return torch's (function, arguments) that rebuild a tensor elsewhere, with a GPU named by its UUID: torch names
    it by a number that means another GPU to a reader. Source: sglang.srt.utils.patch_torch."""
    rebuild, arguments = reduced
    if rebuild is not reductions.rebuild_cuda_tensor:
        return reduced
    return rebuild, (*arguments[:6], str(torch.cuda.get_device_properties(arguments[6]).uuid), *arguments[7:])


def collect_shared(*, give_back: bool = False) -> None:
    """Take back device memory that other processes have read: torch would wait until there is none. `give_back`: to
    the device, with all that torch holds without use."""
    if ON_GPU:
        torch.cuda.ipc_collect()
        if give_back:
            torch.cuda.empty_cache()


def cpu_cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


def vocab_kernels(logits: torch.Tensor) -> ModuleType:
    """Return who computes vocabulary statistics of these logits: Triton's kernels on a GPU, their torch twins on a CPU.

    Raises: UserError on a GPU without Triton, which torch's builds for GPUs bring along.
    """
    if not logits.is_cuda:
        from megatron_rl.kernels import vocab_torch

        return vocab_torch
    try:
        from megatron_rl.kernels import vocab_triton
    except ModuleNotFoundError as error:
        raise UserError(
            f"the GPU's kernels need Triton ({error}); install the release that your torch names"
        ) from error
    return vocab_triton


def vocab_pad_multiple() -> int:
    """The padded vocabulary is a multiple of this times the tensor-parallel size (tensor cores like 128 columns)."""
    return 128 if ON_GPU else 1


def row_multiple() -> int:
    """Packing rounds the tokens of a rank's micro-batch up to a multiple of it, see kernels/linear_cpu.py."""
    from megatron_rl.kernels import linear_cpu

    return 1 if ON_GPU else linear_cpu.ROWS


def fast_linear_layers(model: torch.nn.Module) -> None:
    """Let a model that only infers take, on a CPU, the matrix products of kernels/linear_cpu.py."""
    if not ON_GPU:
        from megatron_rl.kernels import linear_cpu

        linear_cpu.use_in(model)


def transformer_config_options() -> dict[str, Any]:
    """Options of Megatron's TransformerConfig that depend on the device."""
    if ON_GPU:
        return {"bias_activation_fusion": True, "bias_dropout_fusion": True, "masked_softmax_fusion": True}
    return {
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
    }


def prepare_megatron() -> None:
    """Make `megatron.core` importable and runnable here; call before its first import. Does nothing on CUDA.

    Raises: RuntimeError when megatron.core was imported before, unprepared.
    """
    if ON_GPU or any(isinstance(finder, _MegatronFinder) for finder in sys.meta_path):
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "megatron.core was imported before device.prepare_megatron(); import megatron_rl.policy first"
        )
    sys.meta_path.insert(0, _MegatronFinder())
    for message in _EXPECTED_ON_CPU:
        warnings.filterwarnings("ignore", message=message)


# What Megatron says on every CPU run and nobody can act on. On a GPU a fallback is worth a warning, so nothing is
# hidden there.
_EXPECTED_ON_CPU = (
    r"(Transformer Engine and )?Apex (is|are) not installed",
    r"full scope is deprecated",
    r"When using async grad allreduce",
    r"`sequence_parallel` is set to `True`, but tensor model parallel size is 1",  # experts that stay whole
    r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",
    r"The \.grad attribute of a Tensor that is not a leaf",
)

# Megatron-Core 0.16.1 names CUDA literally. On a CPU its source is rewritten while it is imported: nothing in torch is
# patched, so transformers and the engines in the same process see an untouched torch. Each row: what it says, what a
# CPU needs.
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"torch\.cuda\.current_device\(\)", 'torch.device("cpu")'),
        (r"""device=(["'])cuda\1""", 'device="cpu"'),
        (r"""\.init_data\((["'])cuda\1\)""", '.init_data("cpu")'),
        (r"'torch\.cuda\.(Float|Half|BFloat16)Tensor'", r"'torch.\1Tensor'"),  # optimizer, clip_grads: type checks
        (r"torch\.cuda\.(Float|Half|BFloat16)Tensor\b", r"torch.\1Tensor"),
        (r"\.cuda\(\)", ".cpu()"),
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
_NULL = '''
class _cpu_null:
    """Stands for a stream or an event: every method does nothing."""
    def __init__(self, *args, **kwargs): pass
    def __enter__(self): return self
    def __exit__(self, *args): pass
    def elapsed_time(self, other): return 0.0
    def __getattr__(self, name): return lambda *args, **kwargs: self
'''


class _MegatronLoader(importlib.machinery.SourceFileLoader):
    def path_stats(self, path: str) -> Any:
        raise OSError  # neither read nor write .pyc: the cache would outlive the rewrite

    def source_to_code(self, data: Any, path: Any, **options: Any) -> CodeType:  # type: ignore[override]
        source = data.decode()
        for pattern, replacement in _REWRITES:
            source = pattern.sub(replacement, source)
        if self.name == _HOST_OPTIMIZER:
            for text, replacement in _HOST_OPTIMIZER_REWRITES.items():
                source = source.replace(text, replacement)
        if "_cpu_null" in source:
            source += _NULL  # appended, so that line numbers in tracebacks stay true
        for kernels in ("linear_cpu", "swiglu_cpu"):
            if f"_{kernels}" in source:
                source += f"\nfrom megatron_rl.kernels import {kernels} as _{kernels}\n"
        if self.name == "megatron.core.transformer.moe.moe_utils" and "te_general_gemm" in source:
            source += "\nte_general_gemm = None\n"  # 0.16.1 reads a name that is bound only when TE imports
        return super().source_to_code(source.encode(), path, **options)


class _MegatronFinder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if not name.startswith("megatron.core") or "megatron_fsdp" in name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _MegatronLoader(spec.loader.name, spec.loader.path)
        return spec
