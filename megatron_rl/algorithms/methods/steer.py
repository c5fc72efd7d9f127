"""STEER: tokens weigh less, the larger their estimated change of entropy, `w = weight_min^(|Omega| / max |Omega|)` with

    Omega = A / pi_old * pi * (1 - pi) * (log pi + H),

pi the probability of the sampled token under the mini-batch's `stats`. The maximum runs over the mini-batch and counts
as at least 0.02, as in the authors' code.
Source: arXiv 2510.10150 (weights exp(-alpha |Omega| / max |Omega|), here alpha = -ln weight_min); Omega as in the
authors' repository zz-haooo/STEER, `compute_token_weights`. Another commit of it has (1 - pi)^2 in place of (1 - pi);
the paper's own equation was not at hand to decide.
"""

import math

from pydantic import Field

from megatron_rl.algorithms.families import WeightedLoss
from megatron_rl.algorithms.later import MiniBatch, Numbers, Ranks, torch
from megatron_rl.algorithms.section import Float

STEER_FLOOR = 0.02  # the authors' code never normalises by less: tiny changes all keep weights near 1
_TINY = 1e-8  # bounds of a probability in the estimate, the authors' value


class SteerLoss(WeightedLoss):
    restraints = {"weight_min": -1}
    type: str = "steer"
    weight_min: Float = Field(0.7, gt=0, lt=1)
    """Weight of the token with the largest change."""

    def weights(self, mini_batch: MiniBatch, ranks: Ranks) -> Numbers:
        logprobs, entropy = mini_batch.cat_stats("logprobs").double(), mini_batch.cat_stats("entropy").double()
        prob = logprobs.exp().clamp(_TINY, 1 - _TINY)
        old_prob = mini_batch.cat("old_logprobs").double().exp().clamp(_TINY, 1.0)
        advantages = mini_batch.cat("advantages").double()
        change = (advantages / old_prob * prob * (1 - prob) * (prob.log() + entropy)).abs()
        largest = ranks.max(torch.cat([change, change.new_tensor([STEER_FLOOR])]).max())
        return (math.log(self.weight_min) * change / largest).exp()
