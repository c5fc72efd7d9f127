"""A flat tensor whose pieces lie on several ranks, put together on one of them."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rl import device
from megatron_rl.types import Shaped


def assemble(
    piece: Shaped[Tensor, "..."] | None, ranges: Sequence[tuple[int, int]], owner: int, group: ProcessGroup
) -> Shaped[Tensor, "..."] | None:
    """Return the whole float32 tensor in the host's memory of the group's rank `owner`, None on the others. A
    collective of `group`, which takes the whole tensor's bytes of each rank's device meanwhile.

    `ranges`: (start, end) of what each rank holds, disjoint; (0, 0) where it holds nothing and `piece` is None.
    """
    rank = dist.get_rank(group)
    # the sum of the bits as whole numbers: a sum of floats would make 0.0 of -0.0
    whole = torch.zeros(max(end for _, end in ranges), dtype=torch.int32, device=device.device())
    if piece is not None:
        whole[slice(*ranges[rank])] = piece.view(torch.int32)
    dist.reduce(whole, dst=dist.get_global_rank(group, owner), group=group)
    return whole.view(torch.float32).cpu() if rank == owner else None
