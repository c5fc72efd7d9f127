"""Policy losses: pure functions of one packed micro-batch.

Each is `loss(inputs, config) -> LossOutputs` and forms, over the counted tokens t,

    loss_sum = sum_t token_weights[t]
               * (is_weight[t] * surrogate[t] + extra[t] - entropy_coef * H[t] + ref_kl_coef * KL[t])

- `surrogate` is the loss's policy-gradient term. Only it is multiplied by the importance weights of
  `rollout_correction` (mismatch.py) and by `surrogate_weights` (weighting.py); the regularisers (entropy, reference KL,
  KL-Cov's penalty) are not.
- `extra` is KL-Cov's penalty; 0 elsewhere.
- The division by the global denominator happens once, outside, so that any split into micro-batches gives the same.

Masked positions may hold anything in any input: they are replaced before the first operation, because inf * 0 is NaN
and the gradient of exp at a huge value is inf even where the result is later discarded.

Metrics are `[2]` float64 (sum, count) over counted tokens: means per token, whatever the aggregation. Exponents are
bounded, see kl.py. Nothing here reads a tensor's value on the host.

All raise ValueError without the tensors that they need: `selected` (clip_cov, kl_cov), `surrogate_weights`
(weighted_clip), and with `ref_kl_coef` > 0 `ref_logprobs`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_rl.algorithms.aggregation import sequence_sums
from megatron_rl.algorithms.kl import k3, kl_penalty, masked_sum_count, safe_exp
from megatron_rl.algorithms.mismatch import rollout_weights
from megatron_rl.types import LossInputs, LossOutputs

if TYPE_CHECKING:
    from megatron_rl.config import loss as options


def ppo_clip(inputs: LossInputs, config: options.PpoClipLoss) -> LossOutputs:
    """Return PPO's clipped surrogate `max(-A r, -A clip(r, 1 - eps_low, 1 + eps_high))` with r = pi / pi_old per token.

    With `dual_clip` = c, tokens of A < 0 lose at most `-A c`; beyond it they have no gradient.
    Source: arXiv 1707.06347, eq. 7; dual clip arXiv 1912.09729; separate bounds arXiv 2503.14476, eq. 10.
    """
    inputs = _without_masked(inputs)
    ratio = safe_exp(inputs.logprobs - inputs.old_logprobs)
    surrogate, metrics = _clipped_surrogate(ratio, inputs, config.eps_low, config.eps_high)
    if config.dual_clip is not None:
        bound = -inputs.advantages * config.dual_clip
        cut = (inputs.advantages < 0) & (surrogate > bound)
        surrogate = torch.where(cut, bound, surrogate)
        metrics["loss/dual_clip_fraction"] = masked_sum_count(cut, inputs.loss_mask)
    return _total(inputs, config, surrogate, metrics, ratio)


def clip_cov(inputs: LossInputs, config: options.ClipCovLoss) -> LossOutputs:
    """Return Clip-Cov: PPO's clipped surrogate with factor 0 on `inputs.selected`, which stay in the denominator.

    Source: arXiv 2505.22617, Clip-Cov; the authors' `compute_policy_loss_clip_cov`.
    """
    inputs = _without_masked(inputs)
    selected = _marked("selected", inputs, config)
    ratio = safe_exp(inputs.logprobs - inputs.old_logprobs)
    surrogate, metrics = _clipped_surrogate(ratio, inputs, config.eps_low, config.eps_high)
    surrogate = torch.where(selected, 0.0, surrogate)
    metrics["loss/selected_fraction"] = masked_sum_count(selected, inputs.loss_mask)
    return _total(inputs, config, surrogate, metrics, ratio)


def kl_cov(inputs: LossInputs, config: options.KlCovLoss) -> LossOutputs:
    """Return KL-Cov: the unclipped surrogate `-A r`, and `kl_coef * |logprobs - old_logprobs|` on `inputs.selected`.

    The penalty's gradient is 0 where the two are equal, so the first update of a step on fresh samples is plain policy
    gradient. It is not multiplied by the importance weights.
    Source: arXiv 2505.22617, KL-Cov; the authors' `compute_policy_loss_kl_cov`.
    """
    inputs = _without_masked(inputs)
    selected = _marked("selected", inputs, config)
    log_ratio = inputs.logprobs - inputs.old_logprobs
    ratio = safe_exp(log_ratio)
    distance = torch.where(selected, log_ratio, 0.0).abs()
    metrics = {
        "loss/selected_fraction": masked_sum_count(selected, inputs.loss_mask),
        "loss/selected_abs_log_ratio": masked_sum_count(distance, selected),
    }
    return _total(inputs, config, -inputs.advantages * ratio, metrics, ratio, extra=config.kl_coef * distance)


def gspo(inputs: LossInputs, config: options.GspoLoss) -> LossOutputs:
    """Return GSPO: PPO's clipped surrogate with one ratio per sequence, `s = exp(mean log(pi / pi_old))`.

    The mean runs over counted tokens. Each carries `max(-A s, -A clip(s))` with the gradient `-A s` (0 when clipped) on
    its own log-probability, the paper's GSPO-token form. Advantages are equal within a sequence, so with the paper's
    `aggregation: seq_mean_token_mean`, value and gradient are those of the sequence objective: ds/dlogprobs[t] =
    s / length is s times the token's weight. A sequence lies in one micro-batch, whole or with its other parts behind
    `inputs.context`; ratios and clip fractions count tokens.
    Source: arXiv 2507.18071, eq. 5-7 and 13-14.
    """
    inputs = _without_masked(inputs)
    counts = sequence_sums(inputs.loss_mask.to(inputs.logprobs.dtype), inputs).clamp_min(1)
    sequence = safe_exp(sequence_sums(inputs.logprobs - inputs.old_logprobs, inputs) / counts)
    # value s, derivative s in the token's own logprob
    ratio = sequence * (inputs.logprobs - inputs.logprobs.detach()).exp()
    surrogate, metrics = _clipped_surrogate(ratio, inputs, config.eps_low, config.eps_high)
    return _total(inputs, config, surrogate, metrics, ratio)


def cispo(inputs: LossInputs, config: options.CispoLoss) -> LossOutputs:
    """Return CISPO: `-sg(clip(r, 1 - eps_low, 1 + eps_high)) * A * logprobs`; the ratio is a weight without gradient.

    Every token keeps a gradient; clipping bounds its size. Clip fractions count ratios outside the bounds, whatever A.
    Source: arXiv 2506.13585, eq. 4-5.
    """
    inputs = _without_masked(inputs)
    ratio = safe_exp(inputs.logprobs - inputs.old_logprobs).detach()
    low, high = 1 - config.eps_low, 1 + config.eps_high
    surrogate = -ratio.clamp(low, high) * inputs.advantages * inputs.logprobs
    metrics = {
        "loss/clip_fraction_low": masked_sum_count(ratio < low, inputs.loss_mask),
        "loss/clip_fraction_high": masked_sum_count(ratio > high, inputs.loss_mask),
    }
    return _total(inputs, config, surrogate, metrics, ratio)


def entropy_advantage(inputs: LossInputs, config: options.EntropyAdvantageLoss) -> LossOutputs:
    """Return PPO's clipped surrogate of the shaped advantage `A + min(alpha * sg(H), |A| / kappa)`.

    H is the entropy of the current policy at the token's state, as a number: no gradient flows into it. kappa > 1 keeps
    the sign of A; where A is 0 nothing is added.
    Source: arXiv 2506.14758, the definition of psi(H_t) and of the shaped advantage (alpha > 0, kappa > 1).
    """
    inputs = _without_masked(inputs)
    bonus = torch.minimum(config.alpha * inputs.entropy.detach(), inputs.advantages.abs() / config.kappa)
    shaped = dataclasses.replace(inputs, advantages=inputs.advantages + bonus)
    ratio = safe_exp(inputs.logprobs - inputs.old_logprobs)
    surrogate, metrics = _clipped_surrogate(ratio, shaped, config.eps_low, config.eps_high)
    metrics["loss/advantage_bonus"] = masked_sum_count(bonus, inputs.loss_mask)
    return _total(shaped, config, surrogate, metrics, ratio)


def weighted_clip(
    inputs: LossInputs, config: options.ForkingLoss | options.SteerLoss | options.GaussianCovLoss
) -> LossOutputs:
    """Return PPO's clipped surrogate, multiplied per token by `inputs.surrogate_weights`.

    80/20, STEER and covariance-weighted GRPO differ in the weights alone; formulas and sources are in weighting.py.
    """
    inputs = _without_masked(inputs)
    weights = _marked("surrogate_weights", inputs, config)
    ratio = safe_exp(inputs.logprobs - inputs.old_logprobs)
    surrogate, metrics = _clipped_surrogate(ratio, inputs, config.eps_low, config.eps_high)
    return _total(inputs, config, weights * surrogate, metrics, ratio)


LossFunction = Callable[[LossInputs], LossOutputs]  # a loss with its options bound

LOSSES: dict[str, Callable[[LossInputs, Any], LossOutputs]] = {
    "ppo_clip": ppo_clip,
    "clip_cov": clip_cov,
    "kl_cov": kl_cov,
    "gspo": gspo,
    "cispo": cispo,
    "forking": weighted_clip,
    "entropy_advantage": entropy_advantage,
    "steer": weighted_clip,
    "gaussian_cov": weighted_clip,
}


def sft(inputs: LossInputs) -> LossOutputs:
    """Return the supervised negative log-likelihood `-logprobs`, for warm starts; metric `loss/nll`, nats per token.

    Reads only `logprobs`, `loss_mask` and `token_weights`.
    """
    nll = -torch.where(inputs.loss_mask, inputs.logprobs, 0.0)
    weights = torch.where(inputs.loss_mask, inputs.token_weights, 0.0)
    return LossOutputs((weights * nll).sum(), {"loss/nll": masked_sum_count(nll, inputs.loss_mask)})


def policy_loss(config: options.LossBase) -> LossFunction:
    """Return the loss that the config names, with its options bound."""
    loss = LOSSES[config.type]
    return lambda inputs: loss(inputs, config)


def _without_masked(inputs: LossInputs) -> LossInputs:
    """Return the same inputs with 0 outside `loss_mask`: log ratio 0, advantage 0, weight 0, not selected."""
    mask = inputs.loss_mask
    changes: dict[str, Any] = {}
    for name, value in ((each.name, getattr(inputs, each.name)) for each in dataclasses.fields(inputs)):
        if isinstance(value, Tensor) and name not in ("loss_mask", "cu_seqlens"):
            changes[name] = torch.where(mask, value, torch.zeros((), dtype=value.dtype, device=value.device))
    return dataclasses.replace(inputs, **changes)


def _marked(name: str, inputs: LossInputs, config: options.LossBase) -> Tensor:
    """Return what `mark_tokens` gives this loss, [T]."""
    marks: Tensor | None = getattr(inputs, name)
    if marks is None:
        raise ValueError(
            f"{config.type} needs LossInputs.{name} [T], got None: run the covariance selection or the weighting "
            "(mark_tokens) on the whole mini-batch before the loss, or choose loss.type=ppo_clip"
        )
    return marks


def _clipped_surrogate(
    ratio: Tensor, inputs: LossInputs, eps_low: float, eps_high: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return PPO's pessimistic surrogate [T], and the fractions of tokens that its two bounds cut from the gradient."""
    unclipped = -inputs.advantages * ratio
    clipped = -inputs.advantages * ratio.clamp(1 - eps_low, 1 + eps_high)
    cut = clipped > unclipped
    metrics = {
        "loss/clip_fraction_low": masked_sum_count(cut & (inputs.advantages < 0), inputs.loss_mask),
        "loss/clip_fraction_high": masked_sum_count(cut & (inputs.advantages > 0), inputs.loss_mask),
    }
    return torch.where(cut, clipped, unclipped), metrics


