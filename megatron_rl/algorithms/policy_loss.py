"""What a policy loss is: its options, how it is called, and what it may ask of the mini-batch, the step and the config.

Each method is a subclass in a file of methods/; a user's own, `loss.type: my_module:MyLoss`, is such a file elsewhere.
Nothing here imports torch: a config is read without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator

from megatron_rl.section import Float, NonNegativeFloat, PositiveFloat, Section, UnitFloat

if TYPE_CHECKING:
    from megatron_rl.types import LossInputs, LossOutputs, MiniBatch, Ranks, TrainBatch

Statistics = Literal["current", "old"]
Anchor = Literal["rollout", "old"]  # the policy that sampled, or that at the start of the step
Aggregation = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant_length"]


class RolloutCorrection(Section):
    """Weights w = exp(old_logprobs - rollout_logprobs) on the surrogate, where the engine sampled from other
    probabilities than the trainer computes."""

    weights: Literal["truncate", "mask", "reject", "none"] = "truncate"
    """truncate: min(w, cap); mask: w, and 0 outside [floor, cap]; reject: 1, and 0 outside; none: 1 (with max_kl or
    max_negative_kl)."""
    level: Literal["token", "sequence", "geometric"] = "token"
    """token: one w per token; sequence: their product over the response; geometric: its root, the geometric mean."""
    cap: PositiveFloat = 2.0
    """Largest weight; for mask at level token 5 is usual, at level geometric 1.001 to 1.05."""
    floor: NonNegativeFloat = 0.5
    """Smallest weight, for mask and reject."""
    max_kl: PositiveFloat | None = None
    """Drop a sequence whose mean KL(rollout || old), nats per token, exceeds this; null: keep all."""
    max_negative_kl: PositiveFloat | None = None
    """Drop a sequence of negative advantage whose mean log(rollout / current), nats, exceeds this; null: keep all."""

    @model_validator(mode="after")
    def _bounds(self) -> RolloutCorrection:
        if self.weights in ("mask", "reject") and self.floor >= self.cap:
            raise ValueError(f"floor={self.floor} must be below cap={self.cap}")
        if self.weights == "none" and self.max_kl is None and self.max_negative_kl is None:
            raise ValueError(
                "weights=none without max_kl and max_negative_kl corrects nothing; set one of them, or "
                "rollout_correction to null"
            )
        return self


class AdaptiveEntropy(Section):
    """An entropy coefficient that follows a target entropy (Skywork-OR1, arXiv 2505.22312, section 3.2.5)."""

    target_entropy: NonNegativeFloat = 0.2
    """Nats per token; there is no bonus above it."""
    step: PositiveFloat = 0.005
    """The coefficient's change from step to step."""
    initial_coef: NonNegativeFloat = 0.0
    """Coefficient of the first step."""
    max_coef: PositiveFloat = 1.0
    """The coefficient stays in [0, max_coef]."""

    @model_validator(mode="after")
    def _bounds(self) -> AdaptiveEntropy:
        if self.initial_coef > self.max_coef:
            raise ValueError(f"initial_coef={self.initial_coef} must not exceed max_coef={self.max_coef}")
        return self


class EntropyBand(Section):
    """A target band of the entropy: outside it, an option of the covariance method is raised or lowered every step."""

    low: NonNegativeFloat
    """Nats per token; below it the restraint grows."""
    high: PositiveFloat
    """Nats per token; above it the restraint shrinks."""
    option: Literal["select_fraction", "kl_coef"] = "select_fraction"
    """What is adapted, beginning at the loss's own value; kl_coef: KL-Cov only."""
    gain: PositiveFloat = 10.0
    """The option's logarithm moves at once by this per nat outside the band."""
    integral_gain: NonNegativeFloat = 0.1
    """It also moves for good by this per nat outside and step; 0: it comes back to the loss's own value."""
    minimum: PositiveFloat
    """Smallest value of the option."""
    maximum: PositiveFloat
    """Largest value of the option."""

    @model_validator(mode="after")
    def _bounds(self) -> EntropyBand:
        if self.low >= self.high or self.minimum >= self.maximum:
            raise ValueError(
                f"low={self.low} must be below high={self.high}, and minimum={self.minimum} below "
                f"maximum={self.maximum}"
            )
        if self.option == "select_fraction" and self.maximum > 1:
            raise ValueError(f"maximum={self.maximum}: select_fraction is a fraction, at most 1")
        return self


