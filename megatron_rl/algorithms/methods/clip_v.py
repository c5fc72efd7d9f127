"""Clip_V: as Clip_B, with the exact mean of the entropy discriminator over the vocabulary at each token's state.

Source: arXiv 2602.03392, as in the authors' code (hiyuchang/Trinity-RFT, branch example/entropy, `clipv_advantage.py`,
and `compute_N_from_logits` of `clipv_dp_actor.py`) and its recipe, clipv.yaml; the class's own default of mu is 2.
Their code needs the logits of the whole vocabulary on one device. Here the mean comes from the statistics of all shards
of it that the forward pass gives anyway.
"""

from megatron_rl.algorithms.families import WeightedLoss, moments, outliers
from megatron_rl.algorithms.later import MiniBatch, Numbers, Ranks, covariance, entropy, torch
from megatron_rl.algorithms.section import Fraction, PositiveFloat


class ClipVLoss(WeightedLoss):
    compared = {"clip_v": {"mu": 2.0, "max_fraction": 0.02}}
    type: str = "clip_v"
    mu: PositiveFloat = 8.5
    """Standard deviations from which on a token leaves the gradient."""
    max_fraction: Fraction = 1e-4
    """Largest fraction of the mini-batch's response tokens that leaves the gradient, at least one."""

    def weights(self, mini_batch: MiniBatch, ranks: Ranks) -> Numbers:
        """Return 0 where A < 0 and `D > mu std D`, else 1; D = E S - S with E S = sum_a pi_a S_a at the token's state.

        If these are more than floor(max_fraction * N), it is 0 for so many of largest D over all ranks, ties by global
        id. The threshold counts from 0, which is D's expectation, the deviation (divisor N) about its mean over the
        mini-batch, as in the authors' code.
        """
        parts = mini_batch.micro_batches
        spent = [entropy.entropy_spent(each.computed_stats, -torch.ones_like(each.advantages)) for each in parts]
        excess, ids = mini_batch.response_tokens(spent), mini_batch.cat("token_ids_global")
        _, std, count = moments(excess, ranks)
        out = outliers(mini_batch, excess, self.mu * std)
        _, winners = ranks.top_k(excess[out], ids[out], covariance.quota(self.max_fraction, int(count)))
        return 1.0 - torch.isin(ids, winners).double()
