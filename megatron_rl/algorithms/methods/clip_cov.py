"""Clip-Cov: PPO's clipped surrogate with factor 0 on a random few of the tokens with high covariance.

These stay in the denominator. The defaults are the authors' recipe.
Source: arXiv 2505.22617, Clip-Cov and eq. 11; the authors' `compute_policy_loss_clip_cov`.
"""

from collections.abc import Iterator
from typing import Any

from megatron_rl.algorithms.families import CovarianceLoss
from megatron_rl.algorithms.later import Flags, LossInputs, LossOutputs, MiniBatch, Numbers, hashing, kl, terms, torch
from megatron_rl.algorithms.policy_loss import ClippedLoss
from megatron_rl.algorithms.section import Float, Fraction, NonNegativeFloat, UnitFloat


class ClipCovLoss(CovarianceLoss, ClippedLoss):
    compared = {"clip_cov": {"select_fraction": 0.02, "cov_low": 0.2}}
    restraints = {"cov_low": -1}
    type: str = "clip_cov"
    eps_low: UnitFloat = 1.0
    """The ratio's lower bound is 1 - eps_low."""
    eps_high: NonNegativeFloat = 1.0
    """The ratio's upper bound is 1 + eps_high."""
    select_fraction: Fraction = 2e-4
    """Fraction of the mini-batch's response tokens that is selected."""
    cov_low: Float = 1.0
    """Candidates have cov_low < cov < cov_high."""
    cov_high: Float = 5.0
    """Candidates have cov_low < cov < cov_high."""

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        inputs = terms.without_masked(inputs)
        selected, ratio = terms.marked("selected", inputs, self), terms.ratio(inputs)
        surrogate, metrics = terms.clipped_surrogate(ratio, inputs, self)
        surrogate = torch.where(selected, 0.0, surrogate)
        metrics["loss/selected_fraction"] = kl.masked_sum_count(selected, inputs.loss_mask)
        return terms.total(inputs, self, surrogate, metrics, ratio)

    def priority(self, part: MiniBatch, cov: Numbers, counter: tuple[int, int, int]) -> tuple[Flags, Numbers]:
        """Return (candidates, priority): tokens inside the bounds that PPO's clip has not cut, in a hashed order.

        The order is a pure function of (seed, step, mini-batch, prompt_id, sample_index, position), so every layout
        draws the same subset.
        """
        advantages, ratio = part.cat("advantages"), (part.cat_stats("logprobs") - part.cat("old_logprobs")).exp()
        # the authors' `clip_by_origin`
        clipped = -advantages * ratio.clamp(1 - self.eps_low, 1 + self.eps_high) > -advantages * ratio
        candidates = (cov > self.cov_low) & (cov < self.cov_high) & ~clipped
        places = (part.cat(name) for name in ("prompt_ids", "sample_indices", "position_ids"))
        return candidates, hashing.hash_uniform(*counter, *places)

    def faults(self, config: Any) -> Iterator[str]:
        yield from super().faults(config)
        if self.cov_low >= self.cov_high:
            yield f"loss.cov_low={self.cov_low} must be below loss.cov_high={self.cov_high}"
