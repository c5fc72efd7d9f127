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


def rms_norm(x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """Return torch.nn.functional.rms_norm by the one kernel that a GPU has for it."""
    return torch.ops.aten._fused_rms_norm(x, normalized_shape, weight, eps)[0]


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
