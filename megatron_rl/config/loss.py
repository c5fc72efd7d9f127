"""The policy losses and their options."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_rl.config.section import Fraction, Section


class RolloutCorrection(Section):
    """Weights w = exp(old_logprobs - rollout_logprobs) on the surrogate, where the engine sampled from other
    probabilities than the trainer computes."""

    weights: Literal["truncate", "mask", "none"] = Field(
        "truncate", description="truncate: min(w, cap); mask: 0 outside [floor, cap]; none: 1 (with max_kl)"
    )
    level: Literal["token", "sequence"] = Field("token", description="one w per token, or their product per sequence")
    cap: Annotated[float, Field(gt=0)] = Field(2.0, description="largest weight; mask at level token: 5 is usual")
    floor: Annotated[float, Field(ge=0)] = Field(0.5, description="mask: smallest weight")
    max_kl: Annotated[float, Field(gt=0)] | None = Field(
        None, description="drop a sequence whose mean KL(rollout || old), nats per token, exceeds this; null: keep all"
    )

    @model_validator(mode="after")
    def _bounds(self) -> RolloutCorrection:
        if self.weights == "mask" and self.floor >= self.cap:
            raise ValueError(f"floor={self.floor} must be below cap={self.cap}")
        if self.weights == "none" and self.max_kl is None:
            raise ValueError("weights=none without max_kl corrects nothing; set max_kl, or rollout_correction to null")
        return self


class AdaptiveEntropy(Section):
    """An entropy coefficient that follows a target entropy (Skywork-OR1, arXiv 2505.22312, section 3.2.5)."""

    target_entropy: Annotated[float, Field(ge=0)] = Field(0.2, description="nats per token; no bonus above it")
    step: Annotated[float, Field(gt=0)] = Field(0.005, description="the coefficient's change from step to step")
    initial_coef: Annotated[float, Field(ge=0)] = Field(0.0, description="coefficient of the first step")
    max_coef: Annotated[float, Field(gt=0)] = Field(1.0, description="the coefficient stays in [0, max_coef]")

    @model_validator(mode="after")
    def _bounds(self) -> AdaptiveEntropy:
        if self.initial_coef > self.max_coef:
            raise ValueError(f"initial_coef={self.initial_coef} must not exceed max_coef={self.max_coef}")
        return self


class LossBase(Section):
    """Options that every loss shares."""

    aggregation: Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant_length"] = Field(
        "token_mean", description="weights of token losses; constant_length divides by max_response_tokens (Dr.GRPO)"
    )
    entropy_coef: float = Field(0.0, description="entropy bonus; the loss gets -entropy_coef * H")
    adaptive_entropy: AdaptiveEntropy | None = Field(
        None, description="entropy_coef follows a target entropy from step to step; null: it is constant"
    )
    ref_kl_coef: Annotated[float, Field(ge=0)] = Field(
        0.0, description="KL to the initial policy; 0: no reference is kept"
    )
    ref_kl_estimator: Literal["k1", "k2", "k3"] = Field("k3", description="joschu.net/blog/kl-approx.html")
    rollout_correction: RolloutCorrection | None = Field(
        None, description="importance weights against the engine's probabilities; null: off"
    )


class PpoClipLoss(LossBase):
    """PPO-clip with separate bounds (GRPO 0.2/0.2; clip-higher 0.2/0.28)."""

    type: Literal["ppo_clip"] = "ppo_clip"
    eps_low: Annotated[float, Field(ge=0, le=1)] = Field(0.2, description="ratio lower bound 1 - eps_low")
    eps_high: Annotated[float, Field(ge=0)] = Field(0.2, description="ratio upper bound 1 + eps_high")
    dual_clip: Annotated[float, Field(gt=1)] | None = Field(
        None, description="bound -A * dual_clip for A < 0; null: off"
    )


class ForkingLoss(LossBase):
    """80/20 (arXiv 2506.01939): only the tokens of highest entropy, the forks, get the policy gradient."""

    type: Literal["forking"] = "forking"
    eps_low: Annotated[float, Field(ge=0, le=1)] = Field(0.2, description="PPO-clip below")
    eps_high: Annotated[float, Field(ge=0)] = Field(0.28, description="PPO-clip above; the paper's base is DAPO")
    keep_fraction: Fraction = Field(0.2, description="of the mini-batch's response tokens, those of highest entropy")
    stats: Literal["current", "old"] = Field("current", description="entropies of which weights; old is free")


class EntropyAdvantageLoss(LossBase):
    """Entropy-shaped advantage (arXiv 2506.14758): A + min(alpha * H, |A| / kappa), H without gradient."""

    type: Literal["entropy_advantage"] = "entropy_advantage"
    eps_low: Annotated[float, Field(ge=0, le=1)] = Field(0.2, description="PPO-clip below")
    eps_high: Annotated[float, Field(ge=0)] = Field(0.2, description="PPO-clip above")
    alpha: Annotated[float, Field(gt=0)] = Field(0.4, description="advantage per nat of entropy")
    kappa: Annotated[float, Field(gt=1)] = Field(2.0, description="the bonus is at most |A| / kappa")


class SteerLoss(LossBase):
    """STEER (arXiv 2510.10150): tokens weigh less, the larger their estimated change of entropy."""

    type: Literal["steer"] = "steer"
    eps_low: Annotated[float, Field(ge=0, le=1)] = Field(0.2, description="PPO-clip below")
    eps_high: Annotated[float, Field(ge=0)] = Field(0.2, description="PPO-clip above")
    weight_min: Annotated[float, Field(gt=0, lt=1)] = Field(0.7, description="weight of the largest change")
    stats: Literal["current", "old"] = Field("current", description="estimate under which weights; old is free")


class GaussianCovLoss(LossBase):
    """Covariance-weighted GRPO (arXiv 2605.11538): a Gaussian kernel weighs down tokens of extreme covariance."""

    type: Literal["gaussian_cov"] = "gaussian_cov"
    eps_low: Annotated[float, Field(ge=0, le=1)] = Field(0.2, description="PPO-clip below")
    eps_high: Annotated[float, Field(ge=0)] = Field(0.2, description="PPO-clip above")
    stats: Literal["current", "old"] = Field("current", description="covariance under which weights; old is free")


class EntropyBand(Section):
    """A target band of the entropy: outside it, an option of the covariance method is raised or lowered every step."""

    low: Annotated[float, Field(ge=0)] = Field(description="nats per token; below it the restraint grows")
    high: Annotated[float, Field(gt=0)] = Field(description="nats per token; above it the restraint shrinks")
    option: Literal["select_fraction", "kl_coef"] = Field(
        "select_fraction", description="what is adapted, beginning at the loss's own value; kl_coef: KL-Cov only"
    )
    gain: Annotated[float, Field(gt=0)] = Field(10.0, description="its logarithm moves at once by this per nat outside")
    integral_gain: Annotated[float, Field(ge=0)] = Field(
        0.1, description="and for good by this per nat outside and step; 0: it comes back to the loss's own value"
    )
    minimum: Annotated[float, Field(gt=0)] = Field(description="smallest value")
    maximum: Annotated[float, Field(gt=0)] = Field(description="largest value")

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


class CovarianceLoss(LossBase):
    """Options of the two covariance methods (arXiv 2505.22617)."""

    cov_scope: Literal["minibatch", "microbatch"] = Field(
        "minibatch", description="tokens over which means, quota and top-k run; microbatch reproduces the authors' code"
    )
    cov_logprobs: Literal["current", "old"] = Field("current", description="old is free and one update stale")
    cov_estimator: Literal["batch", "vocab"] = Field(
        "batch", description="batch: Theorem 2; vocab: Theorem 1 per state, exact over the vocabulary"
    )
    entropy_band: EntropyBand | None = Field(None, description="adapt an option to a target entropy; null: off")


class ClipCovLoss(CovarianceLoss):
    """Clip-Cov: a random few of the tokens with high covariance leave the gradient."""

    type: Literal["clip_cov"] = "clip_cov"
    eps_low: Annotated[float, Field(ge=0, le=1)] = Field(1.0, description="PPO-clip below")
    eps_high: Annotated[float, Field(ge=0)] = Field(1.0, description="PPO-clip above")
    select_fraction: Fraction = Field(2e-4, description="of the mini-batch's response tokens")
    cov_low: float = Field(1.0, description="candidates have cov_low < cov < cov_high")
    cov_high: float = Field(5.0, description="candidates have cov_low < cov < cov_high")


class KlCovLoss(CovarianceLoss):
    """KL-Cov: the tokens of largest covariance pay |log ratio|."""

    type: Literal["kl_cov"] = "kl_cov"
    select_fraction: Fraction = Field(2e-3, description="of the mini-batch's response tokens")
    kl_coef: Annotated[float, Field(ge=0)] = Field(1.0, description="of |logprobs - old_logprobs| on selected tokens")


class GspoLoss(LossBase):
    """GSPO (arXiv 2507.18071): sequence-level ratio, clipped."""

    type: Literal["gspo"] = "gspo"
    eps_low: Annotated[float, Field(ge=0, le=1)] = Field(3e-4, description="sequence ratio lower bound 1 - eps_low")
    eps_high: Annotated[float, Field(ge=0)] = Field(4e-4, description="sequence ratio upper bound 1 + eps_high")


class CispoLoss(LossBase):
    """CISPO (arXiv 2506.13585): the clipped ratio is a weight without gradient."""

    type: Literal["cispo"] = "cispo"
    eps_low: Annotated[float, Field(ge=0, le=1)] = Field(1.0, description="weight lower bound 1 - eps_low")
    eps_high: Annotated[float, Field(ge=0)] = Field(0.28, description="weight upper bound 1 + eps_high")


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
    Field(discriminator="type", description="the policy loss"),
]
