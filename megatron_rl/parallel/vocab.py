"""Log-probabilities and entropy of a softmax whose columns are sharded over tensor-parallel ranks.

One pass over the local logits gives per token m = max x, s = sum e^d, t = sum d e^d with d = (x - m) / temperature, the
target's logit z and, when asked, q = sum e^2d and u = sum d e^2d. One all-gather of these 4 or 6 floats a token gives
every rank the exact statistics of the whole vocabulary; the backward pass needs no collective at all.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_rl import device
from megatron_rl.types import Float, Float64, Int64, Shaped, TokenStats

# e^x is exactly 0 in float64 below -746; a finite exponent is one that 0 can be multiplied with
_LOWEST_EXPONENT = -1.0e4


@dataclass(frozen=True, slots=True)
class VocabShard:
    """The columns of the vocabulary that this rank holds."""

    group: ProcessGroup | None  # the ranks that hold the other shards too; None: this rank holds the whole vocabulary
    start: int  # global id of this rank's first column
    vocab_size: int  # the real one: columns with a global id >= vocab_size are padding

    def real_columns(self, width: int) -> int:
        """Return how many of this rank's `width` columns are no padding."""
        return min(max(self.vocab_size - self.start, 0), width)


def vocab_parallel_stats(
    logits: Float[Tensor, "T V"],
    labels: Int64[Tensor, "T"],
    *,
    group: ProcessGroup | None,
    vocab_start: int,
    vocab_size: int,
    temperature: float = 1.0,
    with_sum_p2: bool = False,
    block_rows: int | None = None,
) -> TokenStats:
    """Return exact statistics of pi = softmax(logits / temperature) over the whole, sharded vocabulary.

    THE LOGITS ARE CONSUMED: backward writes their gradient over their own storage. After backward `logits` holds the
    gradient, no other code may use their values, and a second backward raises. Beyond the logits no tensor of
    [T, V] exists in any dtype, only `block_rows` rows of it at a time.

    `logprobs` and `entropy` are differentiable, `sum_p2` and `sum_p2_logp` are not. With unscaled logits x and
    temperature tau: d logp / dx_a = (1[a = label] - pi_a) / tau and dH / dx_a = -pi_a (log pi_a + H) / tau.

    Args:
        logits: this rank's columns before the temperature; contiguous float32, bfloat16 or float16 (the
            statistics are float32), or float64 (float64). -inf masks a token. T is equal on all ranks of `group`.
        labels: global token ids, equal on all ranks of `group`. Positions without a target carry any valid
            id (0 by convention). A label outside [0, vocab_size) gets logprob -inf, which makes the loss non-finite:
            to raise here would stall the device on every call.
        group: the ranks that hold the shards; None when `logits` holds the whole vocabulary.
        vocab_start: global id of this rank's first column.
        vocab_size: real vocabulary; columns with a global id >= vocab_size are padding: they count as -inf and their
            gradient is exactly 0. A shard may consist of padding alone.
        temperature: divides the logits.
        with_sum_p2: also return sum_a pi_a^2 and sum_a pi_a^2 log pi_a.
        block_rows: rows that the torch path works on at once; its scratch memory is two such blocks of float32. None:
            as many as stay in a CPU's cache. The GPU's kernel needs no scratch memory.

    Returns: TokenStats of [T] tensors, nats, the same on every rank of `group`. A row whose logits are -inf on all
    ranks has no distribution and gives NaN.

    Raises: ValueError for logits, labels or temperature that cannot work; RuntimeError at a second backward.

    Source: entropy and Theorem 1 of arXiv 2505.22617; the merge is the online softmax of arXiv 1805.02867, with the
    first moment of the exponents beside the normaliser.
    """
    _check(logits, labels, temperature, block_rows)
    shard = VocabShard(group, vocab_start, vocab_size)
    values = _VocabParallelStats.apply(  # type: ignore[no-untyped-call]
        logits, labels, shard, float(temperature), with_sum_p2, block_rows
    )
    return TokenStats(*values)


def _check(logits: Tensor, labels: Tensor, temperature: float, block_rows: int | None) -> None:
    if logits.ndim != 2 or not logits.is_contiguous() or not logits.is_floating_point():
        raise ValueError(
            f"logits: got shape {tuple(logits.shape)}, strides {logits.stride()}, {logits.dtype}; expected a "
            "contiguous floating-point [T, V], whose storage the gradient may overwrite"
        )
    check_labels(labels, logits.shape[0])
    if logits.is_leaf and logits.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "logits is a leaf that requires grad: backward would overwrite its values with its gradient; "
            "pass logits.clone()"
        )
    check_temperature(temperature)
    if block_rows is not None and block_rows < 1:
        raise ValueError(f"block_rows: got {block_rows}, expected at least 1")


def check_labels(labels: Shaped[Tensor, "..."], tokens: int) -> None:
    """Check that labels are int64 [tokens]. Raises: ValueError."""
    if labels.shape != (tokens,) or labels.dtype != torch.int64:
        raise ValueError(
            f"labels: got shape {tuple(labels.shape)}, {labels.dtype}; expected int64 [{tokens}], one per token"
        )


