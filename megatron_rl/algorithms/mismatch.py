"""Correction for responses that other probabilities sampled than the trainer computes: another kernel or precision, a
cut sampling distribution, or older weights.

The behaviour policy is what the engine reported per token, whichever weights made the token (`rollout_logprobs`); the
target is the trainer's own recomputation at the start of the step (`old_logprobs`). PPO's ratio of current to old
stays as it is: this factor comes on top (decoupled PPO, arXiv 2110.00641). With `algorithm.old_logprobs=rollout` the
two are the same, and that ratio alone leads from the engine to the current policy: then only `max_negative_kl` is left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_rl.algorithms.aggregation import sequence_means, sequence_sums
from megatron_rl.algorithms.kl import k3, masked_sum_count, safe_exp
from megatron_rl.types import Float, Float64, LossInputs

if TYPE_CHECKING:
    from megatron_rl.algorithms.policy_loss import RolloutCorrection


# level -> the logarithm of each token's ratio, from the log ratios of all tokens [T]
LEVELS: dict[str, Callable[[Tensor, LossInputs], Tensor]] = {
    "token": lambda log_ratio, inputs: log_ratio,
    "sequence": sequence_sums,
    "geometric": sequence_means,
}


def rollout_weights(
    inputs: LossInputs, correction: RolloutCorrection
) -> tuple[Float[Tensor, "T"], dict[str, Float64[Tensor, "2"]]]:
    """Return the surrogate's weights, detached and without unit, and metrics as (sum, count).

    With w = exp(old - rollout) per token, or per sequence as the exponential of the sum of old - rollout over its
    counted tokens (`sequence`) or of their mean (`geometric`: the geometric mean of its tokens' ratios):

    - `truncate`: min(w, cap). Source: truncated importance sampling, fengyao.notion.site/off-policy-rl.
    - `mask`: w where floor <= w <= cap, else 0. Source: IcePop, ringtech.notion.site/icepop; at the level of sequences,
      masked importance sampling, richardli.xyz/rl-collapse.
    - `reject`: 1 where floor <= w <= cap, else 0. Source: rejection sampling in verl's documentation (Mathematical
      Formulations of Rollout Correction Methods, sections 3.3.3 and 3.4), which takes the geometric mean for this
      alone, with caps of 1.0001 to 1.001.
    - `none`: 1.

    With `max_kl`, a sequence whose mean k3 estimate of KL(rollout || old) over its counted tokens is larger gets 0
    throughout. So does, with `max_negative_kl`, one of negative advantage whose mean of rollout - current over its
    counted tokens is larger: off-policy sequence masking, arXiv 2512.02556 (DeepSeek-V3.2), where the old policy is the
    engine's too. It follows the current policy, so that the mask changes from update to update.

    What gets 0 stays in the denominators, as Clip-Cov's tokens do: the loss does not grow as more is dropped. A
    sequence lies in one micro-batch, whole or with its other parts behind `inputs.context`. `inputs` must be free of
    masked values.
    """
    mask = inputs.loss_mask
    log_ratio = (inputs.old_logprobs - inputs.rollout_logprobs).detach()
    ratio = safe_exp(LEVELS[correction.level](log_ratio, inputs))
    outside = (ratio > correction.cap) | (ratio < correction.floor)
    weights = torch.ones_like(log_ratio)
    metrics: dict[str, Tensor] = {}
    if correction.weights == "truncate":
        weights = ratio.clamp_max(correction.cap)
        metrics["loss/is_truncated_fraction"] = masked_sum_count(ratio > correction.cap, mask)
    elif correction.weights in ("mask", "reject"):
        weights = torch.where(outside, 0.0, ratio if correction.weights == "mask" else weights)
        metrics["loss/is_masked_fraction"] = masked_sum_count(outside, mask)
    if correction.max_kl is not None:
        rejected = sequence_means(torch.where(mask, k3(log_ratio), 0.0), inputs) > correction.max_kl
        weights = torch.where(rejected, 0.0, weights)
        metrics["loss/is_rejected_fraction"] = masked_sum_count(rejected, mask)
    if correction.max_negative_kl is not None:
        is_far = sequence_means(inputs.rollout_logprobs - inputs.logprobs, inputs) > correction.max_negative_kl
        dropped = is_far & (inputs.advantages < 0)
        weights = torch.where(dropped, 0.0, weights)
        metrics["loss/is_dropped_negative_fraction"] = masked_sum_count(dropped, mask)
    # the effective share of the tokens is mean^2 / mean of squares
    metrics["loss/is_weight"] = masked_sum_count(weights, mask)
    metrics["loss/is_weight_squared"] = masked_sum_count(weights**2, mask)
    return weights, metrics
