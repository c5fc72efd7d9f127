"""The exact entropy change against hand-computed numbers, a step that is really taken, and Theorem 1's covariance."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_rl.algorithms.entropy import entropy_spent
from megatron_rl.types import TokenStats


def dense_stats(logits: Tensor, labels: Tensor) -> TokenStats:
    """Float64 statistics of `logits [T, V]`."""
    logp = torch.log_softmax(logits, dim=1)
    p = logp.exp()
    chosen = logp.gather(1, labels[:, None])[:, 0]
    return TokenStats(chosen, -(p * logp).sum(1), (p * p).sum(1), (p * p * logp).sum(1))


def entropy(logits: Tensor) -> Tensor:
    logp = torch.log_softmax(logits, dim=-1)
    return -(logp.exp() * logp).sum(-1)


def test_two_actions_by_hand() -> None:
    # pi = (3/4, 1/4), l = log 3, H = log 4 - 3/4 l, so log pi_0 + H = l/4 and log pi_1 + H = -3/4 l.
    # sum_a pi_a^2 (log pi_a + H) = 9/16 * l/4 - 1/16 * 3/4 l = 6/64 l. Token 0: 3/4 * l/4 = 12/64 l; token 1: -12/64 l.
    logits = torch.tensor([[math.log(3.0), 0.0]] * 3, dtype=torch.float64)
    stats = dense_stats(logits, torch.tensor([0, 1, 0]))
    got = entropy_spent(stats, torch.tensor([1.0, 1.0, -2.0]))
    unit = math.log(3.0) / 64
    # reinforcing the likely action spends entropy, reinforcing the unlikely one buys it
    torch.testing.assert_close(got, torch.tensor([6 * unit, -18 * unit, -12 * unit], dtype=torch.float64))


def test_uniform_policy_and_zero_advantage_change_nothing_to_first_order() -> None:
    stats = dense_stats(torch.zeros(2, 5, dtype=torch.float64), torch.tensor([0, 3]))
    torch.testing.assert_close(entropy_spent(stats, torch.tensor([4.0, -4.0])), torch.zeros(2, dtype=torch.float64))
    peaked = dense_stats(torch.randn(2, 5, dtype=torch.float64), torch.tensor([0, 3]))
    assert entropy_spent(peaked, torch.zeros(2)).tolist() == [0.0, 0.0]


def test_a_step_that_is_really_taken_changes_the_entropy_as_predicted() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(40, 9, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 9, (40,), generator=generator)
    advantages = 2 * torch.randn(40, generator=generator, dtype=torch.float64)
    predicted = -entropy_spent(dense_stats(logits, labels), advantages)
    one_hot = torch.nn.functional.one_hot(labels, 9).double()
    direction = advantages[:, None] * (one_hot - torch.softmax(logits, dim=1))  # of A log pi_y in the logits
    eta = 1e-5
    realised = (entropy(logits + eta * direction) - entropy(logits - eta * direction)) / (2 * eta)
    torch.testing.assert_close(predicted, realised, rtol=1e-7, atol=1e-8)
    assert predicted.abs().median() > 0.01  # else the tolerance would hide a wrong formula


def test_the_expectation_over_actions_is_theorem_1() -> None:
    """sum_y pi_y dH_y = -eta Cov_{y ~ pi}(log pi_y, pi_y A_y) for advantages centred under pi.

    The gradient of E[A] in logit a is pi_a (A_a - E[A]) (the paper's softmax update), so Theorem 1's change is
    -Cov(log pi_a, pi_a (A_a - E[A])).
    """
    generator = torch.Generator().manual_seed(1)
    logits = 1.5 * torch.randn(7, generator=generator, dtype=torch.float64)
    logp = torch.log_softmax(logits, 0)
    p = logp.exp()
    advantages = torch.randn(7, generator=generator, dtype=torch.float64)
    advantages = advantages - (p * advantages).sum()  # E_pi[A] = 0
    stats = dense_stats(logits.expand(7, 7), torch.arange(7))  # one row for each action
    expected_loss = (p * entropy_spent(stats, advantages)).sum()
    step = p * advantages
    covariance = (p * logp * step).sum() - (p * logp).sum() * (p * step).sum()
    torch.testing.assert_close(expected_loss, covariance, rtol=1e-12, atol=1e-14)
    assert covariance.abs() > 0.01


def test_float32_statistics_give_float64_products() -> None:
    stats = TokenStats(*(torch.full((3,), x, dtype=torch.float32) for x in (-1.0, 0.5, 0.4, -0.3)))
    got = entropy_spent(stats, torch.ones(3, dtype=torch.float32))
    assert got.dtype == torch.float64
    assert got[0].item() == pytest.approx(math.exp(-1.0) * -0.5 - (-0.3 + 0.5 * 0.4), abs=1e-7)


def test_statistics_without_the_sums_are_refused() -> None:
    with pytest.raises(ValueError, match="with_sum_p2=True"):
        entropy_spent(TokenStats(torch.zeros(2), torch.zeros(2)), torch.ones(2))
