"""VESPO: `-sg(phi(W)) A logprobs`, `phi(W) = W^k exp(lambda (1 - W))`, W the product of a sequence's token ratios.

phi(1) = 1. Log ratios are bounded at 20 nats, a token's and the sequence's. Metric `loss/vespo_weight` is phi.
Source: arXiv 2602.10693, as in the authors' `compute_policy_loss_vespo` (FloyedShen/VESPO), its recipe, and TRL's paper
index, which agree; the code's docstring names other defaults than its code. Its truncated weights against the engine's
probabilities are inside W, before the kernel; `rollout_correction` is outside, so `anchor: rollout` stands for them
here, untruncated.
"""

from megatron_rl.algorithms.later import LossInputs, LossOutputs, aggregation, kl, terms, torch
from megatron_rl.algorithms.policy_loss import AnchoredLoss
from megatron_rl.algorithms.section import NonNegativeFloat, PositiveFloat


class VespoLoss(AnchoredLoss):
    type: str = "vespo"
    k_positive: NonNegativeFloat = 2.0
    """Power of W for A >= 0: how fast small weights vanish."""
    lambda_positive: PositiveFloat = 3.0
    """Decay in W for A >= 0: how fast large weights vanish."""
    k_negative: NonNegativeFloat = 3.0
    """Power of W for A < 0."""
    lambda_negative: PositiveFloat = 2.0
    """Decay in W for A < 0."""

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        inputs = terms.without_masked(inputs)
        log_ratio = (inputs.logprobs - terms.anchor(inputs, self.anchor)).detach()
        log_ratio = log_ratio.clamp(-kl.LOG_RATIO_LIMIT, kl.LOG_RATIO_LIMIT)
        log_w = aggregation.sequence_sums(log_ratio, inputs).clamp(-kl.LOG_RATIO_LIMIT, kl.LOG_RATIO_LIMIT)
        w, is_negative = log_w.exp(), inputs.advantages < 0
        k = torch.where(is_negative, w.new_full((), self.k_negative), self.k_positive)
        decay = torch.where(is_negative, w.new_full((), self.lambda_negative), self.lambda_positive)
        phi = (k * log_w + decay * (1 - w)).exp()
        metrics = {"loss/vespo_weight": kl.masked_sum_count(phi, inputs.loss_mask)}
        return terms.total(inputs, self, -phi * inputs.advantages * inputs.logprobs, metrics, w)
