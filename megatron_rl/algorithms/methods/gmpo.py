"""GMPO: `-A s`, s = exp(mean d') the geometric mean of a sequence's token ratios, each clipped by itself.

With d = log(pi / pi_old), d' = min(d, eps_high) for A > 0 and max(d, -eps_low) for A < 0. The mean runs over the
sequence's counted tokens. Each carries the value `-A s` with the gradient `-A s` on its own log-probability, 0 when
clipped. Advantages are equal within a sequence, so with `seq_mean_token_mean` value and gradient are those of the
sequence objective: ds/dlogprobs[t] = s / length is s times the token's weight.
Source: arXiv 2507.20673; the authors' train_zero_math_gmpo.py (callsys/GMPO) and verl's `compute_policy_loss_geo_mean`,
which agree but for separate bounds, verl's. Both average over all sequences; here one without counted tokens is none.
"""

from megatron_rl.algorithms.later import LossInputs, LossOutputs, aggregation, kl, terms, torch
from megatron_rl.algorithms.policy_loss import Aggregation, PolicyLoss
from megatron_rl.algorithms.section import PositiveFloat


class GmpoLoss(PolicyLoss):
    type: str = "gmpo"
    aggregation: Aggregation = "seq_mean_token_mean"
    """Weights of the token losses; with this one the loss is the paper's, a mean over sequences."""
    eps_low: PositiveFloat = 0.4
    """The lower bound of a token's log ratio, for A < 0, is -eps_low nats."""
    eps_high: PositiveFloat = 0.4
    """The upper bound of a token's log ratio, for A > 0, is eps_high nats."""

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        inputs = terms.without_masked(inputs)
        log_ratio = inputs.logprobs - inputs.old_logprobs
        is_positive = inputs.advantages > 0
        clipped = torch.where(is_positive, log_ratio.clamp_max(self.eps_high), log_ratio.clamp_min(-self.eps_low))
        sequence = kl.safe_exp(aggregation.sequence_means(clipped, inputs))
        ratio = sequence * (clipped - clipped.detach()).exp()  # value s, derivative s in the token's own logprob
        cut = clipped != log_ratio
        metrics = {
            "loss/clip_fraction_low": kl.masked_sum_count(cut & (inputs.advantages < 0), inputs.loss_mask),
            "loss/clip_fraction_high": kl.masked_sum_count(cut & is_positive, inputs.loss_mask),
        }
        return terms.total(inputs, self, -inputs.advantages * ratio, metrics, ratio)
