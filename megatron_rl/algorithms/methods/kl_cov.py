"""KL-Cov: the unclipped surrogate `-A r`, and `kl_coef * |logprobs - old_logprobs|` on those of largest covariance.

The defaults are the authors' recipe.
The penalty's gradient is 0 where the two are equal, so the first update of a step on fresh samples is plain policy
gradient. It is not multiplied by the importance weights.
Source: arXiv 2505.22617, KL-Cov and eq. 13; the authors' `compute_policy_loss_kl_cov`.
"""

from collections.abc import Iterator
from typing import Any

from megatron_rl.algorithms.families import CovarianceLoss
from megatron_rl.algorithms.later import Flags, LossInputs, LossOutputs, MiniBatch, Numbers, kl, terms, torch
from megatron_rl.algorithms.section import Fraction, NonNegativeFloat


class KlCovLoss(CovarianceLoss):
    compared = {"kl_cov": {"select_fraction": 0.1}}
    restraints = {"kl_coef": 1}
    type: str = "kl_cov"
    select_fraction: Fraction = 2e-3
    """Fraction of the mini-batch's response tokens that is selected."""
    kl_coef: NonNegativeFloat = 1.0
    """Weight of |logprobs - old_logprobs| on selected tokens."""

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        inputs = terms.without_masked(inputs)
        selected, ratio = terms.marked("selected", inputs, self), terms.ratio(inputs)
        distance = torch.where(selected, inputs.logprobs - inputs.old_logprobs, 0.0).abs()
        metrics = {
            "loss/selected_fraction": kl.masked_sum_count(selected, inputs.loss_mask),
            "loss/selected_abs_log_ratio": kl.masked_sum_count(distance, selected),
        }
        return terms.total(inputs, self, -inputs.advantages * ratio, metrics, ratio, extra=self.kl_coef * distance)

    def priority(self, part: MiniBatch, cov: Numbers, counter: tuple[int, int, int]) -> tuple[Flags, Numbers]:
        """Return (candidates, priority): all tokens, by their covariance."""
        return torch.ones_like(cov, dtype=torch.bool), cov

    def notes(self, config: Any) -> Iterator[str]:
        if config.minibatches_per_step == 1:
            yield (
                "loss.type=kl_cov with one mini-batch per step: the update is on-policy, so |logprobs - old_logprobs| "
                "is 0 and its gradient vanishes; KL-Cov then does nothing. Lower train.prompts_per_minibatch to get "
                "several updates a step"
            )
        yield from super().notes(config)
