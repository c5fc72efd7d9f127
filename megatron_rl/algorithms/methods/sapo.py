"""SAPO: `-A f(r)` with the soft gate `f(r) = 4 / tau * sigmoid(tau (r - 1))` in place of PPO's clip.

Its derivative in the token's logprob is `-A r g`, g = 4 s (1 - s) with s the sigmoid: 1 on-policy, smaller on both
sides of it. Metric `loss/gate` is g.
Source: arXiv 2511.20347, as in verl's `compute_policy_loss_sapo` and TRL's paper index, whose values the defaults are.
"""

from megatron_rl.algorithms.later import LossInputs, LossOutputs, kl, terms, torch
from megatron_rl.algorithms.policy_loss import Aggregation, PolicyLoss
from megatron_rl.algorithms.section import PositiveFloat


class SapoLoss(PolicyLoss):
    type: str = "sapo"
    aggregation: Aggregation = "seq_mean_token_mean"
    """Weights of the token losses; the paper's mean over sequences of the mean over tokens."""
    tau_positive: PositiveFloat = 1.0
    """Temperature of the gate for A > 0; the larger, the faster the gradient falls."""
    tau_negative: PositiveFloat = 1.05
    """Temperature of the gate for A <= 0."""

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        inputs = terms.without_masked(inputs)
        ratio = terms.ratio(inputs)
        tau = torch.where(inputs.advantages > 0, ratio.new_full((), self.tau_positive), self.tau_negative)
        sigmoid = (tau * (ratio - 1)).sigmoid()
        metrics = {"loss/gate": kl.masked_sum_count(4 * sigmoid * (1 - sigmoid), inputs.loss_mask)}
        return terms.total(inputs, self, -inputs.advantages * 4 / tau * sigmoid, metrics, ratio)
