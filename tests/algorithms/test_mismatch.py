from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from megatron_rl.algorithms.mismatch import rollout_weights
from megatron_rl.algorithms.policy_loss import RolloutCorrection
from megatron_rl.types import LossInputs


def inputs_of(
    old: Tensor,
    rollout: Tensor,
    mask: Tensor,
    cu_seqlens: list[int],
    current: Tensor | None = None,
    advantages: Tensor | None = None,
) -> LossInputs:
    zeros = torch.zeros_like(old)
    bounds = torch.tensor(cu_seqlens, dtype=torch.int32)
    current, advantages = zeros if current is None else current, zeros if advantages is None else advantages
    return LossInputs(current, zeros, old, rollout, None, advantages, mask, zeros, bounds, None)


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
        # roots of 3 * 0.5 and 1.5 * 0.25
        ({"level": "geometric"}, [1.2247449, 1.2247449, 0.6123724, 0.6123724]),
        ({"level": "geometric", "cap": 1.1}, [1.1, 1.1, 0.6123724, 0.6123724]),
        ({"level": "geometric", "weights": "mask", "cap": 1.2}, [0.0, 0.0, 0.6123724, 0.6123724]),
        ({"level": "geometric", "weights": "reject", "cap": 1.3, "floor": 0.7}, [1.0, 1.0, 0.0, 0.0]),
        ({"level": "sequence", "weights": "reject", "cap": 1.4, "floor": 0.3}, [0.0, 0.0, 1.0, 1.0]),
        ({"weights": "reject", "floor": 0.3}, [0.0, 1.0, 1.0, 0.0]),
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


@pytest.mark.parametrize(
    ("limit", "expected"), [(0.6, [0.0, 0.0, 1.0, 1.0, 0.0, 0.0]), (0.7, [1.0, 1.0, 1.0, 1.0, 0.0, 0.0])]
)
def test_off_policy_sequences_of_negative_advantage_are_dropped(limit: float, expected: list[float]) -> None:
    """Means of log(rollout / current): ln 2, then (ln 4 + 0) / 2 = ln 2 of positive advantage, then ln 8 / 2 = 1.04;
    what the old policy is does not matter."""
    current = ratios(0.5, 0.5, 0.25, 1.0, 0.5, 0.25).requires_grad_()
    advantages = torch.tensor([-1.0, -1.0, 1.0, 1.0, -0.5, -0.5])
    rollout = torch.zeros(6)
    for old in (rollout, torch.rand(6)):
        inputs = inputs_of(old, rollout, torch.ones(6, dtype=torch.bool), [0, 2, 4, 6], current, advantages)
        weights, metrics = rollout_weights(inputs, RolloutCorrection(weights="none", max_negative_kl=limit))
        assert weights.tolist() == expected and not weights.requires_grad
        assert metrics["loss/is_dropped_negative_fraction"].tolist() == [expected.count(0.0), 6]


def reference(inputs: LossInputs, bounds: list[int], options: RolloutCorrection) -> list[float]:
    """One sequence at a time, in Python's floats."""
    weights, mask = [], inputs.loss_mask
    old, rollout, current = (
        x.double().tolist() for x in (inputs.old_logprobs, inputs.rollout_logprobs, inputs.logprobs)
    )
    for start, end in zip(bounds, bounds[1:], strict=False):
        counted = [i for i in range(start, end) if mask[i]]
        logs = {i: old[i] - rollout[i] for i in counted}
        kl = sum(math.exp(d) - 1 - d for d in logs.values()) / max(1, len(counted))
        for i in range(start, end):
            if i not in logs:
                weights.append(math.nan)
                continue
            product = math.prod(math.exp(log) for log in logs.values())
            w = {"token": math.exp(logs[i]), "sequence": product, "geometric": product ** (1 / len(logs))}[
                options.level
            ]
            if options.weights == "truncate":
                w = min(w, options.cap)
            elif options.weights in ("mask", "reject"):
                inside = 1.0 if options.weights == "reject" else w
                w = inside if options.floor <= w <= options.cap else 0.0
            else:
                w = 1.0
            away = sum(rollout[j] - current[j] for j in counted) / len(counted)
            is_far = options.max_negative_kl is not None and away > options.max_negative_kl
            if is_far and inputs.advantages[i] < 0 or options.max_kl is not None and kl > options.max_kl:
                w = 0.0
            weights.append(w)
    return weights


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("kind", ["truncate", "mask", "reject", "none"])
def test_against_one_sequence_at_a_time(kind: str, level: str) -> None:
    """Random packed sequences, an empty and a fully masked one among them; any split into micro-batches is the same."""
    bound = {"cap": 1.03, "floor": 0.97} if level == "geometric" else {"cap": 1.3, "floor": 0.8}
    limits = {"max_kl": 0.025, "max_negative_kl": 0.02}
    options = RolloutCorrection.model_validate({"weights": kind, "level": level} | bound | limits)
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 1, 0, 17, 9, 4, 12, 8, 6]
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    old, rollout, current = (torch.randn(bounds[-1], generator=generator) * 0.15 - 2 for _ in range(3))
    mask = torch.rand(bounds[-1], generator=generator) < 0.7
    mask[bounds[4] : bounds[5]] = False
    advantages = torch.tensor([-1.0, 1.0, 0.0, -0.5, -1.0, 2.0, 0.0, -1.0, -2.0]).repeat_interleave(
        torch.tensor(lengths)
    )
    clean = [torch.where(mask, x, 0.0) for x in (old, rollout, current, advantages)]

    def inputs(start: int, end: int) -> LossInputs:
        part = slice(bounds[start], bounds[end])
        cut = [values[part] for values in clean]
        return inputs_of(*cut[:2], mask[part], [i - bounds[start] for i in bounds[start : end + 1]], *cut[2:])

    whole = inputs(0, len(lengths))
    weights, metrics = rollout_weights(whole, options)
    expected = torch.tensor(reference(whole, bounds, options))
    torch.testing.assert_close(weights[mask], expected[mask], rtol=1e-5, atol=1e-6)
    assert 0 < int((expected[mask] == 0).sum()) < int(mask.sum())
    assert 0 < float(metrics["loss/is_dropped_negative_fraction"][0]) < int(mask.sum())
    halves = [rollout_weights(inputs(0, 4), options), rollout_weights(inputs(4, len(lengths)), options)]
    assert torch.equal(torch.cat([half[0] for half in halves])[mask], weights[mask])
    for name, pair in metrics.items():
        torch.testing.assert_close(halves[0][1][name] + halves[1][1][name], pair)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "mask", "floor": 2.0}, "must be below cap"),
        ({"weights": "reject", "floor": 2.0}, "must be below cap"),
        ({"weights": "none"}, "corrects nothing"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RolloutCorrection.model_validate(options)
