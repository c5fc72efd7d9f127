"""CE-GPPO: PPO's clipped surrogate in which what the clip drops keeps a gradient of bounded size.

Beyond a bound it is `-A beta bound r / sg(r)`: value and derivative in the token's logprob are both `-A beta bound`.
Source: arXiv 2509.20712, as the authors' code has it: `compute_gppo_loss_general_beta` of Kwai-Klear/CE-GPPO, with the
defaults of its 7B recipe (1.5B: beta_low 0.5).
"""

from pydantic import Field

from megatron_rl.algorithms.later import LossInputs, LossOutputs, Tensor, kl, terms, torch
from megatron_rl.algorithms.policy_loss import ClippedLoss
from megatron_rl.algorithms.section import Float, NonNegativeFloat


class CeGppoLoss(ClippedLoss):
    type: str = "ce_gppo"
    beta_low: NonNegativeFloat = 0.75
    """Gradient of a token with A < 0 whose ratio is below the lower bound: this times the bound; 0: none."""
    beta_high: NonNegativeFloat = 1.0
    """Gradient of a token with A > 0 whose ratio is above the upper bound: this times the bound; 0: none."""
    dual_clip: Float | None = Field(10.0, gt=1)
    """Bound -A * dual_clip of the loss for A < 0; null: off."""

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        inputs = terms.without_masked(inputs)
        ratio = terms.ratio(inputs)
        surrogate, metrics = preserving_surrogate(ratio, inputs, self, self.beta_low, self.beta_high)
        surrogate = terms.dual_clipped(surrogate, inputs, self.dual_clip, metrics)
        return terms.total(inputs, self, surrogate, metrics, ratio)


def preserving_surrogate(
    ratio: Tensor, inputs: LossInputs, loss: ClippedLoss, beta_low: float, beta_high: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the surrogate [T], and as metrics the fractions of tokens beyond either bound."""
    advantages, low, high = inputs.advantages, 1 - loss.eps_low, 1 + loss.eps_high
    below, above = (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0)
    one = (inputs.logprobs - inputs.logprobs.detach()).exp()  # r / sg(r), also where r itself is at its limit
    kept = torch.where(below, beta_low * low * one, torch.where(above, beta_high * high * one, ratio))
    metrics = {
        "loss/clip_fraction_low": kl.masked_sum_count(below, inputs.loss_mask),
        "loss/clip_fraction_high": kl.masked_sum_count(above, inputs.loss_mask),
    }
    return -advantages * kept, metrics
