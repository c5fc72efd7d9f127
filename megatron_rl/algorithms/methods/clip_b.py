"""Clip_B: tokens of negative advantage and of low entropy discriminator leave the gradient.

The discriminator of a sampled token is `S = pi (H + log pi)`: a policy-gradient step with advantage A moves the entropy
of its state by -A times S less its mean over the vocabulary, to first order. Clip_B takes the mean over the tokens in
its place.

Source: arXiv 2602.03392, as in the authors' code (hiyuchang/Trinity-RFT, branch example/entropy, `clipb_advantage.py`).
It computes S at the start of a step whose whole batch is one update, over that batch. It takes the tokens out of the
denominator and of the regularisers too; here they stay in both.
"""

from megatron_rl.algorithms.families import WeightedLoss, moments, outliers
from megatron_rl.algorithms.later import MiniBatch, Numbers, Ranks
from megatron_rl.algorithms.section import PositiveFloat


class ClipBLoss(WeightedLoss):
    type: str = "clip_b"
    mu: PositiveFloat = 2.5
    """Standard deviations below the mean from which on a token leaves the gradient."""

    def weights(self, mini_batch: MiniBatch, ranks: Ranks) -> Numbers:
        """Return 0 where A < 0 and `S < mean S - mu std S`, else 1; mean and standard deviation (divisor N) are over
        the mini-batch on all ranks."""
        logprobs = mini_batch.cat_stats("logprobs").double()
        discriminator = logprobs.exp() * (mini_batch.cat_stats("entropy").double() + logprobs)
        mean, std, _ = moments(discriminator, ranks)
        return 1.0 - outliers(mini_batch, mean - discriminator, self.mu * std).double()
