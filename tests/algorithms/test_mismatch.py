from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from megatron_rl.algorithms.mismatch import rollout_weights
from megatron_rl.config.loss import RolloutCorrection
from megatron_rl.types import LossInputs


def inputs_of(old: Tensor, rollout: Tensor, mask: Tensor, cu_seqlens: list[int]) -> LossInputs:
    zeros = torch.zeros_like(old)
    bounds = torch.tensor(cu_seqlens, dtype=torch.int32)
    return LossInputs(zeros, zeros, old, rollout, None, zeros, mask, zeros, bounds, None)


def ratios(*values: float) -> Tensor:
    return torch.tensor(values).log()


ALL = torch.ones(4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [2.0, 0.5, 1.5, 0.25]),
        ({"level": "sequence"}, [1.5, 1.5, 0.375, 0.375]),
        ({"level": "sequence", "cap": 1.2}, [1.2, 1.2, 0.375, 0.375]),
        ({"weights": "mask"}, [0.0, 0.5, 1.5, 0.0]),
        ({"weights": "mask", "level": "sequence"}, [1.5, 1.5, 0.0, 0.0]),
        # k3: 3 - 1 - ln 3 = 0.9014 and 0.5 - 1 + ln 2 = 0.1931, mean 0.547; 0.0945 and 0.6363, mean 0.365
        ({"weights": "none", "max_kl": 0.5}, [0.0, 0.0, 1.0, 1.0]),
        ({"max_kl": 0.3}, [0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_by_hand(options: dict[str, object], expected: list[float]) -> None:
    old = ratios(3.0, 0.5, 1.5, 0.25).requires_grad_()
    weights, metrics = rollout_weights(
        inputs_of(old, torch.zeros(4), ALL, [0, 2, 4]), RolloutCorrection.model_validate(options)
    )
    torch.testing.assert_close(weights, torch.tensor(expected))
    assert not weights.requires_grad
    assert metrics["loss/is_weight"].tolist() == pytest.approx([sum(expected), 4])
    assert metrics["loss/is_weight_squared"].tolist() == pytest.approx([sum(w * w for w in expected), 4])


def test_fractions_count_tokens() -> None:
    inputs = inputs_of(ratios(3.0, 0.5, 1.5, 0.25), torch.zeros(4), ALL, [0, 2, 4])
    _, metrics = rollout_weights(inputs, RolloutCorrection(cap=1.0, max_kl=0.5))
    assert metrics["loss/is_truncated_fraction"].tolist() == [2, 4]
    assert metrics["loss/is_rejected_fraction"].tolist() == [2, 4]
    _, metrics = rollout_weights(inputs, RolloutCorrection(weights="mask", cap=2.0, floor=0.3))
    assert metrics["loss/is_masked_fraction"].tolist() == [2, 4]


def reference(old: Tensor, rollout: Tensor, mask: Tensor, bounds: list[int], options: RolloutCorrection) -> list[float]:
    """One sequence at a time, in Python's floats."""
    weights = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        counted = [i for i in range(start, end) if mask[i]]
        logs = {i: float(old[i].double() - rollout[i].double()) for i in counted}
        kl = sum(math.exp(d) - 1 - d for d in logs.values()) / max(1, len(counted))
        for i in range(start, end):
            if i not in logs:
                weights.append(math.nan)
                continue
            w = math.exp(sum(logs.values()) if options.level == "sequence" else logs[i])
            if options.weights == "truncate":
                w = min(w, options.cap)
            elif options.weights == "mask":
                w = w if options.floor <= w <= options.cap else 0.0
            else:
                w = 1.0
            weights.append(0.0 if options.max_kl is not None and kl > options.max_kl else w)
    return weights


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["truncate", "mask", "none"])
def test_against_one_sequence_at_a_time(kind: str, level: str) -> None:
    """Random packed sequences, an empty and a fully masked one among them; any split into micro-batches is the same."""
    options = RolloutCorrection.model_validate(
        {"weights": kind, "level": level, "cap": 1.3, "floor": 0.8, "max_kl": 0.02}
    )
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 1, 0, 17, 9, 4, 12]
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    old, rollout = (torch.randn(bounds[-1], generator=generator) * 0.15 - 2 for _ in range(2))
    mask = torch.rand(bounds[-1], generator=generator) < 0.7
    mask[bounds[4] : bounds[5]] = False
    clean = [torch.where(mask, x, 0.0) for x in (old, rollout)]
    weights, metrics = rollout_weights(inputs_of(*clean, mask, bounds), options)
    expected = torch.tensor(reference(old, rollout, mask, bounds, options))
    torch.testing.assert_close(weights[mask], expected[mask], rtol=1e-5, atol=1e-6)
    if kind != "none":
        assert 0 < int((expected[mask] == 0).sum()) < int(mask.sum())
    cut = bounds[4]
    halves = [
        rollout_weights(inputs_of(clean[0][part], clean[1][part], mask[part], part_bounds), options)
        for part, part_bounds in (
            (slice(0, cut), bounds[:5]),
            (slice(cut, None), [bound - cut for bound in bounds[4:]]),
        )
    ]
    assert torch.equal(torch.cat([half[0] for half in halves])[mask], weights[mask])
    for name, pair in metrics.items():
        torch.testing.assert_close(halves[0][1][name] + halves[1][1][name], pair)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"weights": "mask", "floor": 2.0}, "must be below cap"), ({"weights": "none"}, "corrects nothing")],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RolloutCorrection.model_validate(options)
