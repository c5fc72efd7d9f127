"""Correction for responses that other probabilities sampled than the trainer computes: another kernel or precision, a
cut sampling distribution, or older weights.

The behaviour policy is what the engine reported per token, whichever weights made the token (`rollout_logprobs`); the
target is the trainer's own recomputation at the start of the step (`old_logprobs`). PPO's ratio of current to old
stays as it is: this factor comes on top (decoupled PPO, arXiv 2110.00641).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_rl.algorithms.aggregation import sequence_sums
from megatron_rl.algorithms.kl import k3, masked_sum_count, safe_exp
from megatron_rl.types import Float, Float64, LossInputs

if TYPE_CHECKING:
    from megatron_rl.config.loss import RolloutCorrection


def rollout_weights(
    inputs: LossInputs, correction: RolloutCorrection
) -> tuple[Float[Tensor, "T"], dict[str, Float64[Tensor, "2"]]]:
    """Return the surrogate's weights, detached and without unit, and metrics as (sum, count).

    With w = exp(old - rollout), per token, or per sequence as the exponential of the sum over its counted tokens:

    - `truncate`: min(w, cap). Source: truncated importance sampling, fengyao.notion.site/off-policy-rl.
    - `mask`: w where floor <= w <= cap, else 0. Source: IcePop, ringtech.notion.site/icepop; at the level of sequences,
      masked importance sampling, richardli.xyz/rl-collapse.
    - `none`: 1.

    With `max_kl`, a sequence whose mean k3 estimate of KL(rollout || old) over its counted tokens is larger gets 0
    throughout. What gets 0 stays in the denominators, as Clip-Cov's tokens do: the loss does not grow as more is
    dropped. A sequence lies in one micro-batch, whole or with its other parts behind `inputs.context`. `inputs` must be
    free of masked values.
    """
    mask = inputs.loss_mask
    log_ratio = (inputs.old_logprobs - inputs.rollout_logprobs).detach()
    log_ratio_used = sequence_sums(log_ratio, inputs) if correction.level == "sequence" else log_ratio
    ratio = torch.ones_like(log_ratio) if correction.weights == "none" else safe_exp(log_ratio_used)
    metrics: dict[str, Tensor] = {}
    if correction.weights == "truncate":
        weights = ratio.clamp_max(correction.cap)
        metrics["loss/is_truncated_fraction"] = masked_sum_count(ratio > correction.cap, mask)
    elif correction.weights == "mask":
        outside = (ratio > correction.cap) | (ratio < correction.floor)
        weights = torch.where(outside, 0.0, ratio)
        metrics["loss/is_masked_fraction"] = masked_sum_count(outside, mask)
    else:
        weights = ratio
    if correction.max_kl is not None:
        counts = sequence_sums(mask.to(log_ratio.dtype), inputs).clamp_min(1)
        kl = sequence_sums(torch.where(mask, k3(log_ratio), 0.0), inputs) / counts
        rejected = kl > correction.max_kl
        weights = torch.where(rejected, 0.0, weights)
        metrics["loss/is_rejected_fraction"] = masked_sum_count(rejected, mask)
    # the effective share of the tokens is mean^2 / mean of squares
    metrics["loss/is_weight"] = masked_sum_count(weights, mask)
    metrics["loss/is_weight_squared"] = masked_sum_count(weights**2, mask)
    return weights, metrics
