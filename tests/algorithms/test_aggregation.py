"""Token weights: hand-computed, and independent of how sequences are packed."""

from __future__ import annotations

import typing

import pytest
import torch

from megatron_rl.algorithms.aggregation import AGGREGATIONS, segment_ids, token_weights
from megatron_rl.algorithms.policy_loss import PolicyLoss
from tests import shape_checks

# sequences of 4, 3, 0 and 2 tokens (the third empty, the last padding); 2, 3, 0 and 0 tokens count
LOSS_MASK = torch.tensor([0, 1, 1, 0, 1, 1, 1, 0, 0], dtype=torch.bool)
CU_SEQLENS = torch.tensor([0, 4, 7, 7, 9], dtype=torch.int32)


def test_the_registry_is_the_config() -> None:
    assert set(AGGREGATIONS) == set(typing.get_args(PolicyLoss.model_fields["aggregation"].annotation))


@pytest.mark.parametrize(
    ("mode", "first", "second", "denominator"),
    [
        ("token_mean", 1.0, 1.0, 5),
        ("seq_mean_token_mean", 1 / 2, 1 / 3, 2),
        ("seq_mean_token_sum", 1.0, 1.0, 2),
        ("constant_length", 1 / 8, 1 / 8, 2),
    ],
)
def test_hand_computed(mode: str, first: float, second: float, denominator: int) -> None:
    weights, got = token_weights(mode, LOSS_MASK, CU_SEQLENS, constant_length=8)
    expected = torch.tensor([0, first, first, 0, second, second, second, 0, 0])
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, expected)
    assert type(got) is int and got == denominator


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_packing_does_not_matter(mode: str) -> None:
    torch.manual_seed(1)
    masks = [torch.rand(length) < 0.6 for length in (5, 1, 9, 4, 7)] + [torch.zeros(3, dtype=torch.bool)]

    def pack(order: list[int]) -> tuple[dict[int, torch.Tensor], int]:
        lengths = [len(masks[i]) for i in order]
        boundaries = torch.tensor([0, *lengths]).cumsum(0).int()
        weights, denominator = token_weights(mode, torch.cat([masks[i] for i in order]), boundaries, 16)
        return dict(zip(order, weights.split(lengths), strict=True)), denominator

    whole, denominator = pack([0, 1, 2, 3, 4, 5])
    parts = [pack([4, 0]), pack([5]), pack([2]), pack([3, 1])]
    assert sum(part[1] for part in parts) == denominator
    for weights, _ in parts:
        for index, values in weights.items():
            assert torch.equal(values, whole[index])


def test_segment_ids_skip_empty_sequences() -> None:
    assert segment_ids(CU_SEQLENS, 9).tolist() == [0, 0, 0, 0, 1, 1, 1, 3, 3]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="'mean' is unknown; expected one of token_mean"):
        token_weights("mean", LOSS_MASK, CU_SEQLENS, 8)
    with pytest.raises(ValueError, match="boundaries from 0 to 7"):
        token_weights("token_mean", LOSS_MASK, CU_SEQLENS[:3], 8)
    with shape_checks.off(), pytest.raises(ValueError, match="bool loss_mask"):
        token_weights("token_mean", LOSS_MASK.int(), CU_SEQLENS, 8)
    with pytest.raises(ValueError, match="at least 1 token"):
        token_weights("constant_length", LOSS_MASK, CU_SEQLENS, 0)
