"""The output layer and the vocabulary statistics as one operator, which never holds [T, V].

Logits exist for a chunk of tokens at a time: matrix product, statistics, next chunk; backward computes them again. That
is a fourth product beside the three of a linear layer, so it saves memory and costs time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_rl import device
from megatron_rl.parallel.vocab import (
    VocabShard,
    check_labels,
    check_temperature,
    gradient_coefficients,
    merge_shards,
)
from megatron_rl.types import Float, Int64, TokenStats

_CHUNK_ELEMENTS = 2**26  # 128 MiB of bfloat16 logits; at V/TP = 38,016 that is 1,765 tokens, enough to fill a GPU


def linear_stats(
    hidden: Float[Tensor, "T H"],
    weight: Float[Tensor, "V H"],
    labels: Int64[Tensor, "T"],
    shard: VocabShard,
    *,
    temperature: float = 1.0,
    with_sum_p2: bool = False,
    chunk_tokens: int | None = None,
) -> TokenStats:
    """Return `vocab_parallel_stats` of the logits `hidden @ weight.T`, without the logits.

    Args:
        hidden: the same on all ranks of `shard.group`. Its gradient is this shard's part: sum it over that group.
        weight: this rank's rows, of hidden's dtype.
        labels, temperature, with_sum_p2: as in `vocab_parallel_stats`.
        chunk_tokens: tokens whose logits exist at once; None: as many as make 2^26 logits.

    Returns: TokenStats of [T] tensors, nats; `logprobs` and `entropy` are differentiable. The weight's gradient is
    summed over chunks in float32 and rounded once; padding rows get exactly 0.

    Raises: ValueError for shapes, labels or a temperature that cannot work.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden: got shape {tuple(hidden.shape)}, {hidden.dtype}, weight {tuple(weight.shape)}, {weight.dtype}; "
            "expected [T, H] and [V, H] of one dtype"
        )
    check_labels(labels, hidden.shape[0])
    check_temperature(temperature)
    if chunk_tokens is None:
        chunk_tokens = max(1, _CHUNK_ELEMENTS // max(1, weight.shape[0]))
    elif chunk_tokens < 1:
        raise ValueError(f"chunk_tokens: got {chunk_tokens}, expected at least 1")
    values = _LinearStats.apply(  # type: ignore[no-untyped-call]
        hidden, weight, labels, shard, float(temperature), with_sum_p2, chunk_tokens
    )
    return TokenStats(*values)


class _LinearStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        shard: VocabShard,
        temperature: float,
        with_sum_p2: bool,
        chunk_tokens: int,
    ) -> tuple[Tensor, ...]:
        columns, real_columns = labels - shard.start, shard.real_columns(weight.shape[0])
        shard_stats = device.vocab_kernels(hidden).shard_stats
        logits = _chunk_of_logits(hidden, weight, chunk_tokens)
        local = torch.cat(
            [
                shard_stats(_product(h, weight, logits), target, real_columns, temperature, with_sum_p2)
                for h, target in zip(hidden.split(chunk_tokens), columns.split(chunk_tokens), strict=True)
            ]
        )
        maximum, log_s, *outputs = merge_shards(local, shard.group, temperature)
        ctx.save_for_backward(hidden, weight, columns, maximum, log_s, outputs[1])
        ctx.real_columns, ctx.temperature, ctx.chunk_tokens = real_columns, temperature, chunk_tokens
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*outputs[2:])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: None) -> tuple[Any, ...]:
        nothing = (None,) * 5
        if grad_logprobs is None and grad_entropy is None:
            return None, None, *nothing
        hidden, weight, columns, maximum, log_s, entropy = ctx.saved_tensors
        factors = gradient_coefficients(log_s, entropy, grad_logprobs, grad_entropy, ctx.temperature)
        write_gradient = device.vocab_kernels(hidden).write_gradient
        logits = _chunk_of_logits(hidden, weight, ctx.chunk_tokens)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=maximum.dtype) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], ctx.chunk_tokens):
            chunk = slice(start, start + ctx.chunk_tokens)
            gradient = _product(hidden[chunk], weight, logits)
            chunk_factors = [None if factor is None else factor[chunk] for factor in factors]
            write_gradient(gradient, columns[chunk], ctx.real_columns, maximum[chunk], *chunk_factors, ctx.temperature)
            if grad_hidden is not None:
                torch.mm(gradient, weight, out=grad_hidden[chunk])
            if grad_weight is not None:
                _add_product(grad_weight, gradient, hidden[chunk])
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), *nothing


def _chunk_of_logits(hidden: Tensor, weight: Tensor, chunk_tokens: int) -> Tensor:
    return hidden.new_empty(min(chunk_tokens, hidden.shape[0]), weight.shape[0])


def _product(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    return torch.mm(hidden, weight.t(), out=out[: hidden.shape[0]])


def _add_product(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """Add gradient.T @ hidden to `total`; of bfloat16, a total would lose a bit a chunk."""
    if total.dtype == gradient.dtype:
        total.addmm_(gradient.t(), hidden)
        return
    rows = max(1, 2**24 // max(1, hidden.shape[1]))  # a product of all rows would be a second gradient of the weight
    for part, columns in zip(total.split(rows), gradient.split(rows, dim=1), strict=True):
        part.add_(torch.mm(columns.t(), hidden))
