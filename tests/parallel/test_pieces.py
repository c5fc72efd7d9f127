"""A tensor is put together from its ranks' pieces to the last bit, on one rank alone."""

from __future__ import annotations

import math

import torch

from tests.worlds import Worlds

WHOLE = torch.tensor([1.5, -0.0, math.nan, -math.inf, 1e-45, 7.0, -0.0])
RANGES = [(4, 7), (0, 0), (0, 4)]


def _assembled(owner: int) -> torch.Tensor | None:
    import torch.distributed as dist

    from megatron_rl.parallel.pieces import assemble

    rank = dist.get_rank()
    piece = WHOLE[slice(*RANGES[rank])] if rank != 1 else None
    return assemble(piece, RANGES, owner, dist.group.WORLD)


def test_pieces_become_the_whole_bit_for_bit(worlds: Worlds) -> None:
    for owner in (0, 2):
        found = worlds.run(3, _assembled, owner)
        assert [whole is None for whole in found] == [rank != owner for rank in range(3)]
        assert torch.equal(found[owner].view(torch.int32), WHOLE.view(torch.int32))
