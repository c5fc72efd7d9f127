"""Covariance-weighted GRPO: a Gaussian kernel weighs down tokens of extreme covariance.

`w = exp(-c^2 / (2 sigma^2)) * N / sum`, of mean 1: c is the token's centred product (covariance.py), sigma the standard
deviation of c over the mini-batch (divisor N, about its mean), the sum that of the exponentials: the budget is
redistributed, never cut. With sigma 0 all weights are 1.
Source: arXiv 2605.11538, as described in public notes on it (the paper was not at hand and has no public code), which
leave open the divisor of sigma and take N over "the group".
"""

from megatron_rl.algorithms.families import WeightedLoss
from megatron_rl.algorithms.later import MiniBatch, Numbers, Ranks, covariance, torch


class GaussianCovLoss(WeightedLoss):
    type: str = "gaussian_cov"

    def weights(self, mini_batch: MiniBatch, ranks: Ranks) -> Numbers:
        cov, count = covariance.covariance(mini_batch.cat_stats("logprobs"), mini_batch.cat("advantages"), ranks)
        mean = ranks.sum(cov.sum()) / count
        variance = ranks.sum(((cov - mean) ** 2).sum()) / count
        if float(variance) == 0.0:
            return torch.ones_like(cov)
        kernel = (-(cov**2) / (2 * variance)).exp()
        return kernel * (count / ranks.sum(kernel.sum()))
