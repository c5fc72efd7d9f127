"""What a reward function may return."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rl.grading.verdict import judge


@pytest.mark.parametrize(
    "value",
    [1, True, 1.0, Decimal(1), np.bool_(True), np.float32(1), np.int64(1), np.array(1.0), torch.tensor([1.0])],
)
def test_scalars_of_any_kind_are_scores(value: Any) -> None:
    verdict = judge([lambda response, answer: value], "", "")
    assert verdict.values == (1.0,) and type(verdict.values[0]) is float and not verdict.error


@pytest.mark.parametrize(
    "value",
    [
        None,
        "1",
        float("nan"),
        np.float64("inf"),
        1j,
        pytest.param(10**400, id="10**400"),
        Decimal("1e400"),
        np.array([1.0, 2.0]),
        torch.ones(2),
    ],
)
def test_all_else_fails_the_answer(value: Any) -> None:
    verdict = judge([lambda response, answer: value], "", "")
    assert verdict.values == (0.0,) and verdict.error
