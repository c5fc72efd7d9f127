"""One process as a rank of a world: torch's fake process group, fake tensors for what has the model's sizes, and real
ones for what has the batch's, so that selection, loss and metrics run on numbers.

`Watch` sees every operator of torch. It makes the fake tensors, answers the collectives that they are in, and writes
the books. Without `fakes` it only writes: of real tensors in a real world, the same books.
"""

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork, ProcessGroup
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules import module as hooks
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from megatron_rl import device
from megatron_rl.kernels import standins
from megatron_rl.parallel.groups import destroy_groups
from megatron_rl.rehearse.books import Books, Tag
from megatron_rl.rehearse.frames import own_frames

aten: Any = torch.ops.aten
_STAND_INS = re.compile(r"megatron_rl/(rehearse/|kernels/standins)")
# files whose new tensors have the model's sizes; elsewhere they have the batch's. Megatron's integers are counts
_OF_MODEL = re.compile(r"megatron_rl/(convert/hf|device|parallel/(pieces|weights)|rollout/servers/weight_sync)\.py")
_FLOATS_OF_MODEL = re.compile(r"megatron/core/|megatron_rl/policy/(build|torch_layers|adam)\.py")
# makers of logits: the output layer, device.float32_product, and chunks
_LOGITS = re.compile(r"output_layer mm \S+|mm megatron_rl/device\S+|new_empty megatron_rl/parallel/fused_linear\S+")


class Watch(TorchDispatchMode):
    """Sees every operator while it is entered, see above."""

    def __init__(self, fakes: FakeTensorMode | None) -> None:
        """Begin empty books."""
        super().__init__()
        self.books, self._fakes = Books(), fakes
        self._modules = [""]  # that run, outermost first
        self._twins = WeakIdKeyDictionary()  # of real tensors that meet fake ones

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and book what it makes."""
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        fakes = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        if func.namespace == "c10d":
            return self._collective(func, args, kwargs, bool(fakes))
        if fakes and func is aten._local_scalar_dense.default:
            return 1.0 if fakes[0].is_floating_point() else 1
        given = args, kwargs
        if fakes and len(fakes) < len(tensors):
            place = max((fake.device for fake in fakes), key=lambda each: each.index is not None)
            given = tree_map(partial(self._twin, place), given)
        is_of_model = self._fakes is not None and not tensors and self._is_of_model(args, kwargs)
        with self._fakes if is_of_model and self._fakes is not None else nullcontext():
            out = func(*given[0], **given[1])
        self._count(func, args, kwargs, out)
        self.see(out, func._overloadpacket.__name__)
        return out

    def see(self, results: Any, maker: str) -> None:
        """Enter the results of an operator, unless it is a part of a fused one."""
        for tensor in tree_leaves(results) if not standins.fusing else ():
            if isinstance(tensor, Tensor) and not self.books.knows(storage := tensor.untyped_storage()):
                made_by, line = f"{self._module()} {maker}".strip(), _line()
                part = "logits" if _LOGITS.fullmatch(f"{made_by} {line}") else self.books.part
                is_on_host = isinstance(tensor, FakeTensor) and tensor.device != device.device()
                self.books.enter(
                    storage, Tag(part, made_by, line), self.books.host if is_on_host else self.books.device
                )

    def _module(self) -> str:
        """Return the module that runs, or the step of the backward pass."""
        node = torch._C._current_autograd_node()
        return self._modules[-1] or (re.sub(r"Backward\d*$", " backward", node.name()) if node is not None else "")

    def _is_of_model(self, args: Any, kwargs: Any) -> bool:
        """Tell whether a new tensor without operands has the model's sizes."""
        if not args or not isinstance(args[0], list | tuple) or all(size == 1 for size in args[0]):
            return False
        line, dtype = _line(), kwargs.get("dtype") or torch.get_default_dtype()
        return bool(_OF_MODEL.match(line) or (dtype.is_floating_point and _FLOATS_OF_MODEL.match(line)))

    def _twin(self, place: torch.device, value: Any) -> Any:
        """Return a fake tensor for a real one."""
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
            return value
        if value not in self._twins:
            with torch._C._DisableTorchDispatch():
                meta = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
            self._twins[value] = FakeTensor(self._fakes, meta, place)
        return self._twins[value]

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        packet = func._overloadpacket
        name, is_backward = packet.__name__, packet.__name__.endswith("backward")
        if name.startswith("_varlen_attn"):
            self.books.phase.flops[self._module(), name] += _attention_flops(args, is_backward=is_backward)
        elif packet in flop_registry:
            self.books.phase.flops[self._module(), name] += flop_registry[packet](*args, **kwargs, out_val=out)

    def _collective(self, func: Any, args: Any, kwargs: Any, has_fakes: bool) -> Any:
        """Book a collective; nothing travels where tensors have no values: the results are buffers that exist."""
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        sizes = [sum(leaf.nbytes for leaf in tree_leaves(each) if isinstance(leaf, Tensor)) for each in args[:2]]
        group = next(filter(None, (_group_of(leaf) for leaf in leaves)), "")
        dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else ""
        key = (func._overloadpacket.__name__.strip("_"), group, dtype)
        self.books.phase.calls[key] += 1
        self.books.phase.traffic[key] += max(sizes, default=0)
        if not has_fakes:
            return func(*args, **kwargs)
        work = FakeWork().boxed()
        return work if len(func._schema.returns) == 1 else (args[0], work)

    @contextmanager
    def naming(self, chunks: list[torch.nn.Module]) -> Iterator[None]:
        """Know what module runs, layers without their numbers."""
        names = {m: re.sub(r"\.\d+(?=\.|$)", "", name) for chunk in chunks for name, m in chunk.named_modules()}

        def leave(*_: Any) -> None:
            self._modules.pop()

        entering = hooks.register_module_forward_pre_hook(lambda module, _: self._modules.append(names.get(module, "")))
        with entering, hooks.register_module_forward_hook(leave):
            yield


