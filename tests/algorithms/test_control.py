"""Options that follow the entropy: the rules by hand, the bounds, and two loops that must settle."""

from __future__ import annotations

import math
from typing import Any

import pytest

from megatron_rl.algorithms.control import adapt, follows_entropy
from megatron_rl.algorithms.methods.clip_cov import ClipCovLoss
from megatron_rl.algorithms.methods.forking import ForkingLoss
from megatron_rl.algorithms.methods.kl_cov import KlCovLoss
from megatron_rl.algorithms.methods.ppo_clip import PpoClipLoss
from megatron_rl.algorithms.policy_loss import PolicyLoss


def follow(loss: PolicyLoss, entropies: list[float], state: dict[str, float] | None = None) -> list[dict[str, float]]:
    """The metrics of each step."""
    state, rows = state or {}, []
    for step, entropy in enumerate(entropies):
        in_force, state, metrics = adapt(loss, state, entropy, step)
        for name, value in metrics.items():
            assert getattr(in_force, name.removeprefix("control/")) == value
        rows.append(metrics)
    return rows


def adaptive(**options: Any) -> PpoClipLoss:
    return PpoClipLoss.model_validate({"adaptive_entropy": {"target_entropy": 0.2, "step": 0.005, **options}})


def test_the_coefficient_counts_steps_and_acts_only_at_or_below_the_target() -> None:
    rows = follow(adaptive(), [0.5, 0.1, 0.1, 0.3, 0.1, 0.2, 0.1, math.nan, 0.1])
    # c_k of these steps: 0 (never negative), 0, 0.005, 0.01, 0.005, 0.01, 0.01 (at the target), 0.015, 0.015
    assert [row["control/entropy_coef"] for row in rows] == pytest.approx([0, 0, 0.005, 0, 0.005, 0.01, 0.01, 0, 0.015])
    capped = follow(adaptive(initial_coef=0.004, max_coef=0.006), [0.1] * 3)
    assert [row["control/entropy_coef"] for row in capped] == pytest.approx([0.004, 0.006, 0.006])


BAND = {"low": 0.3, "high": 0.5, "gain": 2.0, "integral_gain": 0.5, "minimum": 0.01, "maximum": 0.4}


def test_the_band_by_hand() -> None:
    loss = ClipCovLoss.model_validate({"select_fraction": 0.1, "entropy_band": BAND})
    rows = follow(loss, [0.4, 0.2, 0.3, 0.8, math.nan, 0.5])
    # bases: 0.1, 0.1, then up by 0.5 * 0.1, then down by 0.5 * 0.3; and at once by 2 * 0.1 and 2 * -0.3
    up, down = 0.1 * math.exp(0.05), 0.1 * math.exp(0.05 - 0.15)
    expected = [0.1, 0.1 * math.exp(0.2), up, up * math.exp(-0.6), down, down]
    assert [row["control/select_fraction"] for row in rows] == pytest.approx(expected)
    ends = [row["control/select_fraction"] for row in follow(loss, [0.0] * 20 + [3.0] * 8)]
    assert ends[19] == 0.4 and ends[27] == 0.01


def test_a_state_of_other_options_or_bounds_is_taken_over_as_far_as_it_fits() -> None:
    loss = KlCovLoss.model_validate({"kl_coef": 1.0, "entropy_band": {**BAND, "option": "kl_coef", "maximum": 2.0}})
    in_force, state, _ = adapt(loss, {"kl_coef": 7.0, "entropy_coef": 0.3}, 0.4, 0)
    assert in_force.kl_coef == 2.0 and state == {"kl_coef": 2.0} and in_force.entropy_coef == 0
    plain = PpoClipLoss()
    assert adapt(plain, {"entropy_coef": 1.0}, 0.1, 0) == (plain, {}, {}) and adapt(plain, {}, 0.1, 0)[0] is plain
    assert follows_entropy(loss) and not follows_entropy(plain)


def test_an_option_that_restrains_by_small_values_falls_with_the_entropy() -> None:
    band = BAND | {"option": "keep_fraction"}
    loss = ForkingLoss.model_validate({"keep_fraction": 0.2, "entropy_band": band})
    rows = follow(loss, [0.2, 0.8])
    base = 0.2 * math.exp(-0.05)
    expected = [0.2 * math.exp(-0.2), min(0.4, base * math.exp(0.6))]
    assert [row["control/keep_fraction"] for row in rows] == pytest.approx(expected)


def test_schedules_by_hand() -> None:
    moving = {"eps_high": {"from": 0.2, "to": 0.3, "steps": 4}, "dual_clip": 3.0}
    moving["eps_low"] = {"from": 0.2, "to": 0.1, "steps": 2, "shape": "cosine"}
    loss = PpoClipLoss.model_validate(moving)
    rows = follow(loss, [math.nan] * 6)
    assert [row["control/eps_high"] for row in rows] == pytest.approx([0.2, 0.225, 0.25, 0.275, 0.3, 0.3])
    assert [row["control/eps_low"] for row in rows] == pytest.approx([0.2, 0.15, 0.1, 0.1, 0.1, 0.1])
    assert loss.eps_high == 0.2 and rows[4]["control/eps_high"] == rows[5]["control/eps_high"] == 0.3
    slow = loss.schedules["eps_high"].model_copy(update={"shape": "cosine"})
    assert [slow.at(step) for step in range(5)] == pytest.approx([0.2, 0.2146447, 0.25, 0.2853553, 0.3])
    assert not follows_entropy(loss) and adapt(loss, {"eps_high": 9.0}, math.nan, 1)[1] == {}
    again = PpoClipLoss.model_validate(loss.model_dump(mode="json"))
    assert again == loss and again.model_dump(mode="json")["schedules"]["eps_low"]["from"] == 0.2


@pytest.mark.parametrize("start", [0.9, 0.05])
def test_the_band_settles_from_both_sides(start: float) -> None:
    """An entropy that falls by 2% a step without restraint and rises under too much of it, at the default gains."""
    band = {"low": 0.3, "high": 0.5, "option": "kl_coef", "minimum": 0.05, "maximum": 20}
    loss = KlCovLoss.model_validate({"kl_coef": 1.0, "entropy_band": band})
    entropy, state, path = start, {}, []
    for step in range(600):
        in_force, state, _ = adapt(loss, state, entropy, step)
        entropy *= 1 + 0.01 * (in_force.kl_coef - 2.0)
        path.append(entropy)
    assert all(0.28 < value < 0.52 for value in path[300:])
    assert abs(path[-1] - path[-100]) < 0.02
