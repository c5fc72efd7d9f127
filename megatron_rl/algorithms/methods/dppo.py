"""DPPO: `-A sg(min(p / p0, max_ratio)) logprobs`, and 0 beyond a bounded divergence of p from p0.

It is 0 where p has moved in the direction of A by more than the bound; such tokens stay in the denominator.
Source: arXiv 2602.04879 (binary TV and binary KL), as in the authors' `compute_policy_loss_with_mask`
(sail-sg/Stable-RL) and verl's `dppo_tv` and `dppo_kl`, whose recipe the bounds and max_ratio are. The two disagree: the
authors measure ratio and divergence from the policy that sampled (`anchor: rollout`) and cap the ratio at 10 by
default, verl from the old policy (`anchor: old`) at 20. The authors' variant over each state's 20 likeliest tokens is
not here.
"""

from typing import Literal

from megatron_rl.algorithms.later import LossInputs, LossOutputs, kl, terms, torch
from megatron_rl.algorithms.policy_loss import Anchor, AnchoredLoss
from megatron_rl.algorithms.section import PositiveFloat

_TINY = 1e-8  # added to both probabilities of the other tokens, the authors' value


class DppoLoss(AnchoredLoss):
    type: str = "dppo"
    divergence: Literal["tv", "kl"] = "tv"
    """Between the token and all others taken together; tv: |p - p0|; kl: KL(p0 || p) in nats, usual bounds 0.05."""
    bound_low: PositiveFloat = 0.15
    """Largest divergence of a token with A <= 0 whose probability has fallen."""
    bound_high: PositiveFloat = 0.15
    """Largest divergence of a token with A > 0 whose probability has risen."""
    max_ratio: PositiveFloat = 1e4
    """Largest weight."""
    anchor: Anchor = "rollout"
    """p0: rollout: the policy that sampled, by its engine; old: that at the start of the step, recomputed."""

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        inputs = terms.without_masked(inputs)
        anchor, logprobs = terms.anchor(inputs, self.anchor), inputs.logprobs.detach()
        ratio = kl.safe_exp(logprobs - anchor).clamp_max(self.max_ratio)
        anchor, logprobs = anchor.clamp_max(0), logprobs.clamp_max(0)  # rounding can lift a probability above 1
        rise = logprobs.exp() - anchor.exp()
        if self.divergence == "tv":
            distance = rise.abs()
        else:
            others = torch.log((_TINY - anchor.expm1()) / (_TINY - logprobs.expm1()))
            distance = anchor.exp() * (anchor - logprobs) - anchor.expm1() * others
        above = (inputs.advantages > 0) & (rise > 0) & (distance > self.bound_high)
        below = (inputs.advantages < 0) & (rise < 0) & (distance > self.bound_low)
        metrics = {
            "loss/clip_fraction_low": kl.masked_sum_count(below, inputs.loss_mask),
            "loss/clip_fraction_high": kl.masked_sum_count(above, inputs.loss_mask),
        }
        surrogate = torch.where(above | below, 0.0, -inputs.advantages * ratio * inputs.logprobs)
        return terms.total(inputs, self, surrogate, metrics, ratio)
