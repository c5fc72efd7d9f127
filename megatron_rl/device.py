"""Every difference between cuda and cpu: device, backend, timers, memory; kernels/megatron_cpu.py lets Megatron-Core
run on a CPU.

The device is chosen once, at import: a visible GPU, unless MEGATRON_RL_DEVICE=cpu asks for the CPU, or =rehearsal:BYTES
for a GPU of so much memory that is not there (rehearse/). Other facts follow from it, each with a name of its own:

- `ON_GPU`: the kind of device, and nothing else; `REHEARSES`: it is not there, and tensors have no values.
- `layers`: whose layers a model gets. Torch's rotate queries and keys themselves.
- `has_transformer_engine`: whose Adam Megatron takes, and so what a checkpoint keeps of it.
- `flash_attention`: who computes the attention of torch's layers.
- `row_multiple`: what packing rounds the tokens of a micro-batch to.
"""

import functools
import importlib.util
import inspect
import math
import mmap
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing import reductions

from megatron_rl.errors import UserError

# before CUDA starts: Megatron overlaps tensor parallelism only where kernels start in the order of their calls
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
_KIND, _, _REHEARSED_BYTES = os.environ.get("MEGATRON_RL_DEVICE", "").partition(":")
REHEARSES: bool = _KIND == "rehearsal"
ON_GPU: bool = REHEARSES or (_KIND != "cpu" and torch.cuda.is_available())
BACKEND: str = "nccl" if ON_GPU else "gloo"
_TILE_ROWS = 128
_BUILD_ENGINE = "`make gpu` installs it, compiled against this torch;"
_DRIVER_FILE = Path("/proc/driver/nvidia/version")
_LEAST_DRIVERS = {"12": 525, "13": 580}  # by CUDA's major release; source: its release notes
_local_rank = 0
# torch.compile of Megatron's fused pointwise functions needs a C++ compiler on a CPU and gains nothing there
if REHEARSES or not ON_GPU:
    os.environ["TORCHDYNAMO_DISABLE"] = "1"


def _has_cuda() -> bool:
    return ON_GPU and not REHEARSES


def device() -> torch.device:
    """Return where this process keeps its tensors."""
    if REHEARSES:
        return torch.device("cpu", 0)  # torch tells it from "cpu", the host, in tensors without values
    return torch.device("cuda", torch.cuda.current_device()) if _has_cuda() else torch.device("cpu")


def set_local_device(local_rank: int) -> None:
    """Bind the process to its GPU; on a CPU, to one thread unless OMP_NUM_THREADS says more (ranks share the cores)."""
    global _local_rank
    _local_rank = local_rank
    if _has_cuda():
        torch.cuda.set_device(local_rank)
    else:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def use_local_device() -> None:
    """Bind a new thread to the process's GPU, which CUDA keeps per thread."""
    if _has_cuda():
        torch.cuda.set_device(_local_rank)


def synchronize() -> None:
    """Wait for the device, so that wall-clock phases mean what they say."""
    if _has_cuda():
        torch.cuda.synchronize()


def local_gpus() -> int:
    """GPUs that this process sees."""
    return torch.cuda.device_count() if _has_cuda() else 0


def gpu_memory() -> tuple[str, int, int]:
    """(name, free bytes, all bytes) of this process's GPU; call it where ON_GPU."""
    return (torch.cuda.get_device_name(), *torch.cuda.mem_get_info())


def memory_bytes() -> int:
    """All memory that this rank may count on: its GPU's, or its share of the machine's among the ranks there."""
    if ON_GPU:
        return int(_REHEARSED_BYTES) if REHEARSES else gpu_memory()[2]
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return machine // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def host_memory(count: int) -> torch.Tensor:
    """Return `[count]` bytes of the host's memory, which a GPU reads and writes without a copy in between.

    They are locked there until the process ends, and forked processes do not see them. (torch's pinned memory would be
    the next power of two.) Raises: CudaError when the system does not let a process lock so much.
    """
    if REHEARSES:
        return torch.empty(count, dtype=torch.uint8)
    pages = mmap.mmap(-1, count)
    pages.madvise(mmap.MADV_DONTFORK)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    if _has_cuda():
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), count, 0))
    return memory


def give_back_memory() -> None:
    """Let other processes have the device memory that torch keeps for its next tensors."""
    if _has_cuda():
        torch.cuda.empty_cache()


def gpu_versions() -> dict[str, str]:
    """Versions of the driver and of the libraries under torch; empty on a CPU."""
    if not _has_cuda():
        return {}
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return {"driver": _driver(), "CUDA": str(torch.version.cuda), "NCCL": nccl}


