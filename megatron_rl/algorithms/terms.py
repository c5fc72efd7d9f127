"""What policy losses are made of, and the form that they share: pure functions of one packed micro-batch.

Each loss (methods/) is called with `LossInputs`, returns `LossOutputs` and forms, over the counted tokens t,

    loss_sum = sum_t token_weights[t]
               * (is_weight[t] * surrogate[t] + extra[t] - entropy_coef * H[t] + ref_kl_coef * KL[t])

- `surrogate` is the loss's policy-gradient term, with the weights that `mark` gave its tokens, if any. Only it is
  multiplied by the importance weights of `rollout_correction` (mismatch.py); the regularisers (entropy, reference KL,
  KL-Cov's penalty) are not.
- `extra` is KL-Cov's penalty; 0 elsewhere.
- The division by the global denominator happens once, outside, so that any split into micro-batches gives the same.

So a loss begins with `without_masked` and ends with `total`.

Masked positions may hold anything in any input: they are replaced before the first operation, because inf * 0 is NaN
and the gradient of exp at a huge value is inf even where the result is later discarded.

Metrics are `[2]` float64 (sum, count) over counted tokens: means per token, whatever the aggregation. Exponents are
bounded, see kl.py. Nothing here reads a tensor's value on the host.

All raise ValueError without the tensors that they need: what `mark` sets (`marked`), and with `ref_kl_coef` > 0
`ref_logprobs`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_rl.algorithms.kl import k3, kl_penalty, masked_sum_count, safe_exp
from megatron_rl.algorithms.mismatch import rollout_weights
from megatron_rl.algorithms.policy_loss import ClippedLoss, PolicyLoss
from megatron_rl.types import Float, Float64, LossInputs, LossOutputs, Shaped

LossFunction = Callable[[LossInputs], LossOutputs]  # a policy loss with its options, or `sft`


def without_masked(inputs: LossInputs) -> LossInputs:
    """Return the same inputs with 0 outside `loss_mask`: log ratio 0, advantage 0, weight 0, not selected."""
    mask = inputs.loss_mask
    changes: dict[str, Any] = {}
    for name, value in ((each.name, getattr(inputs, each.name)) for each in dataclasses.fields(inputs)):
        if isinstance(value, Tensor) and name not in ("loss_mask", "cu_seqlens"):
            changes[name] = torch.where(mask, value, torch.zeros((), dtype=value.dtype, device=value.device))
    return dataclasses.replace(inputs, **changes)


def ratio(inputs: LossInputs) -> Float[Tensor, "T"]:
    """Return each token's probability ratio pi / pi_old."""
    return safe_exp(inputs.logprobs - inputs.old_logprobs)


def marked(name: str, inputs: LossInputs, loss: PolicyLoss) -> Shaped[Tensor, "T"]:
    """Return what the loss's `mark` left in the inputs' field of this name."""
    marks: Tensor | None = getattr(inputs, name)
    if marks is None:
        raise ValueError(
            f"{loss.type} needs LossInputs.{name} [T], got None: call {type(loss).__name__}.mark on the whole "
            "mini-batch before the loss, or choose loss.type=ppo_clip"
        )
    return marks


def clipped_surrogate(
    ratio: Float[Tensor, "T"], inputs: LossInputs, loss: ClippedLoss
) -> tuple[Float[Tensor, "T"], dict[str, Float64[Tensor, "2"]]]:
    """Return PPO's pessimistic surrogate `max(-A r, -A clip(r, 1 - eps_low, 1 + eps_high))`, and as metrics the
    fractions of tokens that its two bounds cut from the gradient."""
    unclipped = -inputs.advantages * ratio
    clipped = -inputs.advantages * ratio.clamp(1 - loss.eps_low, 1 + loss.eps_high)
    cut = clipped > unclipped
    metrics = {
        "loss/clip_fraction_low": masked_sum_count(cut & (inputs.advantages < 0), inputs.loss_mask),
        "loss/clip_fraction_high": masked_sum_count(cut & (inputs.advantages > 0), inputs.loss_mask),
    }
    return torch.where(cut, clipped, unclipped), metrics


def total(
    inputs: LossInputs,
    loss: PolicyLoss,
    surrogate: Float[Tensor, "T"],
    metrics: dict[str, Float64[Tensor, "2"]],
    ratio: Float[Tensor, "T"],
    extra: Float[Tensor, "T"] | None = None,
) -> LossOutputs:
    """Add what all losses share to the surrogate, weight and sum. `inputs` are free of masked values."""
    mask = inputs.loss_mask
    metrics["loss/ratio"] = masked_sum_count(ratio, mask)
    metrics["loss/entropy"] = masked_sum_count(inputs.entropy, mask)
    metrics["loss/approx_kl"] = masked_sum_count(k3((inputs.logprobs - inputs.old_logprobs).detach()), mask)
    if loss.rollout_correction is not None:
        weights, weight_metrics = rollout_weights(inputs, loss.rollout_correction)
        surrogate = weights * surrogate
        metrics |= weight_metrics
    metrics["loss/policy"] = masked_sum_count(surrogate, mask)
    per_token = surrogate if extra is None else surrogate + extra
    if loss.entropy_coef:
        bonus = loss.entropy_coef * inputs.entropy
        per_token = per_token - bonus
        metrics["loss/entropy_bonus"] = masked_sum_count(bonus, mask)
    if loss.ref_kl_coef:
        if inputs.ref_logprobs is None:
            raise ValueError(
                f"loss.ref_kl_coef={loss.ref_kl_coef} needs LossInputs.ref_logprobs, got None: run the reference "
                "forward, or set loss.ref_kl_coef=0"
            )
        kl = kl_penalty(inputs.logprobs, inputs.ref_logprobs, loss.ref_kl_estimator)
        per_token = per_token + loss.ref_kl_coef * kl
        metrics["loss/ref_kl"] = masked_sum_count(kl, mask)
    return LossOutputs((inputs.token_weights * per_token).sum(), metrics)


def sft(inputs: LossInputs) -> LossOutputs:
    """Return the supervised negative log-likelihood `-logprobs`, for warm starts; metric `loss/nll`, nats per token.

    Reads only `logprobs`, `loss_mask` and `token_weights`.
    """
    nll = -torch.where(inputs.loss_mask, inputs.logprobs, 0.0)
    weights = torch.where(inputs.loss_mask, inputs.token_weights, 0.0)
    return LossOutputs((weights * nll).sum(), {"loss/nll": masked_sum_count(nll, inputs.loss_mask)})
