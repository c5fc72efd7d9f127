"""Advantage estimators against hand-computed numbers and per-group loops."""

from __future__ import annotations

import random
import statistics
import typing
from fractions import Fraction

import pytest
import torch

from megatron_rl.algorithms.advantages import ADVANTAGES
from megatron_rl.config import AlgorithmConfig
from tests import shape_checks

# two interleaved prompts: 5 has rewards 1, 0, 0 and 9 has 2, 4, 6
REWARDS = torch.tensor([1.0, 2.0, 0.0, 4.0, 0.0, 6.0])
PROMPT_IDS = torch.tensor([5, 9, 5, 9, 5, 9])


def estimate(name: str, rewards: torch.Tensor, prompt_ids: torch.Tensor, **options: float) -> torch.Tensor:
    return ADVANTAGES[name](rewards, prompt_ids, AlgorithmConfig(**options))


def test_the_registry_is_the_config() -> None:
    literal = AlgorithmConfig.model_fields["advantage"].annotation
    assert set(ADVANTAGES) == set(typing.get_args(literal))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # prompt 5: mean 1/3, std sqrt(1/3) = 0.57735; prompt 9: mean 4, std 2
        ("grpo", [1.1546985, -1.0, -0.5773493, 0.0, -0.5773493, 1.0]),
        ("dr_grpo", [2 / 3, -2.0, -1 / 3, 0.0, -1 / 3, 2.0]),
        # 1 - mean(0, 0); 2 - mean(4, 6); ...
        ("rloo", [1.0, -3.0, -0.5, 0.0, -0.5, 3.0]),
        # the dr_grpo values over their std, sqrt((4/9 + 1/9 + 1/9 + 4 + 0 + 4) / 5) = 1.3165612
        ("reinforce_pp", [0.5063694, -1.5191081, -0.2531847, 0.0, -0.2531847, 1.5191081]),
        # K = 0.4 of three: the second smallest, 0 and 4
        ("qae", [1.7320478, -1.0, 0.0, 0.0, 0.0, 1.0]),
    ],
)
def test_hand_computed(name: str, expected: list[float]) -> None:
    got = estimate(name, REWARDS, PROMPT_IDS)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor(expected), rtol=0, atol=2e-6)


def by_loops(name: str, rewards: list[float], ids: list[int], quantile: float) -> list[float]:
    result = []
    for reward, prompt in zip(rewards, ids, strict=True):
        group = [r for r, p in zip(rewards, ids, strict=True) if p == prompt]
        mean, std = statistics.fmean(group), statistics.stdev(group)
        if name == "rloo":
            baseline = (sum(group) - reward) / (len(group) - 1)
        elif name == "qae":
            baseline = min(x for x in group if sum(r <= x for r in group) >= Fraction(str(quantile)) * len(group))
        else:
            baseline = mean
        result.append((reward - baseline) / (std + 1e-6 if name in ("grpo", "qae") else 1))
    if name == "reinforce_pp":
        mean, std = statistics.fmean(result), statistics.stdev(result)
        result = [(value - mean) / (std + 1e-6) for value in result]
    return result


@pytest.mark.parametrize("name", ADVANTAGES)
def test_equals_loops_on_uneven_shuffled_groups(name: str) -> None:
    rng = random.Random(3)
    ids = [prompt for prompt, size in ((1 << 40, 2), (-3, 7), (0, 16), (11, 3)) for _ in range(size)]
    rng.shuffle(ids)
    rewards = [rng.choice([0.0, 1.0, rng.gauss(1000.0, 1.0)]) for _ in ids]
    got = estimate(name, torch.tensor(rewards, dtype=torch.float64), torch.tensor(ids), qae_quantile=0.3)
    expected = torch.tensor(by_loops(name, rewards, ids, 0.3), dtype=torch.float32)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("value", [0.1, 1 / 3, -1e6 / 7])
def test_equal_rewards_give_exactly_zero(name: str, value: float) -> None:
    # in float64 0.1 + 0.1 + 0.1 is not 0.3: dividing the rounding error by 1e-6 would leave 1e-11
    rewards = torch.tensor([value] * 3 + [2 * value] * 7, dtype=torch.float64)
    got = estimate(name, rewards, torch.tensor([0] * 3 + [1] * 7))
    assert torch.equal(got, torch.zeros(10))


def test_qae_splits_binary_rewards_at_one_minus_k() -> None:
    """p <= 1 - K: only successes move; p > 1 - K: only failures. Also where K * n rounds badly."""
    grid = [(size, percent) for size in range(2, 17) for percent in range(5, 100, 5)]
    for size, percent in [*grid, (25, 28), (25, 56)]:
        for successes in range(1, size):
            rewards = torch.tensor([1.0] * successes + [0.0] * (size - successes))
            got = estimate("qae", rewards, torch.zeros(size, dtype=torch.int64), qae_quantile=percent / 100)
            hard = Fraction(successes, size) <= 1 - Fraction(percent, 100)
            moved = got > 0 if hard else got < 0
            assert torch.equal(moved, rewards == (1.0 if hard else 0.0)), (size, percent, successes)
            assert torch.equal(got != 0, moved)


def test_reinforce_pp_without_groups_whitens_raw_rewards() -> None:
    got = estimate("reinforce_pp", torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0, 1, 2]))
    torch.testing.assert_close(got, torch.tensor([1.0, -1.0, 0.0]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_refuses_a_prompt_with_one_sample_among_others(name: str) -> None:
    with pytest.raises(ValueError, match="1 of 2 prompts.*samples_per_prompt"):
        estimate(name, torch.tensor([1.0, 0.0, 1.0]), torch.tensor([4, 4, 8]))


@pytest.mark.parametrize("name", ADVANTAGES)
def test_refuses_bad_rewards(name: str) -> None:
    with pytest.raises(ValueError, match="2 of 4 rewards are not finite"):
        estimate(name, torch.tensor([1.0, float("nan"), 0.0, -float("inf")]), torch.zeros(4, dtype=torch.int64))
    with shape_checks.off(), pytest.raises(ValueError, match=r"got \[3\] and \[2\]"):
        estimate(name, torch.ones(3), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="B > 0"):
        estimate(name, torch.ones(0), torch.zeros(0, dtype=torch.int64))
