"""CISPO: `-sg(clip(r, 1 - eps_low, 1 + eps_high)) * A * logprobs`; the clipped ratio is a weight without gradient.

Every token keeps a gradient; clipping bounds its size. Clip fractions count ratios outside the bounds, whatever A.
Source: arXiv 2506.13585, eq. 4-5.
"""

from megatron_rl.algorithms.later import LossInputs, LossOutputs, kl, terms
from megatron_rl.algorithms.policy_loss import ClippedLoss
from megatron_rl.algorithms.section import NonNegativeFloat, UnitFloat


class CispoLoss(ClippedLoss):
    type: str = "cispo"
    eps_low: UnitFloat = 1.0
    """The weight's lower bound is 1 - eps_low."""
    eps_high: NonNegativeFloat = 0.28
    """The weight's upper bound is 1 + eps_high."""

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        inputs = terms.without_masked(inputs)
        ratio = terms.ratio(inputs).detach()
        low, high = 1 - self.eps_low, 1 + self.eps_high
        surrogate = -ratio.clamp(low, high) * inputs.advantages * inputs.logprobs
        metrics = {
            "loss/clip_fraction_low": kl.masked_sum_count(ratio < low, inputs.loss_mask),
            "loss/clip_fraction_high": kl.masked_sum_count(ratio > high, inputs.loss_mask),
        }
        return terms.total(inputs, self, surrogate, metrics, ratio)
