"""One process as a rank of a world: torch's fake process group, fake tensors for what has the model's sizes, and real
ones for what has the batch's, so that selection, loss and metrics run on numbers.

`Watch` sees every operator of torch. It makes the fake tensors, answers the collectives that they are in, and writes
the books. Without `fakes` it only writes: of real tensors in a real world, the same books.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork, ProcessGroup
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from megatron_rl import device
from megatron_rl.kernels import standins
from megatron_rl.parallel.groups import destroy_groups
from megatron_rl.rehearse.books import Books, Heap, Tag, Traffic

aten: Any = torch.ops.aten
_ROOT = f"{Path(__file__).resolve().parents[2]}/"
_OWN = ("megatron_rl/rehearse/", "megatron_rl/kernels/standins.py")
# files whose new tensors have the model's sizes; elsewhere they have the batch's. Megatron's counters are integers
_FLOATS_OF_MODEL = (
    "megatron/core/",
    *(f"megatron_rl/{name}" for name in ("policy/build.py", "policy/torch_layers.py", "policy/adam.py")),
)
_ALL_OF_MODEL = tuple(
    f"megatron_rl/{name}"
    for name in (
        "convert/hf.py",
        "device.py",
        "parallel/pieces.py",
        "parallel/weights.py",
        "rollout/servers/weight_sync.py",
    )
)
_LOGITS = ("megatron_rl/device.py", "megatron_rl/parallel/fused_linear.py")  # of float32, and in chunks
_NORM = 1.0  # what the host reads of a tensor without values


class Watch(TorchDispatchMode):
    """Sees every operator while it is entered, see above."""

    def __init__(self, books: Books, fakes: FakeTensorMode | None) -> None:
        """Write into `books`."""
        super().__init__()
        self.books, self.fakes = books, fakes
        self.module = ""  # that runs
        self._twins = WeakIdKeyDictionary()  # of real tensors that meet fake ones
        self._names: dict[str, str | None] = {}  # of source files, as the books have them
        standins.Fusion.tell = self._enter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and book what it makes."""
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        fakes = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        if func.namespace == "c10d":
            return self._collective(func, args, kwargs, bool(fakes))
        if fakes and func is aten._local_scalar_dense.default:
            reads, key = self.books.phase.reads, (self._line(),)
            reads[key] = reads.get(key, 0) + 1
            return _NORM if fakes[0].is_floating_point() else int(_NORM)
        given = args, kwargs
        if fakes and len(fakes) < len(tensors):
            place = max((fake.device for fake in fakes), key=lambda each: each.index is not None)
            given = tree_map(partial(self._twin, place), given)
        is_new = self.fakes is not None and not tensors and self._is_of_model(args, kwargs)
        with self.fakes if is_new and self.fakes is not None else nullcontext():
            out = func(*given[0], **given[1])
        self._count(func, args, kwargs, out)
        if not standins.Fusion.depth:
            maker = func._overloadpacket.__name__
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._enter(leaf, maker)
        return out

    def _enter(self, tensor: Tensor, maker: str = "fused") -> None:
        storage = tensor.untyped_storage()
        if self.books.is_known(storage):
            return
        module, line = self.module or _backward_node(), self._line()
        is_logits = (maker == "mm" and (module == "output_layer" or line.startswith(_LOGITS[0]))) or (
            maker == "new_empty" and line.startswith(_LOGITS[1])
        )
        tag = Tag("logits" if is_logits else self.books.part, f"{module} {maker}".strip(), line)
        self.books.enter(storage, tag, self._heap(tensor))

    def _heap(self, tensor: Tensor) -> Heap:
        is_on_host = isinstance(tensor, FakeTensor) and tensor.device != device.device()
        return self.books.host if is_on_host else self.books.device

    def _is_of_model(self, args: Any, kwargs: Any) -> bool:
        """Tell whether a new tensor without operands has the model's sizes."""
        if not args or not isinstance(args[0], list | tuple) or all(size == 1 for size in args[0]):
            return False
        file = self._line()
        is_float = (kwargs.get("dtype") or torch.get_default_dtype()).is_floating_point
        return file.startswith(_ALL_OF_MODEL) or (is_float and file.startswith(_FLOATS_OF_MODEL))

    def _twin(self, place: torch.device, value: Any) -> Any:
        """Return a fake tensor in the place of a real one."""
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
            return value
        if value not in self._twins:
            assert self.fakes is not None
            with torch._C._DisableTorchDispatch():
                meta = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
            self._twins[value] = FakeTensor(self.fakes, meta, place)
        return self._twins[value]

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        packet = func._overloadpacket
        if packet.__name__.startswith("_varlen_attn"):
            operations = _attention_flops(packet.__name__, args)
        elif packet in flop_registry:
            operations = flop_registry[packet](*args, **kwargs, out_val=out)
        else:
            return
        flops, key = self.books.phase.flops, (self.module or _backward_node(), packet.__name__)
        flops[key] = flops.get(key, 0) + operations

    def _collective(self, func: Any, args: Any, kwargs: Any, has_fakes: bool) -> Any:
        """Book a collective; nothing travels where tensors have no values: the results are buffers that exist."""
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        group = next((_group_of(leaf) for leaf in leaves if isinstance(leaf, torch.ScriptObject)), "")
        sizes = [
            sum(leaf.nbytes for leaf in tree_leaves(argument) if isinstance(leaf, Tensor)) for argument in args[:2]
        ]
        dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else ""
        key = Traffic(func._overloadpacket.__name__.strip("_"), group, dtype)
        phase = self.books.phase
        phase.calls[key] = phase.calls.get(key, 0) + 1
        phase.traffic[key] = phase.traffic.get(key, 0) + max(sizes, default=0)
        if not has_fakes:
            return func(*args, **kwargs)
        work = FakeWork().boxed()
        return work if len(func._schema.returns) == 1 else (args[0], work)

    def _line(self) -> str:
        """Return "file:line" of the innermost frame of the project or of Megatron."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            code = frame.f_code.co_filename
            if code not in self._names:
                self._names[code] = _name_of(code)
            if name := self._names[code]:
                return f"{name}:{frame.f_lineno}"
            frame = frame.f_back
        return ""


def _name_of(code: str) -> str | None:
    name = code.removeprefix(_ROOT)
    if "/megatron/core/" in code:
        return f"megatron/core/{code.split('/megatron/core/')[1]}"
    is_ours = code.startswith(_ROOT) and "site-packages" not in name
    return name if is_ours and not name.startswith(_OWN) else None


def _backward_node() -> str:
    """Return the name of the step of a backward pass that runs; empty outside of one."""
    node = torch._C._current_autograd_node()
    return re.sub(r"Backward\d*$", " backward", node.name()) if node is not None else ""


def _group_of(boxed: torch.ScriptObject) -> str:
    try:
        group = ProcessGroup.unbox(boxed)
    except RuntimeError:  # a reduction's operator is boxed as well
        return ""
    return f"{group.group_desc.removesuffix('_GROUP').lower()} of {group.size()}"


def _attention_flops(name: str, args: Any) -> float:
    """Return the operations of causal attention inside packed sequences: two products of each pair of tokens, and five
    in the backward pass, whose first argument is the gradient."""
    is_backward = name.endswith("backward")
    query, bounds = (args[1], args[6]) if is_backward else (args[0], args[3])
    lengths = bounds.diff().double()
    pairs = float((lengths * (lengths + 1) / 2).sum())
    return (10 if is_backward else 4) * pairs * query.shape[1] * query.shape[2]


@contextmanager
def modules_named(watch: Watch, chunks: list[torch.nn.Module]) -> Iterator[None]:
    """Let `watch` know what module runs, layers without their numbers."""
    hooks = []

    def enter(stack: list[str], name: str, *_: Any) -> None:
        stack.append(watch.module)
        watch.module = name

    def leave(stack: list[str], *_: Any) -> None:
        watch.module = stack.pop() if stack else ""

    for chunk in chunks:
        for name, module in chunk.named_modules():
            stack: list[str] = []
            hooks.append(module.register_forward_pre_hook(partial(enter, stack, re.sub(r"\.\d+(?=\.|$)", "", name))))
            hooks.append(module.register_forward_hook(partial(leave, stack)))
    yield
    for hook in hooks:
        hook.remove()


@contextmanager
def resizing_watched() -> Iterator[None]:
    """Let the books of a `Watch` see storages that are resized in place, which no operator shows."""
    resize = torch.UntypedStorage.resize_

    def resized(storage: torch.UntypedStorage, count: int) -> Any:
        for mode in _get_current_dispatch_mode_stack():
            if isinstance(mode, Watch):
                mode.books.resize(storage, count)
        return resize(storage, count)

    with _patched([(torch.UntypedStorage, {"resize_": resized})]):
        yield


@contextmanager
def fake_world(rank: int, size: int) -> Iterator[None]:
    """Make this process `rank` of `size` in a world that is not there, whose collectives of real tensors give each rank
    this one's values; torch answers as among GPUs where the device is one."""
    c10d: Any = dist.distributed_c10d
    new_group = c10d.new_group
    claimed: dict[str, str] = {}  # group's name -> the backend that was asked for

    def fake_group(*args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        group = new_group(*args, backend="fake", **kwargs)
        if isinstance(group, ProcessGroup):
            claimed[group.group_name] = backend or device.BACKEND
        return group

    def backend_of(group: ProcessGroup | None = None) -> str:
        return claimed.get(group.group_name if group is not None else "", device.BACKEND)

    def gathered(results: list[Any], value: Any, group: ProcessGroup | None = None) -> None:
        own = dist.get_rank(group)
        results[:] = [value if other == own else _theirs(value, other) for other in range(len(results))]

    patches = [
        (c10d, {"new_group": fake_group}),
        (dist, {"new_group": fake_group, "get_backend": backend_of, "all_gather_object": gathered}),
        (torch.nn.functional, {"rms_norm": standins.rms_norm} if device.REHEARSES else {}),
    ]
    places = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank % 8}
    with _patched(patches), mock.patch.dict(os.environ, {name: str(value) for name, value in places.items()}):
        dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
        try:
            yield
        finally:
            destroy_groups()


@contextmanager
def _patched(patches: list[tuple[Any, dict[str, Callable[..., Any]]]]) -> Iterator[None]:
    with ExitStack() as stack:
        for owner, functions in patches:
            stack.enter_context(mock.patch.multiple(owner, **functions) if functions else nullcontext())
        yield


def _theirs(value: Any, rank: int) -> Any:
    """Return what another rank would say in a gather where this one says `value`: of the parts of a checkpoint, the
    same weights as a copy of its own, and other parts of the optimizer's state, of the same sizes."""
    if not isinstance(value, list) or not all(hasattr(each, "replica_id") for each in value):
        return value
    owns = [each.key.startswith("optimizer.") for each in value]
    return [
        replace(each, key=f"{each.key} of {rank}") if own else replace(each, replica_id=(*each.replica_id[:-1], rank))
        for each, own in zip(value, owns, strict=True)
    ]
