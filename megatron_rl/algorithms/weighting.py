"""Weights of the policy-gradient term per token, from statistics over the whole optimiser mini-batch.

Three methods that differ in the weights alone. Like the selection of Clip-Cov and KL-Cov, each statistic runs over the
response tokens of all ranks and micro-batches, so the layout never changes a weight. The papers' own code takes it over
one micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_rl.algorithms.covariance import covariance, select_tokens
from megatron_rl.types import Float64, MiniBatch, Ranks

if TYPE_CHECKING:
    from megatron_rl.config.loss import ForkingLoss, GaussianCovLoss, LossBase, SteerLoss


STEER_FLOOR = 0.02  # the authors' code never normalises by less: tiny changes all keep weights near 1
_TINY = 1e-8  # bounds of a probability in STEER's estimate, the authors' value


def mark_tokens(mini_batch: MiniBatch, loss: LossBase, ranks: Ranks, *, seed: int, step: int) -> MiniBatch:
    """Mark what the loss needs to know of the whole mini-batch: the tokens that it selects, or how much each weighs.

    Arguments, guarantees and the result are those of `select_tokens`; a weighting loss gets `surrogate_weights` instead
    of `selected`.

    Besides those of `select_tokens`, for a weighting loss: `weight/min` and `weight/effective_fraction` =
    (sum w)^2 / (N sum w^2), which is 1 for equal weights and keep_fraction for 80/20.
    """
    mini_batch = select_tokens(mini_batch, loss, ranks, seed=seed, step=step)
    if loss.type not in WEIGHTINGS:
        return mini_batch
    tokens = torch.stack([micro_batch.loss_mask.sum() for micro_batch in mini_batch.micro_batches]).sum()
    if not int(ranks.sum(tokens)):  # no token on any rank
        nothing = [torch.zeros_like(micro_batch.advantages) for micro_batch in mini_batch.micro_batches]
        return mini_batch.replace_each("surrogate_weights", nothing)
    weights = WEIGHTINGS[loss.type](mini_batch, loss, ranks)
    sums = torch.stack([torch.full_like(weights.sum(), weights.numel()), weights.sum(), (weights**2).sum()])
    count, total, squares = ranks.sum(sums).tolist()
    smallest = -float(ranks.max(torch.cat([-weights, weights.new_tensor([-math.inf])]).max()))
    mini_batch = mini_batch.replace_each("surrogate_weights", _uncat(mini_batch, weights.float()))
    return mini_batch.with_selection(
        {"weight/min": smallest, "weight/effective_fraction": total**2 / (count * squares)}
    )


def forking_weights(mini_batch: MiniBatch, loss: ForkingLoss, ranks: Ranks) -> Float64[Tensor, "N"]:
    """Return 80/20's `w = 1[H >= tau] * N / K`: tau is the entropy of the ceil(keep_fraction * N)-th token by falling
    entropy, K the number of tokens with H >= tau.

    N / K makes the mean over all N tokens the mean over the kept ones, as the paper's indicator stands in the numerator
    and in the normaliser. Tokens tied at tau are all kept, as in the paper (its code keeps exactly K, the first in
    memory). Regularisers still see every token. Mathematically equal entropies (the first tokens of one prompt's
    samples) can be told apart by rounding, which depends on the layout.
    Source: arXiv 2506.01939, eq. 6, rho = 0.2; over the mini-batch, where its text says "within each (micro-)batch".
    """
    entropy = mini_batch.cat_stats("entropy")
    count = int(ranks.sum(torch.tensor([entropy.numel()], device=entropy.device)))
    wanted = min(count, math.ceil(loss.keep_fraction * count - 1e-9))  # 0.2 * 15 is 3.0000000000000004
    kept = (entropy >= ranks.kth_largest(entropy, max(1, wanted))).double()
    return kept * (count / ranks.sum(kept.sum()))


def steer_weights(mini_batch: MiniBatch, loss: SteerLoss, ranks: Ranks) -> Float64[Tensor, "N"]:
    """Return STEER's `w = exp(ln(weight_min) * |Omega| / max |Omega|)` in [weight_min, 1], with the first-order
    estimate of a token's entropy change

        Omega = A / pi_old * pi * (1 - pi) * (log pi + H),

    pi the probability of the sampled token under the mini-batch's `stats`. The maximum runs over the mini-batch and
    counts as at least 0.02, as in the authors' code. Source: arXiv 2510.10150 (weights exp(-alpha |Omega| / max
    |Omega|), here alpha = -ln weight_min); Omega as in the authors' repository zz-haooo/STEER, `compute_token_weights`.
    Another commit of it has (1 - pi)^2 in place of (1 - pi); the paper's own equation was not at hand to decide.
    """
    logprobs, entropy = mini_batch.cat_stats("logprobs").double(), mini_batch.cat_stats("entropy").double()
    prob = logprobs.exp().clamp(_TINY, 1 - _TINY)
    old_prob = mini_batch.cat("old_logprobs").double().exp().clamp(_TINY, 1.0)
    advantages = mini_batch.cat("advantages").double()
    change = (advantages / old_prob * prob * (1 - prob) * (prob.log() + entropy)).abs()
    largest = ranks.max(torch.cat([change, change.new_tensor([STEER_FLOOR])]).max())
    return (math.log(loss.weight_min) * change / largest).exp()


def gaussian_cov_weights(mini_batch: MiniBatch, loss: GaussianCovLoss, ranks: Ranks) -> Float64[Tensor, "N"]:
    """Return the weights of covariance-weighted GRPO, `w = exp(-c^2 / (2 sigma^2)) * N / sum`, of mean 1.

    c is the token's centred product (covariance.py), sigma the standard deviation of c over the mini-batch (divisor N,
    about its mean), the sum that of the exponentials: the budget is redistributed, never cut. With sigma 0 all
    weights are 1.
    Source: arXiv 2605.11538, as described in public notes on it (the paper was not at hand and has no public code),
    which leave open the divisor of sigma and take N over "the group".
    """
    cov, count = covariance(mini_batch.cat_stats("logprobs"), mini_batch.cat("advantages"), ranks)
    mean = ranks.sum(cov.sum()) / count
    variance = ranks.sum(((cov - mean) ** 2).sum()) / count
    if float(variance) == 0.0:
        return torch.ones_like(cov)
    kernel = (-(cov**2) / (2 * variance)).exp()
    return kernel * (count / ranks.sum(kernel.sum()))


WEIGHTINGS: dict[str, Callable[..., Tensor]] = {
    "forking": forking_weights,
    "steer": steer_weights,
    "gaussian_cov": gaussian_cov_weights,
}


def _uncat(mini_batch: MiniBatch, values: Tensor) -> list[Tensor]:
    """Return [T] per micro-batch, 0 outside `loss_mask`, from values of the response tokens [N]."""
    masks = [micro_batch.loss_mask for micro_batch in mini_batch.micro_batches]
    whole = values.new_zeros(sum(map(len, masks))).masked_scatter(torch.cat(masks), values)
    return list(whole.split([len(mask) for mask in masks]))
