"""Options of the loss that move over the steps: `adapt`, a pure function of (options, state, entropy, step).

Every rank calls it once a step with the same global mean entropy, so that all hold the same state; the state is plain
data and travels with the checkpoint.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from megatron_rl.algorithms.kl import masked_sum_count
from megatron_rl.types import Ranks, TrainBatch

if TYPE_CHECKING:
    from megatron_rl.algorithms.policy_loss import AdaptiveEntropy, EntropyBand, PolicyLoss

    Loss = TypeVar("Loss", bound=PolicyLoss)

# option of the loss: where its next step begins; empty before the first step. `own`: what the loss itself remembers
ControlState = dict[str, Any]


class LossController:
    """Holds what of the loss changes from step to step; where nothing does it asks nothing of the ranks."""

    def __init__(self, loss: PolicyLoss, ranks: Ranks) -> None:
        """`ranks`: those that hold different tokens."""
        self.state: ControlState = {}
        self.metrics: dict[str, float] = {}  # `control/*` of the last step
        self._loss, self._ranks = loss, ranks

    def next_loss(self, batch: TrainBatch) -> PolicyLoss:
        """Return the loss of the step that trains on `batch`, the same on every rank. A collective."""
        entropy = mean_entropy(batch, self._ranks) if follows_entropy(self._loss) else math.nan
        remembered = self.state.get("own", {})
        loss, self.state, self.metrics = adapt(self._loss, self.state, entropy, batch.step)
        loss, own = loss.follow(batch, self._ranks, remembered)
        if own:
            self.state, self.metrics = self.state | {"own": own}, self.metrics | {f"control/{k}": own[k] for k in own}
        return loss


def mean_entropy(batch: TrainBatch, ranks: Ranks) -> float:
    """Return the mean entropy of the step's response tokens on all ranks, under the weights that sampled them, in nats;
    NaN when none counts."""
    total = torch.zeros(2, dtype=torch.float64, device=batch.micro_batches[0].advantages.device)
    for micro_batch in batch.micro_batches:
        total += masked_sum_count(micro_batch.computed_stats.entropy, micro_batch.loss_mask)
    entropy, count = ranks.sum(total).tolist()
    return entropy / count if count else math.nan


def follows_entropy(loss: PolicyLoss) -> bool:
    """Tell whether `adapt` looks at the entropy."""
    return loss.adaptive_entropy is not None or loss.entropy_band is not None


def adapt(loss: Loss, state: ControlState, entropy: float, step: int) -> tuple[Loss, ControlState, dict[str, float]]:
    """Return the loss of this step (from 0), the state of the next one, and metrics `control/*`.

    Schedules have no state: a step's number is all they look at.
    entropy: mean over the step's response tokens under the weights that sampled them, nats; NaN (no token) leaves the
    state alone. A state of options that the loss does not adapt is dropped, and values are moved into the bounds: so a
    run can go on with other bounds.
    """
    in_force: dict[str, Any] = {name: schedule.at(step) for name, schedule in loss.schedules.items()}
    following: ControlState = {}
    if loss.adaptive_entropy is not None:
        options = loss.adaptive_entropy
        coef = _clamp(state.get("entropy_coef", options.initial_coef), 0.0, options.max_coef)
        in_force["entropy_coef"] = coef if entropy <= options.target_entropy else 0.0
        following["entropy_coef"] = next_coef(coef, entropy, options)
    band = loss.entropy_band
    if band is not None:
        base = _clamp(state.get(band.option, getattr(loss, band.option)), band.minimum, band.maximum)
        in_force[band.option], following[band.option] = band_values(
            base, entropy, band, loss.all_restraints()[band.option]
        )
    if not in_force:
        return loss, {}, {}
    return loss.model_copy(update=in_force), following, {f"control/{name}": v for name, v in in_force.items()}


def next_coef(coef: float, entropy: float, options: AdaptiveEntropy) -> float:
    """Return the next step's entropy coefficient: `c + step` below the target entropy, `c - step` above it, c at it.

    `adapt` puts the bonus in force only in steps whose entropy is at most the target: alpha_k = c_k * 1[e_k <= target].
    The bound 0 below is the authors' scripts' (`min_entropy_coeff=0`): without it c would fall as long as the
    entropy is high, and the bonus would have to climb back first. They also set a bound above (`max_entropy_coeff`).
    Source: Skywork-OR1, arXiv 2505.22312, section 3.2.5 (target 0.2; step 0.005 in its ablation, 1e-4 in its scripts).
    """
    change = math.copysign(options.step, options.target_entropy - entropy) if entropy != options.target_entropy else 0.0
    return coef if math.isnan(entropy) else _clamp(coef + change, 0.0, options.max_coef)


def band_values(base: float, entropy: float, band: EntropyBand, sign: int) -> tuple[float, float]:
    """Return the option for this step, and the base of the next one: `base * exp(gain * violation)` and
    `base * exp(integral_gain * violation)`, both inside [minimum, maximum], which keeps the base from winding up.

    violation: nats by which the entropy is below the band (the restraint grows), or minus those by which it is above
    (the restraint shrinks); 0 inside; times `sign`, -1 for an option that restrains by small values. A
    proportional-integral controller of the logarithm: entropy accumulates what the restraint does, and an integral
    alone, acting on an accumulator, would swing for ever.
    """
    if math.isnan(entropy):
        return base, base
    violation = sign * (max(0.0, band.low - entropy) - max(0.0, entropy - band.high))
    values = (base * math.exp(factor * violation) for factor in (band.gain, band.integral_gain))
    now, following = (_clamp(value, band.minimum, band.maximum) for value in values)
    return now, following


def _clamp(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