def check_temperature(temperature: float) -> None:
    """Check that it is finite and positive. Raises: ValueError."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(
            f"temperature: got {temperature}, expected a finite number > 0; decode greedily with argmax instead"
        )


class _VocabParallelStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        shard: VocabShard,
        temperature: float,
        with_sum_p2: bool,
        block_rows: int | None,
    ) -> tuple[Tensor, ...]:
        columns, real_columns = labels - shard.start, shard.real_columns(logits.shape[1])
        kernels = device.vocab_kernels(logits)
        local = kernels.shard_stats(logits, columns, real_columns, temperature, with_sum_p2, block_rows)
        maximum, log_s, *outputs = merge_shards(local, shard.group, temperature)
        ctx.save_for_backward(logits, columns, maximum, log_s, outputs[1])
        ctx.real_columns, ctx.temperature, ctx.block_rows, ctx.consumed = real_columns, temperature, block_rows, False
        ctx.set_materialize_grads(False)  # None tells that an output is unused, and then its terms cost nothing
        ctx.mark_non_differentiable(*outputs[2:])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: None) -> tuple[Any, ...]:
        if ctx.consumed:
            raise RuntimeError(
                "second backward through vocab_parallel_stats: the first one overwrote the logits with their gradient; "
                "add the losses and call backward once, or run the forward pass again"
            )
        grad = None
        if grad_logprobs is not None or grad_entropy is not None:
            logits, columns, maximum, log_s, entropy = ctx.saved_tensors
            ctx.consumed = True
            grad = logits.detach()
            factors = gradient_coefficients(log_s, entropy, grad_logprobs, grad_entropy, ctx.temperature)
            device.vocab_kernels(grad).write_gradient(
                grad, columns, ctx.real_columns, maximum, *factors, ctx.temperature, ctx.block_rows
            )
        return grad, None, None, None, None, None


def _all_gather(local: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return every rank's statistics: [R, T, 4 or 6]. The one collective of this file."""
    if group is None or group.size() == 1 or local.numel() == 0:
        return local[None]
    gathered = local.new_empty(group.size(), *local.shape)
    dist.all_gather(list(gathered), local, group=group)
    return gathered


def merge_shards(
    local: Float[Tensor, "T C"], group: ProcessGroup | None, temperature: float
) -> tuple[Float[Tensor, "T"], ...]:
    """Merge the statistics of all ranks' shards (`kernels`' `shard_stats`) into the whole vocabulary's; one collective.

    Returns: the global maximum (before the temperature), log S, logprobs, entropy and, when `local` has 6 columns and
        not 4, sum_p2 and sum_p2_logp, in the dtype of `local`.
    """
    return tuple(x.to(local.dtype) for x in merge_stacked(_all_gather(local, group), temperature))


def merge_stacked(shards: Float[Tensor, "R T C"], temperature: float) -> tuple[Float64[Tensor, "T"], ...]:
    """Return what `merge_shards` does, in float64, from the statistics of all shards.

    The maximum and log S stay apart: their sum, one log-sum-exp, has no bits left for log S when logits are large.
    """
    m, s, t, z, *p2 = shards.double().unbind(-1)
    maximum = m.amax(0)
    delta = ((m - maximum) / temperature).clamp(min=_LOWEST_EXPONENT)
    w = delta.exp()
    total = (w * s).sum(0)
    log_s = total.log()
    logprobs = (z.amax(0) - maximum) / temperature - log_s
    entropy = log_s - (w * (t + delta * s)).sum(0) / total
    if not p2:
        return maximum, log_s, logprobs, entropy
    q, u = p2
    w2 = (w / total).square()
    sum_p2 = (w2 * q).sum(0)
    return maximum, log_s, logprobs, entropy, sum_p2, (w2 * (u + delta * q)).sum(0) - log_s * sum_p2


def gradient_coefficients(
    log_s: Float[Tensor, "T"],
    entropy: Float[Tensor, "T"],
    grad_logprobs: Float[Tensor, "T"] | None,
    grad_entropy: Float[Tensor, "T"] | None,
    temperature: float,
) -> tuple[Float[Tensor, "T"], Float[Tensor, "T"] | None, Float[Tensor, "T"] | None]:
    """Return a, b and at_target: the logits' gradient is e^d (a + b d), plus at_target at the target. None is 0.

    pi = e^d / S, d logp / dx = (1[target] - pi) / temperature, dH / dx = -pi (log pi + H) / temperature.
    """
    scale = torch.exp(-log_s) / temperature
    a = torch.zeros_like(scale)
    b = at_target = None
    if grad_logprobs is not None:
        a -= grad_logprobs * scale
        at_target = grad_logprobs / temperature
    if grad_entropy is not None:
        a -= grad_entropy * (entropy - log_s) * scale
        b = -grad_entropy * scale
    return a, b, at_target