def _driver() -> str:
    """Return the version of the NVIDIA driver; empty where none is loaded."""
    text = _DRIVER_FILE.read_text() if _DRIVER_FILE.is_file() else ""
    match = re.search(r"Module.*?\s(\d+(?:\.\d+)+)", text)
    return match[1] if match else ""


def driver_faults() -> list[str]:
    """Return why this process cannot use the machine's GPUs though a driver is loaded; it would silently go on on CPUs.
    Empty where MEGATRON_RL_DEVICE=cpu asks for those."""
    driver, cuda = _driver(), torch.version.cuda
    if not driver or os.environ.get("MEGATRON_RL_DEVICE") == "cpu":
        return []
    if cuda is None:
        return [f"torch {torch.__version__} is a build for CPUs beside driver {driver}; or set MEGATRON_RL_DEVICE=cpu"]
    least = _LEAST_DRIVERS.get(cuda.split(".")[0], 0)
    if int(driver.split(".")[0]) < least:
        return [f"driver {driver} is too old for torch's CUDA {cuda}, which needs {least} or newer"]
    return []


# for another interpreter: prints what gpu_versions calls NCCL
NCCL_VERSION_CODE = "import torch; print('.'.join(map(str, torch.cuda.nccl.version())))"


def peak_memory_bytes() -> int:
    """Peak device memory allocated by torch, or peak resident memory of the process on a CPU."""
    if _has_cuda():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# What profiling asks of a device.


def mark() -> Any:
    """A moment of device time, for `seconds_between`: an event on the current stream, or on a CPU the seconds of
    processor time that all threads of the process have used."""
    if not _has_cuda():
        return time.process_time()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Any, end: Any) -> float:
    """Device seconds between two marks that the device has passed (`synchronize` after the second): on a GPU gaps
    count, on a CPU several threads count several times and waiting does not."""
    return start.elapsed_time(end) / 1e3 if _has_cuda() else end - start


def reset_peak() -> None:
    """Begin a new measurement of `peak_since_reset`; `peak_memory_bytes` begins anew as well."""
    if _has_cuda():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # proc(5): resets the peak resident set size to the present one


def peak_since_reset() -> int:
    """Bytes: most device memory that torch had allocated, or most resident memory of the process on a CPU."""
    if _has_cuda() or sys.platform != "linux":
        return peak_memory_bytes()
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def push_range(name: str) -> None:
    """Open an NVTX range, which nsys shows; nothing on a CPU."""
    if _has_cuda():
        torch.cuda.nvtx.range_push(name)


def pop_range() -> None:
    """Close the innermost range."""
    if _has_cuda():
        torch.cuda.nvtx.range_pop()


def profiler_activities() -> list[torch.profiler.ProfilerActivity]:
    """Return what torch's profiler shall record."""
    activities = torch.profiler.ProfilerActivity
    return [activities.CPU, activities.CUDA] if _has_cuda() else [activities.CPU]


def record_memory_history() -> None:
    """Let torch remember where device memory is allocated, for `save_memory_snapshot`; nothing on a CPU."""
    if _has_cuda():
        torch.cuda.memory._record_memory_history(max_entries=100_000)


def save_memory_snapshot(path: Path) -> None:
    """Write what pytorch.org/memory_viz reads, and stop remembering; nothing on a CPU."""
    if _has_cuda():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
        torch.cuda.memory._record_memory_history(enabled=None)


def name() -> str:
    """Return the device's name."""
    return torch.cuda.get_device_name() if _has_cuda() else f"CPU, {torch.get_num_threads()} threads a process"