def _total(
    inputs: LossInputs,
    config: options.LossBase,
    surrogate: Tensor,
    metrics: dict[str, Tensor],
    ratio: Tensor,
    extra: Tensor | None = None,
) -> LossOutputs:
    """Add what all losses share to the surrogate [T], weight and sum. `inputs` are free of masked values."""
    mask = inputs.loss_mask
    metrics["loss/ratio"] = masked_sum_count(ratio, mask)
    metrics["loss/entropy"] = masked_sum_count(inputs.entropy, mask)
    metrics["loss/approx_kl"] = masked_sum_count(k3((inputs.logprobs - inputs.old_logprobs).detach()), mask)
    if config.rollout_correction is not None:
        weights, weight_metrics = rollout_weights(inputs, config.rollout_correction)
        surrogate = weights * surrogate
        metrics |= weight_metrics
    metrics["loss/policy"] = masked_sum_count(surrogate, mask)
    per_token = surrogate if extra is None else surrogate + extra
    if config.entropy_coef:
        bonus = config.entropy_coef * inputs.entropy
        per_token = per_token - bonus
        metrics["loss/entropy_bonus"] = masked_sum_count(bonus, mask)
    if config.ref_kl_coef:
        if inputs.ref_logprobs is None:
            raise ValueError(
                f"loss.ref_kl_coef={config.ref_kl_coef} needs LossInputs.ref_logprobs, got None: run the reference "
                "forward, or set loss.ref_kl_coef=0"
            )
        kl = kl_penalty(inputs.logprobs, inputs.ref_logprobs, config.ref_kl_estimator)
        per_token = per_token + config.ref_kl_coef * kl
        metrics["loss/ref_kl"] = masked_sum_count(kl, mask)
    return LossOutputs((inputs.token_weights * per_token).sum(), metrics)
