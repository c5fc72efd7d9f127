"""What stands for a GPU's kernels where tensors have no values: the same shapes, the same memory.

Of logits without values the statistics are plausible random numbers, so that what is computed from them on (selection,
loss, metrics) runs on real numbers of every token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves

_ENTROPY = 0.6  # nats, at most: what a trained policy has
_MAXIMUM = 20.0


class Fusion:
    """Whether a fused kernel runs, whose temporaries are no tensors, and who is told of its results."""

    depth = 0
    tell: Callable[[Tensor], None] = staticmethod(lambda tensor: None)


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function as a compiler would leave it: one kernel that allocates its results alone."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        Fusion.depth += 1
        try:
            results = function(*args, **kwargs)
        finally:
            Fusion.depth -= 1
        if not Fusion.depth:
            for tensor in tree_leaves(results):
                Fusion.tell(tensor)
        return results

    return call


def rms_norm(x: Tensor, normalized_shape: Any, weight: Tensor, eps: float | None = None) -> Tensor:
    """Return what stands for torch.nn.functional.rms_norm, which a GPU computes in one kernel each way."""
    return _RMSNorm.apply(x, weight)  # type: ignore[no-any-return]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def shard_stats(
    logits: Tensor,
    columns: Tensor,
    real_columns: int,
    temperature: float,
    with_sum_p2: bool,
    block_rows: int | None = None,
) -> Tensor:
    """Return what `vocab_torch.shard_stats` would, of real numbers drawn by the number of rows: entropies up to 0.6
    nats, and targets as likely as these say."""
    rows = logits.shape[0]
    entropy = torch.rand(rows, generator=torch.Generator().manual_seed(rows)) * _ENTROPY
    ones, likely = torch.ones(rows), _MAXIMUM - temperature * entropy
    stats = [_MAXIMUM * ones, ones, -entropy, likely]
    return torch.stack(stats + [0.6 * ones, -0.1 * ones] * with_sum_p2, dim=1)


def write_gradient(*_: Any) -> None:
    """Leave the logits: `vocab_torch.write_gradient` overwrites them in place, and allocates nothing that lasts."""
