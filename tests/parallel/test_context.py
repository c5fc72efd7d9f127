"""The zig-zag split of packed sequences, by hand and over gloo."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.parallel.context import gather_tokens, local_tokens
from tests.worlds import Worlds

CU_SEQLENS = torch.tensor([0, 8, 8, 12], dtype=torch.int32)  # chunks of 2 tokens, an empty sequence, chunks of 1


def test_each_rank_holds_an_early_and_a_late_chunk_of_every_sequence() -> None:
    assert local_tokens(CU_SEQLENS, 0, 2).tolist() == [0, 1, 6, 7, 8, 11]
    assert local_tokens(CU_SEQLENS, 1, 2).tolist() == [2, 3, 4, 5, 9, 10]
    assert local_tokens(CU_SEQLENS, 0, 1).tolist() == list(range(12))
    assert local_tokens(torch.tensor([0, 12]), 1, 3).tolist() == [2, 3, 8, 9]
    with pytest.raises(ValueError, match=r"sequences of \[8, 6\] tokens: over 2 ranks each must be a multiple of 4"):
        local_tokens(torch.tensor([0, 8, 14]), 0, 2)


def _gathered(whole: Tensor) -> tuple[Tensor, Tensor]:
    """What a rank sees of all tokens, and the gradient of its own when rank r weighs token t by (r + 1) * t."""
    mine = whole[local_tokens(CU_SEQLENS, dist.get_rank(), 2)].requires_grad_()
    seen = gather_tokens(mine, CU_SEQLENS, dist.group.WORLD)
    weights = (dist.get_rank() + 1) * torch.arange(12.0)
    (seen * weights[:, None]).sum().backward()
    return seen.detach(), mine.grad


def test_gathering_restores_the_order_and_returns_the_sum_of_the_gradients(worlds: Worlds) -> None:
    whole = torch.randn(12, 3)
    for rank, (seen, grad) in enumerate(worlds.run(2, _gathered, whole)):
        assert torch.equal(seen, whole)
        assert torch.equal(grad, 3.0 * local_tokens(CU_SEQLENS, rank, 2)[:, None].expand(6, 3))
