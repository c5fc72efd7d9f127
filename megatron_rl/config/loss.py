"""The policy losses and their options."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_rl.config.section import Float, Fraction, NonNegativeFloat, PositiveFloat, Section

Statistics = Literal["current", "old"]


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


class LossBase(Section):
    """Options that every loss shares."""

    type: str
    """Which loss it is."""
    aggregation: Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant_length"] = "token_mean"
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

    @property
    def needs_current_statistics(self) -> bool:
        """Return whether the loss chooses or weighs tokens by statistics of the current weights, a forward pass for
        each mini-batch but the first of a step."""
        return "current" in (getattr(self, "stats", None), getattr(self, "cov_logprobs", None))

    @property
    def band(self) -> EntropyBand | None:
        """Return the target band that an option of the loss follows, if one does."""
        return getattr(self, "entropy_band", None)


class ClippedLoss(LossBase):
    """Options of the losses that clip the probability ratio to [1 - eps_low, 1 + eps_high]."""

    eps_low: Float = Field(0.2, ge=0, le=1)
    """The ratio's lower bound is 1 - eps_low."""
    eps_high: NonNegativeFloat = 0.2
    """The ratio's upper bound is 1 + eps_high."""


class StatisticsLoss(ClippedLoss):
    """Options of the losses that weigh tokens by their entropy or covariance."""

    stats: Statistics = "current"
    """Weights under which these are computed; old is free and one update stale."""


class PpoClipLoss(ClippedLoss):
    """PPO-clip with separate bounds (GRPO 0.2/0.2; clip-higher 0.2/0.28)."""

    type: Literal["ppo_clip"] = "ppo_clip"
    dual_clip: Float | None = Field(None, gt=1)
    """Bound -A * dual_clip of the loss for A < 0; null: off."""


class ForkingLoss(StatisticsLoss):
    """80/20 (arXiv 2506.01939): only the tokens of highest entropy, the forks, get the policy gradient.

    The paper's base is DAPO: eps_high is 0.28.
    """

    type: Literal["forking"] = "forking"
    eps_high: NonNegativeFloat = 0.28
    """The ratio's upper bound is 1 + eps_high."""
    keep_fraction: Fraction = 0.2
    """Fraction of the mini-batch's response tokens that is kept, those of highest entropy."""


class EntropyAdvantageLoss(ClippedLoss):
    """Entropy-shaped advantage (arXiv 2506.14758): A + min(alpha * H, |A| / kappa), H without gradient."""

    type: Literal["entropy_advantage"] = "entropy_advantage"
    alpha: PositiveFloat = 0.4
    """Advantage per nat of entropy."""
    kappa: Float = Field(2.0, gt=1)
    """The bonus is at most |A| / kappa."""


class SteerLoss(StatisticsLoss):
    """STEER (arXiv 2510.10150): tokens weigh less, the larger their estimated change of entropy."""

    type: Literal["steer"] = "steer"
    weight_min: Float = Field(0.7, gt=0, lt=1)
    """Weight of the token with the largest change."""


class GaussianCovLoss(StatisticsLoss):
    """Covariance-weighted GRPO (arXiv 2605.11538): a Gaussian kernel weighs down tokens of extreme covariance."""

    type: Literal["gaussian_cov"] = "gaussian_cov"


class CovarianceLoss(LossBase):
    """Options of the two covariance methods (arXiv 2505.22617)."""

    cov_scope: Literal["minibatch", "microbatch"] = "minibatch"
    """Tokens over which means, quota and top-k run; microbatch reproduces the authors' code."""
    cov_logprobs: Statistics = "current"
    """Weights under which the covariance is computed; old is free and one update stale."""
    cov_estimator: Literal["batch", "vocab"] = "batch"
    """batch: Theorem 2; vocab: Theorem 1 per state, exact over the vocabulary."""
    entropy_band: EntropyBand | None = None
    """Adapt an option to a target entropy; null: off."""
    select_fraction: Fraction
    """Fraction of the mini-batch's response tokens that is selected."""


class ClipCovLoss(CovarianceLoss, ClippedLoss):
    """Clip-Cov: a random few of the tokens with high covariance leave the gradient."""

    type: Literal["clip_cov"] = "clip_cov"
    eps_low: Float = Field(1.0, ge=0, le=1)
    """The ratio's lower bound is 1 - eps_low."""
    eps_high: NonNegativeFloat = 1.0
    """The ratio's upper bound is 1 + eps_high."""
    select_fraction: Fraction = 2e-4
    """Fraction of the mini-batch's response tokens that is selected."""
    cov_low: Float = 1.0
    """Candidates have cov_low < cov < cov_high."""
    cov_high: Float = 5.0
    """Candidates have cov_low < cov < cov_high."""


class KlCovLoss(CovarianceLoss):
    """KL-Cov: the tokens of largest covariance pay |log ratio|."""

    type: Literal["kl_cov"] = "kl_cov"
    select_fraction: Fraction = 2e-3
    """Fraction of the mini-batch's response tokens that is selected."""
    kl_coef: NonNegativeFloat = 1.0
    """Weight of |logprobs - old_logprobs| on selected tokens."""


class GspoLoss(ClippedLoss):
    """GSPO (arXiv 2507.18071): the ratio is of the whole sequence."""

    type: Literal["gspo"] = "gspo"
    eps_low: Float = Field(3e-4, ge=0, le=1)
    """The sequence ratio's lower bound is 1 - eps_low."""
    eps_high: NonNegativeFloat = 4e-4
    """The sequence ratio's upper bound is 1 + eps_high."""


class CispoLoss(ClippedLoss):
    """CISPO (arXiv 2506.13585): the clipped ratio is a weight without gradient."""

    type: Literal["cispo"] = "cispo"
    eps_low: Float = Field(1.0, ge=0, le=1)
    """The weight's lower bound is 1 - eps_low."""
    eps_high: NonNegativeFloat = 0.28
    """The weight's upper bound is 1 + eps_high."""


LossConfig = Annotated[
    PpoClipLoss
    | ClipCovLoss
    | KlCovLoss
    | GspoLoss
    | CispoLoss
    | ForkingLoss
    | EntropyAdvantageLoss
    | SteerLoss
    | GaussianCovLoss,
    Field(discriminator="type", description="The policy loss."),
]