def _line() -> str:
    """Return "file:line" of the innermost frame of the project or of Megatron that is no stand-in."""
    lines = (f"{name}:{frame.f_lineno}" for name, frame in own_frames() if not _STAND_INS.match(name))
    return next(lines, "")


def _group_of(boxed: Any) -> str:
    try:
        group = ProcessGroup.unbox(boxed)
    except (RuntimeError, TypeError):  # a reduction's operator is boxed as well
        return ""
    return f"{group.group_desc.removesuffix('_GROUP').lower()} of {group.size()}"


def _attention_flops(args: Any, *, is_backward: bool) -> int:
    """Return the operations of causal attention inside packed sequences: two products for each pair of tokens, and five
    in the backward pass, whose first argument is the gradient."""
    query, bounds = (args[1], args[6]) if is_backward else (args[0], args[3])
    lengths = bounds.diff().long()
    return (5 if is_backward else 2) * int((lengths * (lengths + 1)).sum()) * query.shape[1] * query.shape[2]


@contextmanager
def fake_world(rank: int, size: int, watch: Watch) -> Iterator[None]:
    """Make this process `rank` of `size` in a world that is not there, whose collectives of real tensors give each rank
    this one's values; torch answers as among GPUs where the device is one."""
    c10d: Any = dist.distributed_c10d
    new_group, resize = c10d.new_group, torch.UntypedStorage.resize_
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

    def resized(storage: torch.UntypedStorage, count: int) -> Any:
        watch.books.change(storage, count)
        return resize(storage, count)

    with ExitStack() as stack:
        for owner, functions in (
            (c10d, {"new_group": fake_group}),
            (dist, {"new_group": fake_group, "get_backend": backend_of, "all_gather_object": gathered}),
            (torch.UntypedStorage, {"resize_": resized}),
            (
                torch.nn.Module,
                {"bfloat16": lambda module: module},
            ),  # all are, and none can be swapped for itself
            (torch.nn.functional, {"rms_norm": standins.rms_norm} if device.REHEARSES else {}),
        ):
            for name, function in functions.items():
                stack.enter_context(mock.patch.object(owner, name, function))
        places = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": "0"}
        stack.enter_context(mock.patch.dict(os.environ, places))
        stack.enter_context(mock.patch.object(standins, "tell", watch.see))
        dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
        stack.callback(destroy_groups)
        stack.enter_context(watch)
        yield


def _theirs(value: Any, rank: int) -> Any:
    """Return what another rank would say in a gather where this one says `value`: of the parts of a checkpoint, the
    same weights as a copy of its own, and other parts of the optimizer's state, of the same sizes."""
    if not isinstance(value, list) or not all(hasattr(each, "replica_id") for each in value):
        return value
    return [
        replace(each, key=f"{each.key} of {rank}")
        if each.key.startswith("optimizer.")
        else replace(each, replica_id=(*each.replica_id[:-1], rank))
        for each in value
    ]
