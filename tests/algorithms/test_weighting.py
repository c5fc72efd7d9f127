"""Weights of the policy gradient, by hand and by loops; what they do to the predicted entropy change."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rl.algorithms.covariance import covariance_metrics
from megatron_rl.algorithms.entropy import entropy_spent
from megatron_rl.algorithms.methods.clip_cov import ClipCovLoss
from megatron_rl.algorithms.methods.forking import ForkingLoss
from megatron_rl.algorithms.methods.gaussian_cov import GaussianCovLoss
from megatron_rl.algorithms.methods.kl_cov import KlCovLoss
from megatron_rl.algorithms.methods.ppo_clip import PpoClipLoss
from megatron_rl.algorithms.methods.steer import SteerLoss
from megatron_rl.algorithms.policy_loss import PolicyLoss
from megatron_rl.algorithms.prediction import effective_advantages, predicted_change
from megatron_rl.types import MiniBatch, TokenStats
from tests.algorithms.covariance_case import ALONE, build, by_hand, numpy_view

Batch = tuple[MiniBatch, list[TokenStats]]
ONE, FOUR = [list(range(8))], [[0, 4], [], [3, 1, 2], [7, 6, 5]]
LOSSES: list[PolicyLoss] = [ForkingLoss(), SteerLoss(weight_min=0.4), GaussianCovLoss()]


def mark(batch: Batch, loss: PolicyLoss) -> tuple[MiniBatch, np.ndarray, dict[str, float]]:
    """The marked mini-batch, its weights by rising global id, and metrics."""
    mini_batch = loss.mark(batch[0].with_stats(batch[1]), ALONE, seed=1, step=0)
    weights = mini_batch.cat("surrogate_weights")[mini_batch.cat("token_ids_global").argsort()]
    return mini_batch, weights.numpy(), dict(mini_batch.selection)


def with_entropy(batch: Batch, entropy: list[float]) -> Batch:
    """`by_hand`'s only micro-batch with other entropies; its last two positions are padding."""
    mini_batch, (stats,) = batch
    values = torch.tensor([*entropy, 9e9, 9e9])
    return mini_batch, [TokenStats(stats.logprobs, values, stats.sum_p2, stats.sum_p2_logp)]


def test_forking_by_hand() -> None:
    batch = with_entropy(by_hand([-1.0] * 10, [1.0, -1.0] * 5), [0.1, 0.9, 0.3, 0.2, 0.8, 0.0, 0.7, 0.4, 0.5, 0.6])
    _, weights, metrics = mark(batch, ForkingLoss())  # the ceil(0.2 * 10) = 2 largest: tokens 1 and 4, times 10 / 2
    assert weights.tolist() == [0, 5, 0, 0, 5, 0, 0, 0, 0, 0]
    assert metrics["weight/effective_fraction"] == 0.2 and metrics["weight/min"] == 0
    _, weights, _ = mark(batch, ForkingLoss(keep_fraction=0.21))  # ceil(2.1) = 3
    assert np.flatnonzero(weights).tolist() == [1, 4, 6] and weights.sum() == pytest.approx(10)
    tied = with_entropy(batch, [0.1, 0.9, 0.3, 0.2, 0.8, 0.8, 0.7, 0.8, 0.5, 0.6])
    assert np.flatnonzero(mark(tied, ForkingLoss())[1]).tolist() == [1, 4, 5, 7]  # all tokens at the threshold


def test_steer_by_hand() -> None:
    # pi = 1/2, 1/4, 1/2 from pi_old = 1/4, 1/4, 1/2: A / pi_old pi (1 - pi) (log pi + H)
    half, quarter = math.log(0.5), math.log(0.25)
    batch = with_entropy(by_hand([half, quarter, half], [1.0, -1.0, 0.5], [quarter, quarter, half]), [1.0, 1.0, 0.9])
    changes = [4 * 0.25 * (half + 1), 4 * 0.1875 * -(quarter + 1), 0.5 * 2 * 0.25 * (half + 0.9)]
    expected = [0.7 ** (abs(c) / max(map(abs, changes))) for c in changes]
    _, weights, metrics = mark(batch, SteerLoss())
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    assert metrics["weight/min"] == pytest.approx(0.7)
    tiny = with_entropy(by_hand([half] * 2, [0.01, -0.01]), [1.0, 1.0])  # |Omega| = 0.0015: normalised by 0.02
    expected_tiny = 0.7 ** (0.01 * 0.5 * (half + 1) / 0.02)
    np.testing.assert_allclose(mark(tiny, SteerLoss())[1], [expected_tiny] * 2, rtol=1e-6)