def visible_devices(indices: Sequence[int]) -> dict[str, str]:
    """Environment of a process that shall see these GPUs alone, counted among those that this process sees; an empty
    value removes a variable.

    Expandable segments cannot be shared between processes, which colocated engines need; a single hardware queue is for
    Megatron's overlap alone.
    Raises: UserError when there are fewer GPUs.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(index) for index in range(torch.cuda.device_count())]
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
    if _has_cuda():
        torch.cuda.ipc_collect()
        if give_back:
            torch.cuda.empty_cache()


def vocab_kernels(logits: torch.Tensor) -> ModuleType:
    """Return who computes statistics of these logits: Triton's kernels on a GPU, on a CPU torch's, or stand-ins.

    Raises: UserError on a GPU without Triton, which torch's builds for GPUs bring along.
    """
    if not logits.is_cuda:
        from megatron_rl.kernels import standins, vocab_torch

        return standins if isinstance(logits, FakeTensor) else vocab_torch
    try:
        from megatron_rl.kernels import vocab_triton
    except ModuleNotFoundError as error:
        raise UserError(f"the GPU needs Triton ({error}); install the release that your torch names") from error
    return vocab_triton


def vocab_pad_multiple() -> int:
    """The padded vocabulary is a multiple of this times the tensor-parallel size (tensor cores like 128 columns)."""
    return 128 if ON_GPU else 1


def row_multiple(parts: int) -> int:
    """Packing rounds the tokens of a rank's micro-batch, a multiple of `parts`, up to a multiple of this times `parts`:
    on a GPU of 128, so that products have whole tiles and shapes come again, whose memory the allocator then has; on a
    CPU see kernels/linear_cpu.py."""
    from megatron_rl.kernels import linear_cpu

    return math.lcm(_TILE_ROWS, parts) // parts if ON_GPU else linear_cpu.ROWS


def decoding_multiple() -> int:
    """The embedded engine keeps a multiple of this many rows in a batch, see kernels/linear_cpu.py."""
    from megatron_rl.kernels import linear_cpu

    return 1 if ON_GPU else linear_cpu.ROWS


def fast_linear_layers(model: torch.nn.Module) -> None:
    """Let a Hugging Face model that only infers take, on a CPU, the matrix products of kernels/linear_cpu.py."""
    if not ON_GPU:
        from megatron_rl.kernels import linear_cpu

        linear_cpu.use_in(model)


def float32_activations(asked: str, dtype: torch.dtype) -> bool:
    """Return whether a bfloat16 model's activations are float32 here, where model.activations is `asked`."""
    return asked == "auto" and dtype == torch.bfloat16 and not ON_GPU


def float32_product(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return float32 `x @ weight.T`, into `out` if given; bfloat16 x `[T, K]` (float32 on a CPU), weight `[N, K]`."""
    if x.is_cuda or REHEARSES:  # an operator that torch has for CUDA alone, since 2.8
        return torch.mm(x, weight.t(), out_dtype=torch.float32, out=out)
    from megatron_rl.kernels import linear_cpu

    return linear_cpu.precise_product(x, weight, out)


def has_transformer_engine() -> bool:
    """Return whether Transformer Engine can run here. Megatron then takes its Adam, whichever layers the model has."""
    return _has_cuda() and importlib.util.find_spec("transformer_engine") is not None


def layers(asked: str) -> str:
    """Return whose layers a model gets, transformer_engine or torch; a rehearsal has torch's alone. `asked`:
    model.layers.

    Raises: UserError where Transformer Engine is asked for and cannot run.
    """
    able = has_transformer_engine()
    if REHEARSES:
        return "torch"
    if asked == "transformer_engine" and not able:
        lack = f"is not installed; {_BUILD_ENGINE}" if ON_GPU else "runs on GPUs alone, and this process has none;"
        raise UserError(f"model.layers=transformer_engine: Transformer Engine {lack} or set model.layers=torch")
    return ("transformer_engine" if able else "torch") if asked == "auto" else asked


@functools.cache
def flash_attention(dtype: torch.dtype) -> Callable[..., torch.Tensor] | None:
    """Return torch's own attention over packed sequences, `varlen_attn`; None where it does not run: on a CPU, on a GPU
    older than Ampere, in float32, in a torch whose own takes no grouped queries."""
    is_old = _has_cuda() and torch.cuda.get_device_capability() < (8, 0)
    if not ON_GPU or is_old or dtype not in (torch.bfloat16, torch.float16):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    attention: Callable[..., Any] = varlen_attn
    return attention if "enable_gqa" in inspect.signature(attention).parameters else None


def transformer_config_options(layers: str) -> dict[str, Any]:
    """Options of Megatron's TransformerConfig that depend on the device and on whose `layers` run there."""
    is_engine = layers == "transformer_engine"
    return {
        "use_cpu_initialization": not ON_GPU,
        "gradient_accumulation_fusion": False,  # apex's, in the output layer; see build.py for Transformer Engine's own
        "masked_softmax_fusion": is_engine,
        "bias_activation_fusion": ON_GPU,
        "bias_dropout_fusion": ON_GPU,
        "apply_rope_fusion": is_engine,  # else a loop over the sequences, with a wait for the device, in each layer
    }


def prepare_megatron() -> None:
    """Make `megatron.core` importable and runnable here; call before its first import.

    Raises: UserError when Transformer Engine is installed on a GPU and broken; RuntimeError when megatron.core was
    imported before, unprepared.
    """
    if has_transformer_engine():
        try:
            importlib.import_module("transformer_engine.pytorch")
        except Exception as error:
            raise UserError(
                f"Transformer Engine is installed and cannot be imported: {type(error).__name__}: {error}\n"
                f"It must be compiled against the torch beside it: {_BUILD_ENGINE} or uninstall it"
            ) from error
    if not _has_cuda():
        from megatron_rl.kernels import megatron_cpu

        megatron_cpu.install(rehearses=REHEARSES)
