"""Context parallelism: which tokens of a packed micro-batch a rank holds, and the gathering of all of them.

Each sequence is padded to a multiple of 2 * size tokens and cut into 2 * size chunks; rank r holds the chunks r and
2 * size - 1 - r, so that causal attention costs every rank the same. Transformer Engine splits in the same way.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rl.parallel.reduce import all_gather_flat
from megatron_rl.types import Int, Int64, Shaped

# torch 2.13 renamed it; the old name warns
_reduce_scatter_flat = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def local_tokens(cu_seqlens: Int[Tensor, "E"], rank: int, size: int) -> Int64[Tensor, "T"]:
    """Return which of the T * size packed tokens the rank holds, in its order.

    cu_seqlens: of the whole padded sequences; those of the rank's part are cu_seqlens / size.
    Raises: ValueError when a sequence is not a multiple of 2 * size long.
    """
    if size == 1:
        return torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    lengths = cu_seqlens.diff().long()
    if bool((lengths % (2 * size)).any()):
        raise ValueError(
            f"sequences of {lengths.tolist()} tokens: over {size} ranks each must be a multiple of {2 * size}"
        )
    chunks = lengths // (2 * size)
    held = torch.stack([torch.full_like(chunks, rank), torch.full_like(chunks, 2 * size - 1 - rank)], dim=1).flatten()
    starts = cu_seqlens[:-1].long().repeat_interleave(2) + held * chunks.repeat_interleave(2)
    widths = chunks.repeat_interleave(2)
    ends = widths.cumsum(0)
    return torch.arange(int(ends[-1]), device=cu_seqlens.device) + (starts - (ends - widths)).repeat_interleave(widths)


def gather_tokens(
    local: Shaped[Tensor, "T *shape"], cu_seqlens: Int[Tensor, "E"], group: ProcessGroup
) -> Shaped[Tensor, "_ *shape"]:
    """Return all T * size tokens in packed order, from every rank's part of T. Differentiable: the gradient of a rank's
    part is the sum of what all ranks send back to it.

    cu_seqlens: of the whole padded sequences.
    """
    size = dist.get_world_size(group)
    held = torch.cat([local_tokens(cu_seqlens, rank, size) for rank in range(size)])
    gathered: Tensor = _Gather.apply(local, group)  # type: ignore[no-untyped-call]
    return gathered[held.argsort()]


class _Gather(torch.autograd.Function):
    """Puts the ranks' parts [T, ...] one behind the other: [T * size, ...]."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        size = dist.get_world_size(group)
        whole = local.new_empty(size * local.shape[0], *local.shape[1:])
        all_gather_flat(whole, local.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        size = dist.get_world_size(ctx.group)
        local = grad.new_empty(grad.shape[0] // size, *grad.shape[1:])
        _reduce_scatter_flat(local, grad.contiguous(), group=ctx.group)
        return local, None
