"""What a policy loss is: its options, how it is called, and what it may ask of the mini-batch, the step and the config.

Each method is a subclass in a file of methods/; a user's own, `loss.type: my_module:MyLoss`, is such a file elsewhere.
Nothing here imports torch: a config is read without it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from megatron_rl.algorithms.section import Float, NonNegativeFloat, PositiveFloat, PositiveInt, Section, UnitFloat

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
    """A target band of the entropy: outside it, an option of the loss is raised or lowered every step."""

    low: NonNegativeFloat
    """Nats per token; below it the restraint grows."""
    high: PositiveFloat
    """Nats per token; above it the restraint shrinks."""
    option: str = "select_fraction"
    """What is adapted, beginning at the loss's own value: an option that the loss states in `restraints`."""
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
        return self


class Schedule(Section):
    """How a number option moves over the first steps of a run, after which it stays where it is."""

    model_config = ConfigDict(serialize_by_alias=True)

    start: Float = Field(alias="from")
    """Value in step 0."""
    to: Float
    """Value from step `steps` on."""
    steps: PositiveInt
    """Steps that it takes."""
    shape: Literal["linear", "cosine"] = "linear"
    """linear: as much in each step; cosine: slow at both ends."""

    def at(self, step: int) -> float:
        """Return the value in a step, counted from 0: exactly `from` in the first and `to` at the end."""
        done = min(step / self.steps, 1.0)
        if self.shape == "cosine":
            done = (1.0 - math.cos(math.pi * done)) / 2.0
        return (1.0 - done) * self.start + done * self.to


class PolicyLoss(Section):
    """A policy loss: its fields are the options of the section `loss`; called, it is a pure function of one packed
    micro-batch. terms.py says what it must give and has what the losses share."""

    compared: ClassVar[dict[str, dict[str, Any]]] = {}
    """What `megatron-rl shadow` compares, name -> options for a small model; empty: its defaults, under its type."""
    restraints: ClassVar[dict[str, int]] = {"entropy_coef": 1, "ref_kl_coef": 1}
    """Options that `entropy_band` may adapt, besides those of the base classes: 1 where a larger value holds the
    entropy up, -1 where a smaller one does."""

    type: str = ""
    """Which loss it is: a name of methods/, or module:Class of your own."""
    aggregation: Aggregation = "token_mean"
    """Weights of the token losses; constant_length divides by max_response_tokens (Dr.GRPO)."""
    entropy_coef: Float = 0.0
    """Entropy bonus: the loss gets -entropy_coef * H."""
    adaptive_entropy: AdaptiveEntropy | None = None
    """The entropy coefficient follows a target entropy from step to step; null: it is constant."""
    entropy_band: EntropyBand | None = None
    """Adapt an option to a target entropy; null: off."""
    schedules: dict[str, Schedule] = {}
    """Number options that move over the steps; each may stand in its option's place, as eps_high: {from: 0.2, ...}."""
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

    @classmethod
    def all_restraints(cls) -> dict[str, int]:
        """Return `restraints`, the base classes' included."""
        return {name: sign for base in cls.__mro__ for name, sign in vars(base).get("restraints", {}).items()}

    def at_the_end(self) -> PolicyLoss:
        """Return the loss when all its schedules are over."""
        return self.model_copy(update={name: schedule.to for name, schedule in self.schedules.items()})

    @model_validator(mode="before")
    @classmethod
    def _schedules_apart(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or not isinstance(raw.get("schedules", {}), dict):
            return raw
        moving = {name: raw[name] for name in _number_options(cls) & raw.keys() if isinstance(raw[name], dict)}
        starts = {name: stated["from"] for name, stated in moving.items() if "from" in stated}
        rest = {name: value for name, value in raw.items() if name not in moving}
        return rest | starts | {"schedules": rest.get("schedules", {}) | moving} if moving else raw

    @model_validator(mode="after")
    def _can_move(self) -> PolicyLoss:
        band, numbers, restraints = self.entropy_band, sorted(_number_options(type(self))), self.all_restraints()
        followed = {"entropy_coef": "adaptive_entropy"} if self.adaptive_entropy is not None else {}
        if band is not None:
            if band.option not in restraints or band.option in followed:
                raise ValueError(
                    f"entropy_band.option={band.option}: the loss has no such option to adapt; set it to "
                    f"{' or '.join(sorted(restraints.keys() - followed))}"
                )
            _refuse(self, band.option, {"entropy_band.minimum": band.minimum, "entropy_band.maximum": band.maximum})
            followed[band.option] = "entropy_band"
        for name, schedule in self.schedules.items():
            if name not in numbers:
                raise ValueError(f"schedules.{name}: expected a number option of the loss: {', '.join(numbers)}")
            if name in followed:
                raise ValueError(f"{name} has a schedule and follows {followed[name]}; remove one of them")
            value = getattr(self, name)
            if value != schedule.start:
                raise ValueError(f"{name}={value}, but its schedule begins at from={schedule.start}; make them agree")
            if schedule.start == schedule.to:
                raise ValueError(f"the schedule of {name} goes from {value} to itself; write {name}={value}")
            if name == "ref_kl_coef" and value == 0:
                raise ValueError("a schedule of ref_kl_coef from 0 keeps no reference; begin above 0, as at 1e-6")
            _refuse(self, name, {f"the schedule of {name}, to": schedule.to})
        return self

    def faults(self, config: Any) -> Iterator[str]:
        """Yield what cannot work together with the rest of the run's config: what was got, and what to change."""
        yield from ()

    def notes(self, config: Any) -> Iterator[str]:
        """Yield what the run's config allows and its user should know."""
        yield from ()


def _number_options(loss: type[PolicyLoss]) -> set[str]:
    kinds = {name: (f.annotation, *get_args(f.annotation)) for name, f in loss.model_fields.items()}
    return {name for name, types in kinds.items() if float in [getattr(t, "__origin__", t) for t in types]}


def _refuse(loss: PolicyLoss, option: str, values: dict[str, float]) -> None:
    """Raise ValueError for a value that the option may not have."""
    for name, value in values.items():
        try:
            TypeAdapter(type(loss).model_fields[option].rebuild_annotation()).validate_python(value)
        except ValidationError as error:
            raise ValueError(f"{name}={value}: {option} refuses it: {error.errors()[0]['msg']}") from error


class ClippedLoss(PolicyLoss):
    """Options of the losses that clip the probability ratio to [1 - eps_low, 1 + eps_high]."""

    restraints = {"eps_high": 1}

    eps_low: UnitFloat = 0.2
    """The ratio's lower bound is 1 - eps_low."""
    eps_high: NonNegativeFloat = 0.2
    """The ratio's upper bound is 1 + eps_high."""


class AnchoredLoss(PolicyLoss):
    """Options of the losses whose ratio may be to the policy that sampled."""

    anchor: Anchor = "old"
    """The ratio is to: old: the policy at the start of the step, recomputed; rollout: the policy that sampled, by its
    engine."""

    def faults(self, config: Any) -> Iterator[str]:
        """Yield that importance weights would correct what this ratio corrects."""
        correction = self.rollout_correction
        if self.anchor == "rollout" and correction is not None and correction.weights != "none":
            yield (
                f"loss.anchor=rollout with loss.rollout_correction.weights={correction.weights}: the ratio to the "
                "policy that sampled contains these weights already; set weights=none, or anchor=old"
            )
        yield from super().faults(config)
