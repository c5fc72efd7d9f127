"""Entropy-shaped advantage: PPO's clipped surrogate of `A + min(alpha * sg(H), |A| / kappa)`.

H is the entropy of the current policy at the token's state, as a number: no gradient flows into it. kappa > 1 keeps the
sign of A; where A is 0 nothing is added.
Source: arXiv 2506.14758, the definition of psi(H_t) and of the shaped advantage (alpha > 0, kappa > 1).
"""

import dataclasses

from pydantic import Field

from megatron_rl.algorithms.later import LossInputs, LossOutputs, kl, terms, torch
from megatron_rl.algorithms.policy_loss import ClippedLoss
from megatron_rl.algorithms.section import Float, PositiveFloat


class EntropyAdvantageLoss(ClippedLoss):
    restraints = {"alpha": 1, "kappa": -1}
    type: str = "entropy_advantage"
    alpha: PositiveFloat = 0.4
    """Advantage per nat of entropy."""
    kappa: Float = Field(2.0, gt=1)
    """The bonus is at most |A| / kappa."""

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        inputs = terms.without_masked(inputs)
        bonus = torch.minimum(self.alpha * inputs.entropy.detach(), inputs.advantages.abs() / self.kappa)
        shaped = dataclasses.replace(inputs, advantages=inputs.advantages + bonus)
        ratio = terms.ratio(inputs)
        surrogate, metrics = terms.clipped_surrogate(ratio, shaped, self)
        metrics["loss/advantage_bonus"] = kl.masked_sum_count(bonus, inputs.loss_mask)
        return terms.total(shaped, self, surrogate, metrics, ratio)
