"""The output layer where the model hands over its hidden states: with float32 logits, or fused with the statistics.

`linear_stats` never holds [T, V]. Logits exist for a chunk of tokens at a time: matrix product, statistics, next chunk;
backward computes them again. That is a fourth product beside the three of a linear layer, so it saves memory and costs
time.

float32 logits of a bfloat16 model: the product's sums are not rounded to bfloat16, in which a logit of 16 to 32 has
steps of 0.125 nats. Their gradient is float32 too, and rounded to bfloat16 once, as the input of two products, whose
results the weight's and the hidden states' bfloat16 would round in any case.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_rl import device
from megatron_rl.parallel.vocab import VocabShard, check_labels, check_temperature, gradient_coefficients, merge_shards
from megatron_rl.types import Float, Int64, TokenStats

_CHUNK_ELEMENTS = 2**26  # 128 MiB of bfloat16 logits; at V/TP = 38,016 that is 1,765 tokens, enough to fill a GPU
_ROUNDED_ELEMENTS = 2**24  # of a float32 gradient, rounded at once: 32 MiB


def linear_stats(
    hidden: Float[Tensor, "T H"],
    weight: Float[Tensor, "V H"],
    labels: Int64[Tensor, "T"],
    shard: VocabShard,
    *,
    temperature: float = 1.0,
    with_sum_p2: bool = False,
    chunk_tokens: int | None = None,
    float32_logits: bool = False,
) -> TokenStats:
    """Return `vocab_parallel_stats` of the logits `hidden @ weight.T`, without the logits.

    Args:
        hidden: the same on all ranks of `shard.group`. Its gradient is this shard's part: sum it over that group.
        weight: this rank's rows, of hidden's dtype, or bfloat16 beside float32 on a CPU.
        labels, temperature, with_sum_p2: as in `vocab_parallel_stats`.
        chunk_tokens: tokens whose logits exist at once; None: as many as make 2^26 logits.
        float32_logits: of bfloat16 inputs, the logits are float32.

    Returns: TokenStats of [T] tensors, nats; `logprobs` and `entropy` are differentiable. The weight's gradient is
    summed over chunks in float32 and rounded once; padding rows get exactly 0.

    Raises: ValueError for shapes, labels or a temperature that cannot work.
    """
    mixed = hidden.dtype != weight.dtype and hidden.dtype != torch.float32
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or mixed:
        raise ValueError(
            f"hidden: got shape {tuple(hidden.shape)}, {hidden.dtype}, weight {tuple(weight.shape)}, {weight.dtype}; "
            "expected [T, H] and [V, H] of one dtype, or hidden in float32"
        )
    check_labels(labels, hidden.shape[0])
    check_temperature(temperature)
    if chunk_tokens is None:
        chunk_tokens = max(1, _CHUNK_ELEMENTS // max(1, weight.shape[0]))
    elif chunk_tokens < 1:
        raise ValueError(f"chunk_tokens: got {chunk_tokens}, expected at least 1")
    dtype = torch.float32 if float32_logits else hidden.dtype
    values = _LinearStats.apply(  # type: ignore[no-untyped-call]
        hidden, weight, labels, shard, float(temperature), with_sum_p2, (chunk_tokens, dtype)
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
        chunk: tuple[int, torch.dtype],
    ) -> tuple[Tensor, ...]:
        columns, real_columns = labels - shard.start, shard.real_columns(weight.shape[0])
        shard_stats = device.vocab_kernels(hidden).shard_stats
        chunk_tokens, _ = chunk
        logits = _chunk_of_logits(hidden, weight, *chunk)
        local = torch.cat(
            [
                shard_stats(_product(h, weight, logits), target, real_columns, temperature, with_sum_p2)
                for h, target in zip(hidden.split(chunk_tokens), columns.split(chunk_tokens), strict=True)
            ]
        )
        maximum, log_s, *outputs = merge_shards(local, shard.group, temperature)
        ctx.save_for_backward(hidden, weight, columns, maximum, log_s, outputs[1])
        ctx.real_columns, ctx.temperature, ctx.chunk = real_columns, temperature, chunk
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
        chunk_tokens, _ = ctx.chunk
        logits = _chunk_of_logits(hidden, weight, *ctx.chunk)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=maximum.dtype) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            gradient = _product(hidden[chunk], weight, logits)
            chunk_factors = [None if factor is None else factor[chunk] for factor in factors]
            write_gradient(gradient, columns[chunk], ctx.real_columns, maximum[chunk], *chunk_factors, ctx.temperature)
            gradient = gradient.to(weight.dtype)
            if grad_hidden is not None:
                _write_product(grad_hidden[chunk], gradient, weight)
            if grad_weight is not None:
                _add_product(grad_weight, gradient, hidden[chunk].to(weight.dtype))
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), *nothing


def float32_linear(hidden: Float[Tensor, "T H"], weight: Float[Tensor, "V H"]) -> Float[Tensor, "T V"]:
    """Return `hidden @ weight.T` in float32 from bfloat16 inputs, or on a CPU from float32 and bfloat16; the gradients
    have their types."""
    logits: Tensor = _Float32Linear.apply(hidden, weight)  # type: ignore[no-untyped-call]
    return logits


class _Float32Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return device.float32_product(hidden, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Round blocks of the gradient, so that no second [T, V] exists."""
        hidden, weight = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        if grad_hidden is not None:
            rows = max(1, _ROUNDED_ELEMENTS // max(1, gradient.shape[1]))
            for part, out in zip(gradient.split(rows), grad_hidden.split(rows), strict=True):
                _write_product(out, part.to(weight.dtype), weight)
        if grad_weight is not None:
            hidden = hidden.to(weight.dtype)
            columns = max(1, _ROUNDED_ELEMENTS // max(1, gradient.shape[0]))
            for part, out in zip(gradient.split(columns, dim=1), grad_weight.split(columns), strict=True):
                torch.mm(part.to(weight.dtype).t(), hidden, out=out)
        return grad_hidden, grad_weight


def _chunk_of_logits(hidden: Tensor, weight: Tensor, chunk_tokens: int, dtype: torch.dtype) -> Tensor:
    return hidden.new_empty(min(chunk_tokens, hidden.shape[0]), weight.shape[0], dtype=dtype)


def _product(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    out = out[: hidden.shape[0]]
    if out.dtype == weight.dtype:
        return torch.mm(hidden, weight.t(), out=out)
    return device.float32_product(hidden, weight, out)


def _write_product(out: Tensor, gradient: Tensor, weight: Tensor) -> None:
    if out.dtype == weight.dtype:
        torch.mm(gradient, weight, out=out)
    else:
        device.float32_product(gradient, weight.t(), out)


def _add_product(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """Add gradient.T @ hidden to `total`; of bfloat16, a total would lose a bit a chunk."""
    if total.dtype == gradient.dtype:
        total.addmm_(gradient.t(), hidden)
        return
    rows = max(1, 2**24 // max(1, hidden.shape[1]))  # a product of all rows would be a second gradient of the weight
    for part, columns in zip(total.split(rows), gradient.split(rows, dim=1), strict=True):
        part.add_(torch.mm(columns.t(), hidden))
