"""PPO-clip: `max(-A r, -A clip(r, 1 - eps_low, 1 + eps_high))`, r = pi / pi_old per token.

It is GRPO's loss (bounds 0.2/0.2) and that of clip-higher (0.2/0.28).
With `dual_clip` = c, tokens of A < 0 lose at most `-A c`; beyond it they have no gradient.
Source: arXiv 1707.06347, eq. 7; dual clip arXiv 1912.09729; separate bounds arXiv 2503.14476, eq. 10.
"""

from pydantic import Field

from megatron_rl.algorithms.later import LossInputs, LossOutputs, terms
from megatron_rl.algorithms.policy_loss import ClippedLoss
from megatron_rl.algorithms.section import Float


class PpoClipLoss(ClippedLoss):
    compared = {
        "grpo": {},
        "clip_higher": {"eps_high": 0.28},
        # as it is once the entropy has been below its target for a while
        "adaptive_entropy": {"adaptive_entropy": {"target_entropy": 100, "initial_coef": 0.02}},
    }
    type: str = "ppo_clip"
    dual_clip: Float | None = Field(None, gt=1)
    """Bound -A * dual_clip of the loss for A < 0; null: off."""

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        inputs = terms.without_masked(inputs)
        ratio = terms.ratio(inputs)
        surrogate, metrics = terms.clipped_surrogate(ratio, inputs, self)
        surrogate = terms.dual_clipped(surrogate, inputs, self.dual_clip, metrics)
        return terms.total(inputs, self, surrogate, metrics, ratio)
