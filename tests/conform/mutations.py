"""Known ways in which a parallel layout changes the algorithm, each as a patch on one rank of a world."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch

from megatron_rl.config import parse_config
from tests.worlds import leave_layout

Patch = Callable[[], contextlib.AbstractContextManager[Any]]


class Mutation(NamedTuple):
    """A bug of one layout, and the loss under which it does harm."""

    layout: str
    patch: Patch
    loss: str = "kl_cov"


def measured(raw: dict[str, Any], folder: Path, mutation: str = "", resumes: bool = True) -> None:
    """What it does for one layout."""
    from megatron_rl.conform.frozen import frozen_config
    from megatron_rl.conform.measure import measure
    from megatron_rl.data.tokenizer import build_tokenizer, vocab_size
    from megatron_rl.parallel.groups import init_groups

    config = frozen_config(parse_config(raw), 256)
    groups = init_groups(config.parallel, config.seed)
    hf = dict(config.model.hf_config or {}) | {"vocab_size": vocab_size(build_tokenizer(config))}
    with MUTATIONS[mutation].patch() if mutation else contextlib.nullcontext():
        measure(config, hf, groups, folder, resumes=folder if resumes else None)
    leave_layout()


def _rank() -> int:
    return torch.distributed.get_rank()


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _replaced(target: str, make: Callable[[Any], Any]) -> Patch:
    """The attribute `target`, `module:a.b`, becomes `make(what it was)`."""

    @contextlib.contextmanager
    def patch() -> Iterator[None]:
        import importlib

        module, _, path = target.partition(":")
        owner: Any = importlib.import_module(module)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        with mock.patch.object(owner, name, make(getattr(owner, name))):
            yield

    return patch


_FINALIZE = "megatron.core.distributed.finalize_model_grads"
_POLICY = "megatron_rl.policy.policy:MegatronPolicy."
_DRIFT = 1e-2  # more than half a step of bfloat16 at 1


def _by_local_count(real: Any) -> Any:
    def finalize(model: Any, num_tokens: Any = None, *args: Any, **kwargs: Any) -> None:
        real(model, None, *args, **kwargs)
        for ddp in model:
            ddp.scale_gradients(1.0 / (2 * float(num_tokens)))

    return finalize


def _averaged(real: Any) -> Any:
    def finalize(model: Any, *args: Any, **kwargs: Any) -> None:
        real(model, *args, **kwargs)
        for ddp in model:
            ddp.scale_gradients(0.5)

    return finalize


def _of_this_rank(real: Any) -> Any:
    from megatron_rl.parallel.reduce import Reducer

    return lambda loss, mini_batch, ranks, **options: real(loss, mini_batch, Reducer(None), **options)


def _stale(real: Any) -> Any:
    first: dict[str, torch.Tensor] = {}

    def stream(self: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in real(self):
            if name == "model.layers.1.mlp.down_proj.weight":
                tensor = torch.cat([tensor[:, :32], first.setdefault(name, tensor.clone())[:, 32:]], dim=1)
            yield name, tensor

    return stream


def _with_padding_columns(real: Any) -> Any:
    def build(*args: Any, **kwargs: Any) -> Any:
        model = real(*args, **kwargs)
        return dataclasses.replace(model, vocab_size=model.vocab_size + 1)

    return build


def _first_optimizer_alone(real: Any) -> Any:
    return lambda self: self.chained_optimizers[0].get_grad_norm()


def _positions_from_zero(real: Any) -> Any:
    def part(whole: Any, layout: Any) -> Any:
        mine = real(whole, layout)
        return mine.replace(position_ids=torch.arange(len(mine.position_ids)))

    return part


def _counted_by_each(real: Any) -> Any:
    return lambda whole, layout: real(whole, layout).replace(loss_denominator=whole.loss_denominator)


def _in_rank_order(real: Any) -> Any:
    def gather(tokens: Any, cu_seqlens: Any, group: Any) -> Any:
        return real(tokens, cu_seqlens, group).flip(0)

    return gather


def _first_micro_batch_lost(real: Any) -> Any:
    def backward(self: Any, mini_batch: Any, loss: Any) -> Any:
        seen: list[int] = []

        def lossy(inputs: Any) -> Any:
            outputs = loss(inputs)
            seen.append(1)
            return dataclasses.replace(outputs, loss_sum=outputs.loss_sum * (len(seen) > 1))

        return real(self, mini_batch, lossy)

    return backward


def _not_in_the_background(real: Any) -> Any:
    """Asynchronous all-reduces, which are those of a linear layer's backward pass, do nothing."""

    def all_reduce(tensor: Any, *args: Any, async_op: bool = False, **kwargs: Any) -> Any:
        return SimpleNamespace(wait=_nothing) if async_op else real(tensor, *args, **kwargs)

    return all_reduce


