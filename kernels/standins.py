"""What stands for a GPU's kernels where tensors have no values: the same shapes, the same memory."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

fusing = 0  # how many functions around the current one are one kernel, whose temporaries are no tensors
tell: Callable[[Any, str], None] = lambda results, name: None  # noqa: E731  hears of what such a kernel makes


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function as a compiler would leave it: one kernel that allocates its results alone."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        global fusing
        fusing += 1
        try:
            results = function(*args, **kwargs)
        finally:
            fusing -= 1
        tell(results, function.__name__)
        return results

    return call


def rms_norm(x: Tensor, normalized_shape: Any, weight: Tensor, eps: float | None = None) -> Tensor:
    """Return what stands for torch.nn.functional.rms_norm, which a GPU computes in one kernel each way."""
    normed: Tensor = _RMSNorm.apply(x, weight)
    return normed


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
    logits: Tensor, columns: Tensor, real_columns: int, temperature: float, with_sum_p2: bool, *_: Any
) -> Tensor:
    """Return what `vocab_torch.shard_stats` would, of real numbers, so that what follows runs on numbers: entropies up
    to 0.6 nats drawn by the number of rows, and targets as likely as these say."""
    entropy = torch.rand(len(logits), generator=torch.Generator().manual_seed(len(logits))) * 0.6
    ones = torch.ones_like(entropy)
    stats = [20 * ones, ones, -entropy, 20 - temperature * entropy]
    return torch.stack(stats + [0.6 * ones, -0.1 * ones] * with_sum_p2, dim=1)


def write_gradient(*_: Any) -> None:
    """Leave the logits: `vocab_torch.write_gradient` overwrites them in place, and allocates nothing that lasts."""
