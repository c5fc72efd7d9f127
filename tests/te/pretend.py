"""Pretend that this process has eight H100s and is a rank of a world: torch.cuda's questions are answered, all tensors
are fake, and no collective sends anything. Import it before anything of megatron_rl."""

from __future__ import annotations

import contextlib
import os
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch._subclasses.fake_tensor as fake_tensor
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

_PROPERTIES = types.SimpleNamespace(
    major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30, name="NVIDIA H100 80GB HBM3"
)
_RNG_STATE = torch.zeros(16, dtype=torch.uint8)


class _Null:
    """Stands for a stream or an event: every method does nothing and returns it."""

    cuda_stream = stream_id = device_index = 0
    device_type, device = 1, torch.device("cuda", 0)

    def __init__(self, *_: Any, **__: Any) -> None:
        self.stream = self

    def __enter__(self) -> _Null:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: self


def _answers(value: Any) -> Any:
    return lambda *_, **__: value


def _no_context(*_: Any, **__: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


cuda: Any = torch.cuda
for name, answer in {
    "is_available": True, "is_initialized": True, "is_bf16_supported": True, "current_device": 0, "device_count": 8,
    "get_device_capability": (9, 0), "get_device_properties": _PROPERTIES, "get_device_name": _PROPERTIES.name,
    "mem_get_info": (79 * 2**30, 80 * 2**30), "memory_allocated": 0, "max_memory_allocated": 0,
    "get_rng_state": _RNG_STATE,
}.items():  # fmt: skip
    setattr(cuda, name, _answers(answer))
for name in (
    "set_device set_stream set_rng_state synchronize empty_cache manual_seed manual_seed_all _lazy_call _lazy_init"
).split():
    setattr(cuda, name, _answers(None))
cuda.Stream = cuda.Event = _Null
cuda.current_stream = cuda.default_stream = _Null
cuda.stream = cuda.device = _no_context
cuda.random.get_rng_state = cuda.get_rng_state
cuda.nccl.version = _answers((2, 30, 7))
torch._C._cuda_isCurrentStreamCapturing = _answers(False)  # type: ignore[attr-defined]
for name in ("init_gpu_context", "init_cuda_context"):
    if hasattr(fake_tensor, name):
        setattr(fake_tensor, name, _answers(None))
torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign, assignment]

_new_group, _tensor = dist.new_group, torch.tensor


def _fake_group(
    ranks: Any = None, timeout: Any = None, backend: Any = None, pg_options: Any = None, **options: Any
) -> Any:
    kept = {name: value for name, value in options.items() if name in ("use_local_synchronization", "group_desc")}
    return _new_group(ranks, backend="fake", **kept)


def _same_objects(out: list[Any], value: Any, group: Any = None) -> None:
    out[:] = [value] * len(out)


def _tensor_on(data: Any, *args: Any, device: Any = None, **options: Any) -> torch.Tensor:
    """torch.tensor would copy its data to the device that is not there."""
    if device is None or (not isinstance(device, int) and torch.device(device).type != "cuda"):
        return _tensor(data, *args, device=device, **options)
    like = _tensor(data, *args, device="cpu", **options)
    return torch.empty(like.shape, dtype=like.dtype, device="cuda")


for module in (dist, dist.distributed_c10d):
    module.new_group = _fake_group  # type: ignore[attr-defined]
    module.all_gather_object = _same_objects  # type: ignore[attr-defined]
torch.tensor = _tensor_on  # type: ignore[assignment]


def join_world(rank: int, size: int) -> None:
    """Be rank `rank` of `size`, eight to a node."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank % 8), "LOCAL_WORLD_SIZE": "8"}
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    from megatron_rl.parallel import world

    world.host_group = lambda group, *_: group  # which ranks it holds would be gathered


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Make every tensor fake: a shape, a dtype and a device without memory."""
    import megatron.core.extensions.transformer_engine as engine
    import megatron.core.tensor_parallel.random as random

    for tracker in (random.CudaRNGStatesTracker, engine.TECudaRNGStatesTracker):
        tracker.fork = _no_context
    # it would give parameters new tensors; their dtypes are checked instead
    torch.nn.Module.bfloat16 = lambda self: self  # type: ignore[method-assign]
    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        yield
