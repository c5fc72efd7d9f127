"""A run on a CPU that books which tensors would live on a GPU: device "cpu:0" stands for the GPU, "cpu" for the host.

Two modes see what torch does. The dispatch mode gives every storage a place: that of the device which an operator was
asked for, or else of the operator's inputs. It notes operands in two places, and tensors in a collective of the wrong
kind. The function mode, above autograd, does what no operator shows: `.to` and `.cpu` between two names of one memory,
`.tolist` and `.numpy`. Views share a storage and so a place, also behind `parameter.data = ...`.

What it cannot see: threads other than the run's, whose tensors count as the host's, and code inside operators.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_rl.rehearse.frames import frames, place

ROOT = f"{Path(__file__).resolve().parent.parent}/"
DEVICE = torch.device("cpu", 0)  # the GPU's name here

aten = torch.ops.aten
_COPIES = {"copy_", "_to_copy", "_foreach_copy_"}  # between devices, as they should
_INDEXES = {"index", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
_TAKES_HOST_SCALARS = _INDEXES | {"masked_fill", "masked_fill_", "fill", "fill_", "_unsafe_masked_index"}
# the host waits for what these find on the device: a value, or how large their result is
_READS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "histc", "repeat_interleave", "allclose",
}  # fmt: skip
_SIGNALS = {"barrier", "monitored_barrier_"}  # their tensor is a dummy


@dataclass
class Book:
    """What was seen: how often, by the function where it happened."""

    faults: Counter[str] = field(default_factory=Counter)  # "what @ function"
    reads: Counter[str] = field(default_factory=Counter)  # "file function" in which the host waits for the device
    objects: Counter[str] = field(default_factory=Counter)  # "file function" that sends Python objects over NCCL

    def fault(self, what: str) -> None:
        """Note what a GPU would refuse."""
        self.faults[f"{what} @ {place()}"] += 1

    def read(self) -> None:
        """Note that the host waits for the device, if it happens in a step."""
        if any(frame.f_code.co_name == "run_step" for frame in frames()):
            self.reads[place()] += 1


def _is_on_device(tensor: Tensor) -> bool:
    if isinstance(tensor, ShardedTensor):  # has no storage of its own
        return False
    return getattr(tensor.untyped_storage(), "lives_on_device", False)


def _put(value: Any, on_device: bool) -> Any:
    for tensor in tree_leaves(value):
        if isinstance(tensor, Tensor):
            tensor.untyped_storage().lives_on_device = on_device  # type: ignore[attr-defined]
    return value


def _names_device(device: Any) -> bool | None:
    """Tell whether an argument names the device (True), the host (False) or no place (None)."""
    if isinstance(device, str) and device.partition(":")[0] == "cpu":
        device = torch.device(device)
    return device.index == DEVICE.index if isinstance(device, torch.device) and device.type == "cpu" else None


class _Operators(TorchDispatchMode):
    def __init__(self, book: Book, functions: _Functions) -> None:
        super().__init__()
        self.book, self.functions = book, functions

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._overloadpacket.__name__
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        places = [_is_on_device(tensor) for tensor in tensors]
        if func.namespace in ("c10d", "_c10d_functional"):
            if name not in _SIGNALS:
                self._check_collective(name, leaves, places)
        elif name not in _COPIES:
            self._check_operands(func, name, args, tensors, places)
        elif name != "_to_copy" and not places[0] and any(places):
            self.book.read()
        if any(places) and name in _READS and not (name == "repeat_interleave" and kwargs.get("output_size")):
            self.book.read()
        if name in _INDEXES and places[0] and self._counts_a_mask(name, args):
            self.book.read()
        out = func(*args, **kwargs)
        # autograd's C++ names the one kind of memory that there is here; what it makes is of gradients, on the device
        by_autograd = not tensors and self.functions.depth == 0
        place = any(places) or by_autograd or bool(_names_device(kwargs.get("device")))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and not hasattr(tensor.untyped_storage(), "lives_on_device"):
                _put(tensor, place)
        return out

    @staticmethod
    def _counts_a_mask(name: str, args: Any) -> bool:
        """Tell whether an indexing operator must first count a mask on the device; with one value it fills instead."""
        if "put" in name and args[2].numel() == 1:
            return False
        return any(index is not None and index.dtype == torch.bool and _is_on_device(index) for index in args[1])

    def _check_operands(self, func: Any, name: str, args: Any, tensors: list[Tensor], places: list[bool]) -> None:
        if all(places) or not any(places):
            return
        if name in _INDEXES and places[0]:  # indices may come from the host
            values = [args[2]] if "put" in name else []
            tensors, places = [args[0], *values], [True, *map(_is_on_device, values)]
        scalars_may_differ = torch.Tag.pointwise in func.tags or name in _TAKES_HOST_SCALARS
        changed = func._schema.is_mutable and not places[0]  # a result cannot be written to the host
        strays = [t for t, on_device in zip(tensors, places, strict=True) if not on_device]
        whole = [t for t, on_device in zip(tensors, places, strict=True) if on_device and t.dim()]
        fits = scalars_may_differ and not changed and (whole or places[0]) and not any(t.dim() for t in strays)
        if strays and not fits:
            self.book.fault(f"{name} of device and host tensors")

    def _check_collective(self, name: str, leaves: list[Any], places: list[bool]) -> None:
        groups = [_group_name(leaf) for leaf in leaves]
        group = next((name for name in groups if name), "")
        if group in _HOST_GROUPS and any(places):
            self.book.fault(f"{name} of a device tensor over gloo")
        elif group not in _HOST_GROUPS and not all(places):
            self.book.fault(f"{name} of a host tensor over NCCL")


_HOST_GROUPS: set[str] = set()  # names of the groups that were made for gloo; all others are NCCL's on a GPU


def _group_name(value: Any) -> str:
    if isinstance(value, torch.ScriptObject):
        with contextlib.suppress(RuntimeError):
            return ProcessGroup.unbox(value).group_name
    return value if isinstance(value, str) else ""


class _Functions(TorchFunctionMode):
    def __init__(self, book: Book) -> None:
        super().__init__()
        self.book = book
        self.depth = 0  # of Python's calls of torch; 0 while autograd calls operators of its own

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, torch._ops.OpOverload):  # the dispatch mode's own call
            return func(*args, **(kwargs or {}))
        self.depth += 1
        try:
            return self._call(func, args, kwargs or {})
        finally:
            self.depth -= 1

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":
            out = func(*args, **kwargs)
            return DEVICE if isinstance(out, torch.device) and _is_on_device(args[0]) else out
        if name in ("cpu", "to"):
            return self._move(name, func, args, kwargs)
        if name in ("numpy", "__array__") and _is_on_device(args[0]):
            self.book.fault("numpy() of a device tensor")
        if name == "tolist" and _is_on_device(args[0]):
            self.book.read()
        if name in ("tensor", "as_tensor", "asarray", "new_tensor"):
            on_device = _names_device(kwargs.pop("device", None))
            out = func(*args, **kwargs)
            if name == "new_tensor" and on_device is None:
                on_device = _is_on_device(args[0])
            elif isinstance(args[0], Tensor):
                return out if on_device is None else out.to(DEVICE if on_device else "cpu")
            return _put(out, bool(on_device))
        out = func(*args, **kwargs)
        if _names_device(kwargs.get("device")) is False and args and isinstance(args[0], Tensor):  # x.new_zeros(...)
            _put(out, False)
        return out

    def _move(self, name: str, func: Any, args: Any, kwargs: Any) -> Tensor:
        """Copy between the two places, which for torch are one memory."""
        asked = False if name == "cpu" else None
        for value in [*args[1:], *kwargs.values()]:
            place = _is_on_device(value) if isinstance(value, Tensor) else _names_device(value)
            asked = asked if place is None else place
        here = _is_on_device(args[0])
        out: Tensor = func(*args, **kwargs)
        if asked is None or asked == here:
            return out
        if here:
            self.book.read()
        if out.untyped_storage()._cdata == args[0].untyped_storage()._cdata:
            out = out.clone()
        return _put(out, asked)


def _is_saving() -> bool:
    """Tell whether torch.save pickles, which writes device tensors with their place."""
    return any(frame.f_code.co_filename.endswith("torch/serialization.py") for frame in frames())


@contextlib.contextmanager
def booked(book: Book) -> Iterator[None]:
    """Note in `book` what the block does with tensors. `install` must have been called."""
    run_backward, reduce_tensor = torch.autograd._engine_run_backward, Tensor._reduce_ex_internal

    def pickled(tensor: Tensor, protocol: int) -> Any:
        if _is_on_device(tensor) and not _is_saving():
            book.fault("pickling of a device tensor")
        return reduce_tensor(tensor, protocol)

    def with_functions(*args: Any, **kwargs: Any) -> Any:
        """Run what backward passes do in Python under the function mode, which torch has taken away by then."""
        depth, functions.depth = functions.depth, 0
        try:
            with functions if depth else contextlib.nullcontext():
                return run_backward(*args, **kwargs)
        finally:
            functions.depth = depth

    with (
        _Functions(book) as functions,
        _Operators(book, functions),
        mock.patch.object(torch.autograd, "_engine_run_backward", with_functions),
        mock.patch.object(Tensor, "_reduce_ex_internal", pickled),
    ):
        yield


def install() -> None:
    """Let this process take "cpu:0" for its device; call it before anything imports Megatron."""
    from megatron_rl import device
    from megatron_rl.kernels import megatron_cpu

    if device.device() == DEVICE:
        return
    assert "megatron.core" not in sys.modules
    device.device = lambda: DEVICE
    of_a_gpu = {'torch.device("cpu")': 'torch.device("cpu:0")', '"cpu"': '"cpu:0"', ".cpu()": '.to("cpu:0")'}
    for i, (pattern, replacement) in enumerate(megatron_cpu.REWRITES):
        first = next((text for text in of_a_gpu if text in replacement), None)
        if first is not None:
            megatron_cpu.REWRITES[i] = pattern, replacement.replace(first, of_a_gpu[first])
    options = device.transformer_config_options  # Megatron initialises where a GPU's model lives
    device.transformer_config_options = lambda layers: options(layers) | {"use_cpu_initialization": False}

    grouped = clip_grad._group_tensors_by_device_and_dtype  # in C++, which knows one kind of memory

    def by_device(lists: Any, **options: Any) -> Any:
        groups = grouped(lists, **options)
        return {(lists[0][0].device, dtype): group for (_, dtype), group in groups.items()}

    clip_grad._group_tensors_by_device_and_dtype = by_device

    c10d = torch.distributed.distributed_c10d
    new_group = c10d.new_group

    def noted(*args: Any, **kwargs: Any) -> Any:
        group = new_group(*args, **kwargs)
        backend = kwargs.get("backend") or (args[2] if len(args) > 2 else None)
        if isinstance(group, ProcessGroup):
            (_HOST_GROUPS.add if backend == "gloo" else _HOST_GROUPS.discard)(group.group_name)
        return group

    def place_of_objects(group: ProcessGroup | None = None) -> str:
        if group is not None and group.group_name in _HOST_GROUPS:
            return "cpu"
        for mode in torch.overrides._get_current_function_mode_stack():
            if isinstance(mode, _Functions):
                mode.book.objects[place()] += 1
        return str(DEVICE)

    torch.distributed.new_group = c10d.new_group = noted
    c10d._get_object_coll_device = place_of_objects
    get_backend = torch.distributed.get_backend

    def backend_of(group: ProcessGroup | None = None) -> str:
        """Tell the project what it would hear on a GPU."""
        is_ours = sys._getframe(1).f_code.co_filename.startswith(f"{ROOT}megatron_rl/")
        is_nccl = is_ours and (group is None or group.group_name not in _HOST_GROUPS)
        return "nccl" if is_nccl else get_backend(group)

    torch.distributed.get_backend = backend_of


@contextlib.contextmanager
def rewritten(owner: type, name: str, new: str, old: str) -> Iterator[None]:
    """Put the text `old` in the place of `new` in a method: a fault that was mended is there again."""
    method: Callable[..., Any] = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(method))
    assert source.count(new) == 1, f"{owner.__name__}.{name} no longer says {new!r}"
    scope: dict[str, Any] = {}
    exec(compile(source.replace(new, old), inspect.getfile(method), "exec"), method.__globals__, scope)
    with mock.patch.object(owner, name, scope[name]):
        yield