def _drifting(real: Any) -> Any:
    def update(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = real(self, *args, **kwargs)
        with torch.no_grad():
            self.parameters[-1][1].view(-1)[0].add_(_DRIFT * _rank())
        return result

    return update


def _shifted_start(real: Any) -> Any:
    def build(*args: Any, **kwargs: Any) -> Any:
        model = real(*args, **kwargs)
        return dataclasses.replace(model, vocab_start=model.vocab_start - (model.vocab_start > 0))

    return build


def _scaled_by_rank(real: Any) -> Any:
    return lambda rollouts, config: real(rollouts, config) * (1 + _rank())


def _whole_gather(real: Any) -> Any:
    """The broadcast along the pipeline leaves the first stage its own zeros."""
    return lambda tensors, groups, like: [t if t is not None else torch.zeros_like(like) for t in tensors]


def _forgotten_moments(real: Any) -> Any:
    def load(self: Any, state: Any) -> None:
        real(self, state)
        for optimizer in self.policy.optimizer.chained_optimizers:
            for moments in optimizer.optimizer.state.values():
                for name in ("exp_avg", "exp_avg_sq"):
                    moments[name].zero_()

    return load


def _one_rank_drifts(is_copy: Callable[[str, Any], bool]) -> Callable[[Any], Any]:
    """Of a parameter that other ranks hold too, one copy moves by itself after an update."""

    def make(real: Any) -> Any:
        def update(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = real(self, *args, **kwargs)
            for name, parameter in self.parameters:
                if _rank() == 1 and is_copy(name, parameter):
                    with torch.no_grad():
                        parameter.view(-1)[0].add_(_DRIFT)
                    break
            return result

        return update

    return make


def _is_whole(name: str, parameter: Any) -> bool:
    return not getattr(parameter, "tensor_model_parallel", False)


def _expert_gradients_averaged(real: Any) -> Any:
    def finalize(model: Any, *args: Any, **kwargs: Any) -> None:
        real(model, *args, **kwargs)
        for ddp in model:
            for buffer in ddp.expert_parallel_buffers:
                buffer.grad_data.mul_(0.5)

    return finalize


def _lost_on_rank_1(real: Any) -> Any:
    """What a checkpoint brings does not reach the weights of one rank."""

    def load(self: Any, *args: Any) -> Any:
        before = [parameter.detach().clone() for _, parameter in self.policy.parameters]
        result = real(self, *args)
        if _rank() == 1:
            self.policy._set_parameters(before)
        return result

    return load


# name: (layout, patch, loss)
_MUTATIONS: dict[str, tuple[Any, ...]] = {
    "gradients of norms not summed over sequence-parallel ranks": (
        "tp2_sp",
        _replaced(f"{_FINALIZE}:_allreduce_non_tensor_model_parallel_grads", lambda real: _nothing),
    ),
    "tied embedding's gradient not summed over the first and last stage": (
        "pp2",
        _replaced(f"{_FINALIZE}:_allreduce_word_embedding_grads", lambda real: _nothing),
    ),
    "loss divided by the local count": (
        "dp2",
        _replaced("megatron_rl.policy.build:finalize_model_grads", _by_local_count),
    ),
    "gradients averaged over data-parallel ranks": (
        "dp2",
        _replaced("megatron_rl.policy.build:finalize_model_grads", _averaged),
    ),
    "top-k and means of this rank alone": (
        "dp2",
        _replaced("megatron_rl.algorithms.families:CovarianceLoss.mark", _of_this_rank),
    ),
    "stale shard in the weight stream": ("tp2", _replaced(_POLICY + "hf_weights", _stale)),
    "padding columns counted": ("tp2", _replaced("megatron_rl.policy.policy:build_model", _with_padding_columns)),
    "vocabulary shard begins a column early": (
        "tp2",
        _replaced("megatron_rl.policy.policy:build_model", _shifted_start),
    ),
    "experts left out of the clip norm": (
        "ep2",
        _replaced("megatron.core.optimizer.optimizer:ChainedOptimizer.get_grad_norm", _first_optimizer_alone),
    ),
    "replicated parameters counted by each rank in the clip norm": (
        "tp2",
        _replaced(
            "megatron.core.optimizer.optimizer:tensor_parallel.param_is_not_tensor_parallel_duplicate",
            lambda real: lambda *_, **__: True,
        ),
    ),
    "tied embedding counted twice in the clip norm": (
        "pp2",
        _replaced("megatron.core.optimizer.optimizer:param_is_not_shared", lambda real: lambda *_: True),
    ),
    "positions counted from each rank's own first token": (
        "cp2",
        _replaced("megatron_rl.packing.pack:_context_part", _positions_from_zero),
    ),
    "denominator counted by each context-parallel rank": (
        "cp2",
        _replaced("megatron_rl.packing.pack:_context_part", _counted_by_each),
    ),
    "keys of other ranks in the wrong order": (
        "cp2",
        _replaced("megatron_rl.policy.torch_layers:gather_tokens", _in_rank_order),
    ),
    "first micro-batch lost": ("dp2", _replaced(_POLICY + "backward", _first_micro_batch_lost)),
    "no all-reduce after a row-parallel layer": (
        "tp2",
        _replaced(
            "megatron.core.tensor_parallel.layers:reduce_from_tensor_model_parallel_region",
            lambda real: lambda x, *_, **__: x,
        ),
    ),
    "no all-reduce of an input's gradient": (
        "tp2",
        _replaced("megatron.core.tensor_parallel.layers:torch.distributed.all_reduce", _not_in_the_background),
    ),
    "replicas drift apart": ("dp2", _replaced(_POLICY + "update", _drifting)),
    "advantages of each rank's own scale": (
        "dp2",
        _replaced("megatron_rl.conform.measure:advantages", _scaled_by_rank),
    ),
    "statistics not sent along the pipeline": (
        "pp2",
        _replaced("megatron_rl.policy.policy:broadcast_from_last_stage", _whole_gather),
    ),
    "moments lost in the checkpoint": (
        "dp2",
        _replaced("megatron_rl.policy.checkpoint:CheckpointStore._load_optimizer", _forgotten_moments),
    ),
    "moments of experts lost in the checkpoint": (
        "ep2",
        _replaced("megatron_rl.policy.checkpoint:CheckpointStore._load_optimizer", _forgotten_moments),
    ),
    "weights of one rank not loaded from the checkpoint": (
        "dp2",
        _replaced("megatron_rl.policy.checkpoint:CheckpointStore.load", _lost_on_rank_1),
    ),
    "a norm of one tensor-parallel rank drifts": (
        "tp2",
        _replaced(_POLICY + "update", _one_rank_drifts(_is_whole)),
    ),
    "the last stage's tied embedding drifts": (
        "pp2",
        _replaced(_POLICY + "update", _one_rank_drifts(lambda name, _: name.startswith("output_layer"))),
    ),
    "clip norm of one rank alone": (
        "dp2",
        _replaced(
            "megatron.core.optimizer.optimizer:ChainedOptimizer.get_grad_norm",
            lambda real: lambda self: real(self) * (1 + _rank()),
        ),
    ),
    "gradients of experts averaged over ranks": (
        "ep2",
        _replaced("megatron_rl.policy.build:finalize_model_grads", _expert_gradients_averaged),
    ),
    "sums over a sequence of one context-parallel rank alone": (
        "cp2",
        _replaced(
            "megatron_rl.types:MicroBatch.loss_inputs", lambda real: lambda self, stats, context=None: real(self, stats)
        ),
        "gspo",
    ),
    "random tokens drawn by rank": (
        "dp2",
        _replaced("megatron_rl.algorithms.hashing:hash_uniform", lambda real: lambda *fields: real(_rank(), *fields)),
        "clip_cov",
    ),
}
MUTATIONS = {name: Mutation(*fields) for name, fields in _MUTATIONS.items()}
