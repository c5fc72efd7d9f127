"""REPO-R: PPO's clipped surrogate of the advantage `A * max(0, 1 - sign(A) zeta L)`, L = log pi of the current policy.

L has no gradient, and the factor never changes the sign of A. zeta can follow the entropy, see `next_zeta`.
Source: arXiv 2603.11682, appendix D.2, as SkyRL's pull request 1896 reads it; paper and its code were not at hand. The
paper's L is the log-probability less its mean, `log pi + H`; both take the log-probability alone in practice (`centred:
false`). Not said by the sources, and decided here: the sign of zeta changes when halving would take it below zeta_min,
and an entropy exactly at its target changes nothing. The same paper's ADAPO is not here: its step and bounds were not
at hand.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import model_validator

from megatron_rl.algorithms.later import LossInputs, LossOutputs, Ranks, TrainBatch, control, kl, terms
from megatron_rl.algorithms.policy_loss import ClippedLoss
from megatron_rl.algorithms.section import Float, NonNegativeFloat, PositiveFloat


class RepoRLoss(ClippedLoss):
    compared = {"repo_r": {"zeta": 0.05, "target_entropy": None}}
    type: str = "repo_r"
    zeta: Float = 1e-3
    """Rescaling per nat, in the first step where it is adapted; above 0 rare tokens count more where A > 0, less where
    A < 0."""
    target_entropy: NonNegativeFloat | Literal["initial"] | None = "initial"
    """Entropy towards which zeta is adapted, nats per token; initial: that of the first step; null: zeta is
    constant."""
    zeta_min: PositiveFloat = 1e-4
    """Smallest magnitude of an adapted zeta."""
    zeta_max: PositiveFloat = 0.05
    """Largest magnitude of an adapted zeta."""
    centred: bool = False
    """Rescale by log pi + H, whose mean over the state's vocabulary is 0, in place of log pi."""

    @model_validator(mode="after")
    def _bounds(self) -> RepoRLoss:
        if self.target_entropy is not None and not self.zeta_min <= abs(self.zeta) <= self.zeta_max:
            raise ValueError(
                f"zeta={self.zeta} is adapted between zeta_min={self.zeta_min} and zeta_max={self.zeta_max}, up to its "
                "sign; begin between them, or set target_entropy to null"
            )
        return self

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        inputs = terms.without_masked(inputs)
        surprise = -inputs.logprobs.detach() - (inputs.entropy.detach() if self.centred else 0.0)
        factor = (1 + inputs.advantages.sign() * self.zeta * surprise).clamp_min(0)
        scaled, ratio = dataclasses.replace(inputs, advantages=inputs.advantages * factor), terms.ratio(inputs)
        surrogate, metrics = terms.clipped_surrogate(ratio, scaled, self)
        metrics["loss/advantage_factor"] = kl.masked_sum_count(factor, inputs.loss_mask)
        return terms.total(scaled, self, surrogate, metrics, ratio)

    def follow(self, batch: TrainBatch, ranks: Ranks, state: dict[str, float]) -> tuple[RepoRLoss, dict[str, float]]:
        """Return the loss with this step's zeta, and what the next step needs: that and the target."""
        if self.target_entropy is None:
            return self, {}
        entropy = control.mean_entropy(batch, ranks)
        target = state.get("target_entropy", entropy) if self.target_entropy == "initial" else self.target_entropy
        zeta = self.next_zeta(state.get("zeta", self.zeta), entropy, target)
        known = {} if math.isnan(target) else {"target_entropy": target}  # no token has counted yet
        return self.model_copy(update={"zeta": zeta}), {"zeta": zeta, **known}

    def next_zeta(self, zeta: float, entropy: float, target: float) -> float:
        """Return zeta doubled away from 0 or halved towards it, within the bounds: upwards where the entropy is below
        its target, downwards where it is above; at `zeta_min` it changes its sign. NaN and equality change nothing."""
        zeta = math.copysign(min(max(abs(zeta), self.zeta_min), self.zeta_max), zeta)  # bounds may have changed
        if not entropy < target and not entropy > target:
            return zeta
        sign = 1.0 if entropy < target else -1.0
        if zeta * sign > 0:
            return sign * min(2 * abs(zeta), self.zeta_max)
        return zeta / 2 if abs(zeta) / 2 >= self.zeta_min else sign * self.zeta_min

    def faults(self, config: Any) -> Iterator[str]:
        """Yield that no pass gives the entropy that zeta follows."""
        if self.target_entropy is not None and config.algorithm.old_logprobs == "rollout":
            yield (
                "loss.target_entropy with algorithm.old_logprobs=rollout: no pass gives the old policy's entropy; set "
                "target_entropy to null, or old_logprobs=recompute"
            )