def test_gaussian_cov_by_hand() -> None:
    # deviations of logp (1, 0, -1, 0), of A (0.5, 0.5, -1.5, 0.5): c = 0.5, 0, 1.5, 0; mean 0.5, variance 0.375
    batch = by_hand([-1.0, -2.0, -3.0, -2.0], [1.0, 1.0, -1.0, 1.0])
    kernel = np.exp(-np.array([0.25, 0, 2.25, 0]) / 0.75)
    _, weights, metrics = mark(batch, GaussianCovLoss())
    np.testing.assert_allclose(weights, kernel * 4 / kernel.sum(), rtol=1e-6)
    assert metrics["weight/effective_fraction"] == pytest.approx(kernel.sum() ** 2 / (4 * (kernel**2).sum()))
    assert mark(by_hand([-1.0, -2.0], [1.0, 1.0]), GaussianCovLoss())[1].tolist() == [1, 1]  # c = 0 everywhere


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.type)
def test_weights_do_not_depend_on_the_packing(loss: PolicyLoss) -> None:
    one, weights, _ = mark(build(ONE), loss)
    several, others, _ = mark(build(FOUR), loss)
    np.testing.assert_allclose(weights, others, rtol=1e-6)
    assert weights.std() > 0.02
    for micro_batch in (*one.micro_batches, *several.micro_batches):
        assert (
            micro_batch.surrogate_weights is not None
            and not micro_batch.surrogate_weights[~micro_batch.loss_mask].any()
        )


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.type)
def test_no_tokens_and_no_numbers(loss: PolicyLoss) -> None:
    mini_batch, weights, metrics = mark(build([[], []]), loss)
    assert weights.size == 0 and metrics == {} and mini_batch.micro_batches[0].surrogate_weights is not None
    broken = build(FOUR)
    broken[1][0].logprobs[3] = broken[1][0].entropy[3] = math.nan
    mark(broken, loss)  # the update, which skips and counts a non-finite gradient, must get to see it


# ---- prediction


PREDICTED: list[Any] = [
    PpoClipLoss(),
    ClipCovLoss(select_fraction=0.1, cov_low=0.05),
    KlCovLoss(select_fraction=0.1, kl_coef=2.0),
    SteerLoss(eps_low=1, eps_high=100),
]


@pytest.mark.parametrize("loss", PREDICTED, ids=lambda loss: loss.type)
def test_effective_advantages(loss: Any) -> None:
    """A times the ratio; 0 where clipped or dropped, times the weight, less kl_coef sign(log ratio) where selected."""
    batch = build(FOUR)
    mini_batch = loss.mark(batch[0], ALONE, seed=1, step=0)
    parts = mini_batch.micro_batches
    got = torch.cat([effective_advantages([part], loss)[part.loss_mask] for part in parts]).numpy()
    together = effective_advantages(parts, loss)[torch.cat([part.loss_mask for part in parts])]
    np.testing.assert_array_equal(together.numpy(), got)
    view = numpy_view(batch)
    expected = ratio(view) * view["advantages"]
    if loss.type == "steer":
        expected = expected * mini_batch.cat("surrogate_weights").numpy()
    elif loss.type == "kl_cov":
        chosen = mini_batch.cat("selected").numpy()
        expected = expected - 2.0 * chosen * np.sign(view["logprobs"] - view["old_logprobs"])
    else:
        dropped = clipped(view, loss.eps_low, loss.eps_high)
        if loss.type == "clip_cov":
            dropped |= mini_batch.cat("selected").numpy()
        assert dropped.any()
        expected = np.where(dropped, 0, expected)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6)


def test_predicted_change_is_the_mean_over_all_tokens() -> None:
    batch = build(FOUR)
    off_policy = batch[0]
    parts = off_policy.micro_batches
    loss = PpoClipLoss(eps_low=1, eps_high=100)
    exact = torch.cat([entropy_spent(m.stats, effective_advantages([m], loss))[m.loss_mask] for m in parts])
    assert predicted_change([off_policy], loss, ALONE) == pytest.approx(-float(exact.mean()))
    on_policy = off_policy.replace_each("old_logprobs", [stats.logprobs for stats in batch[1]])
    metrics = covariance_metrics([on_policy], ALONE)
    change = predicted_change([on_policy], loss, ALONE)
    assert change == pytest.approx(-metrics["cov/vocab_mean"], rel=1e-6)
    nothing = off_policy.replace_each("loss_mask", [torch.zeros_like(m.loss_mask) for m in parts])
    assert predicted_change([off_policy, nothing, on_policy], loss, ALONE) == pytest.approx(
        change - float(exact.mean())
    )


def ratio(view: dict[str, np.ndarray]) -> np.ndarray:
    return np.exp(view["logprobs"] - view["old_logprobs"])


def clipped(view: dict[str, np.ndarray], low: float, high: float) -> np.ndarray:
    up = (ratio(view) > 1 + high) & (view["advantages"] > 0)
    return up | ((ratio(view) < 1 - low) & (view["advantages"] < 0))