class PolicyLoss(Section):
    """A policy loss: its fields are the options of the section `loss`; called, it is a pure function of one packed
    micro-batch. terms.py says what it must give and has what the losses share."""

    compared: ClassVar[dict[str, dict[str, Any]]] = {}
    """What `megatron-rl shadow` compares, name -> options for a small model; empty: its defaults, under its type."""

    type: str = ""
    """Which loss it is: a name of methods/, or module:Class of your own."""
    aggregation: Aggregation = "token_mean"
    """Weights of the token losses; constant_length divides by max_response_tokens (Dr.GRPO)."""
    entropy_coef: Float = 0.0
    """Entropy bonus: the loss gets -entropy_coef * H."""
    adaptive_entropy: AdaptiveEntropy | None = None
    """The entropy coefficient follows a target entropy from step to step; null: it is constant."""
    ref_kl_coef: NonNegativeFloat = 0.0
    """Weight of the KL divergence to the initial policy; 0: no reference is kept."""
    ref_kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of that divergence: joschu.net/blog/kl-approx.html."""
    rollout_correction: RolloutCorrection | None = None
    """Importance weights against the engine's probabilities; null: off."""

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        """Return the loss of one packed micro-batch, a sum over its tokens, and metrics."""
        raise NotImplementedError

    def mark(self, mini_batch: MiniBatch, ranks: Ranks, *, seed: int, step: int) -> MiniBatch:
        """Return the mini-batch with what the loss needs to know of all of it: in `selected` the tokens that it picks,
        in `surrogate_weights` how much each weighs, in `selection` metrics. A collective; all ranks decide alike.

        mini_batch: its `stats`, with sum_p2, are of the weights that `statistics` asks for. ranks: those that hold
        different tokens; sums, maxima and top-k over them do not depend on the layout. seed, step: for what is drawn by
        hash. The collectives cannot hide behind the update: they decide the loss of its first micro-batch.
        """
        return mini_batch

    def follow(self, batch: TrainBatch, ranks: Ranks, state: dict[str, float]) -> tuple[PolicyLoss, dict[str, float]]:
        """Return the loss of the step that trains on `batch`, and what it remembers for the next step. A collective.

        state: what this returned in the step before, through checkpoints too; empty at first. A loss keeps what it
        reads of it in a private attribute of a copy. Each value is logged as `control/<name>`.
        """
        return self, {}

    @property
    def statistics(self) -> Statistics | None:
        """Return under which weights the statistics are that `mark` looks at: current costs a forward pass for each
        mini-batch but the first of a step; None: it looks at none."""
        return None

    @property
    def band(self) -> EntropyBand | None:
        """Return the target band that an option of the loss follows, if one does."""
        return getattr(self, "entropy_band", None)

    def faults(self, config: Any) -> Iterator[str]:
        """Yield what cannot work together with the rest of the run's config: what was got, and what to change."""
        yield from ()

    def notes(self, config: Any) -> Iterator[str]:
        """Yield what the run's config allows and its user should know."""
        yield from ()


class ClippedLoss(PolicyLoss):
    """Options of the losses that clip the probability ratio to [1 - eps_low, 1 + eps_high]."""

    eps_low: UnitFloat = 0.2
    """The ratio's lower bound is 1 - eps_low."""
    eps_high: NonNegativeFloat = 0.2
    """The ratio's upper bound is 1 + eps_high."""


def corrected_twice(loss: PolicyLoss, anchor: Anchor) -> Iterator[str]:
    """Yield that the weights of `rollout_correction` correct what a ratio to the policy that sampled contains."""
    if anchor == "rollout" and loss.rollout_correction is not None and loss.rollout_correction.weights != "none":
        yield (
            f"loss.anchor=rollout with loss.rollout_correction.weights={loss.rollout_correction.weights}: the ratio to "
            "the policy that sampled contains these weights already; set weights=none, or anchor=old"
        )
