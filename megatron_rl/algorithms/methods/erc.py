"""Entropy ratio clipping: tokens at whose state the update has moved the entropy too far leave the gradient.

They are those where `1 - entropy_low < (H + 1e-8) / (H_old + 1e-8) < 1 + entropy_high` does not hold, H the exact
entropy of the whole vocabulary at the token's state. They keep their value and stay in the denominator; no gradient
flows through the entropies.
Source: arXiv 2512.05591, as the authors' code has it: `compute_policy_loss_grpo_erc` and `compute_policy_loss_gppo_erc`
of Kwai-Klear/ERC, with the bounds and the dual clip of its recipes (DAPO 0.2/0.28; GPPO 0.2/0.2).
"""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from megatron_rl.algorithms.later import LossInputs, LossOutputs, MiniBatch, Ranks, kl, terms, torch
from megatron_rl.algorithms.methods.ce_gppo import preserving_surrogate
from megatron_rl.algorithms.policy_loss import ClippedLoss
from megatron_rl.algorithms.section import Float, Fraction, NonNegativeFloat, PositiveFloat

_TINY = 1e-8  # added to both entropies, the authors' value


class ErcLoss(ClippedLoss):
    type: str = "erc"
    eps_high: NonNegativeFloat = 0.28
    """The ratio's upper bound is 1 + eps_high."""
    base: Literal["ppo_clip", "gppo"] = "ppo_clip"
    """The surrogate; gppo: what it clips keeps the gradient of the bound (CE-GPPO with both betas 1)."""
    entropy_low: Fraction = 0.05
    """The lower bound of current entropy over old entropy is 1 - entropy_low."""
    entropy_high: PositiveFloat = 0.05
    """The upper bound of current entropy over old entropy is 1 + entropy_high."""
    dual_clip: Float | None = Field(10.0, gt=1)
    """Bound -A * dual_clip of the loss for A < 0; null: off."""

    def mark(self, mini_batch: MiniBatch, ranks: Ranks, *, seed: int, step: int) -> MiniBatch:
        """Return the mini-batch with the entropy at the start of the step in `old_entropy`. No collective."""
        old = [micro_batch.computed_stats.entropy for micro_batch in mini_batch.micro_batches]
        return mini_batch.replace_each("old_entropy", old)

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        inputs = terms.without_masked(inputs)
        old_entropy, ratio = terms.marked("old_entropy", inputs, self), terms.ratio(inputs)
        if self.base == "ppo_clip":
            surrogate, metrics = terms.clipped_surrogate(ratio, inputs, self)
        else:
            surrogate, metrics = preserving_surrogate(ratio, inputs, self, 1.0, 1.0)
        surrogate = terms.dual_clipped(surrogate, inputs, self.dual_clip, metrics)
        entropy_ratio = (inputs.entropy + _TINY) / (old_entropy + _TINY)
        inside = (entropy_ratio > 1 - self.entropy_low) & (entropy_ratio < 1 + self.entropy_high)
        metrics["loss/entropy_clip_fraction"] = kl.masked_sum_count(inside.logical_not(), inputs.loss_mask)
        surrogate = torch.where(inside, surrogate, surrogate.detach())
        return terms.total(inputs, self, surrogate, metrics, ratio)

    def faults(self, config: Any) -> Iterator[str]:
        """Yield that no pass gives the entropy that the current one is compared with."""
        if config.algorithm.old_logprobs == "rollout":
            yield (
                "loss.type=erc with algorithm.old_logprobs=rollout: no pass gives the old policy's entropy; set "
                "old_logprobs=recompute"
            )

    def notes(self, config: Any) -> Iterator[str]:
        """Yield that one update a step leaves nothing to clip."""
        if config.minibatches_per_step == 1:
            yield (
                "loss.type=erc with one mini-batch per step: the entropy has not moved when the update is computed, so "
                "ERC then does nothing. Lower train.prompts_per_minibatch to get several updates a step"
            )
