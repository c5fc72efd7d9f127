"""GSPO: PPO's clipped surrogate with one ratio per sequence, `s = exp(mean log(pi / pi_old))`.

The mean runs over counted tokens. Each carries `max(-A s, -A clip(s))` with the gradient `-A s` (0 when clipped) on its
own log-probability, the paper's GSPO-token form. Advantages are equal within a sequence, so with the paper's
`aggregation: seq_mean_token_mean`, value and gradient are those of the sequence objective: ds/dlogprobs[t] = s / length
is s times the token's weight. A sequence lies in one micro-batch, whole or with its other parts behind
`inputs.context`; ratios and clip fractions count tokens.
Source: arXiv 2507.18071, eq. 5-7 and 13-14.
"""

from megatron_rl.algorithms.later import LossInputs, LossOutputs, aggregation, kl, terms
from megatron_rl.algorithms.policy_loss import ClippedLoss
from megatron_rl.algorithms.section import NonNegativeFloat, UnitFloat


class GspoLoss(ClippedLoss):
    compared = {"gspo": {"aggregation": "seq_mean_token_mean"}}
    type: str = "gspo"
    eps_low: UnitFloat = 3e-4
    """The sequence ratio's lower bound is 1 - eps_low."""
    eps_high: NonNegativeFloat = 4e-4
    """The sequence ratio's upper bound is 1 + eps_high."""

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        inputs = terms.without_masked(inputs)
        sequence = kl.safe_exp(aggregation.sequence_means(inputs.logprobs - inputs.old_logprobs, inputs))
        # value s, derivative s in the token's own logprob
        ratio = sequence * (inputs.logprobs - inputs.logprobs.detach()).exp()
        surrogate, metrics = terms.clipped_surrogate(ratio, inputs, self)
        return terms.total(inputs, self, surrogate, metrics, ratio)
