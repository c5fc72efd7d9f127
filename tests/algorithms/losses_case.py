"""The losses a second and a third time: token after token in Python floats, and as their authors wrote them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from megatron_rl.types import LossInputs
from tests.algorithms import methods_case

PER_TOKEN = [f.name for f in dataclasses.fields(LossInputs) if f.name not in ("cu_seqlens", "context")]
WEIGHTED = ("forking", "steer", "gaussian_cov", "clip_b", "clip_v")
LENGTHS = [6, 3, 9, 4, 7, 2]  # the last sequence is padding


def surrogate_by_hand(name: str, config: Any, x: dict[str, Any], s: float) -> tuple[float, float]:
    """Value and derivative of one token's policy-gradient term; `s` is its sequence's ratio."""
    a, lp = x["advantages"], x["logprobs"]
    if name == "entropy_advantage":
        a += min(config.alpha * x["entropy"], abs(a) / config.kappa)
    r = s if name == "gspo" else math.exp(lp - x["old_logprobs"])
    if name == "kl_cov":
        return -a * r, -a * r
    if name == "clip_cov" and x["selected"]:
        return 0.0, 0.0
    low, high = 1 - config.eps_low, 1 + config.eps_high
    if name == "cispo":
        w = min(max(r, low), high)
        return -w * a * lp, -w * a
    value, slope = -a * r, -a * r
    if a > 0 and r > high:
        value, slope = -a * high, 0.0
    if a < 0 and r < low:
        value, slope = -a * low, 0.0
    if name == "ppo_clip" and config.dual_clip is not None and a < 0 and r > config.dual_clip:
        value, slope = -a * config.dual_clip, 0.0
    return value, slope


def by_loops(name: str, config: Any, inputs: LossInputs) -> tuple[float, list[float], list[float]]:
    """The loss, and its derivatives by logprobs and entropy, token after token in Python floats."""
    total, grad, entropy_grad = 0.0, [0.0] * sum(LENGTHS), [0.0] * sum(LENGTHS)
    start = 0
    for length in LENGTHS:
        rows = [{field: getattr(inputs, field)[t].item() for field in PER_TOKEN} for t in range(start, start + length)]
        counted = [row for row in rows if row["loss_mask"]]
        logs = [row["logprobs"] - row["old_logprobs"] for row in counted]
        s = math.exp(sum(logs) / len(logs)) if logs else 1.0
        for t, x in enumerate(rows, start):
            if not x["loss_mask"]:
                continue
            if name in methods_case.HANDS:
                value, slope = methods_case.by_hand(name, config, x, counted)
            else:
                value, slope = surrogate_by_hand(name, config, x, s)
            if name in WEIGHTED:
                value, slope = x["surrogate_weights"] * value, x["surrogate_weights"] * slope
            if config.rollout_correction is not None:
                weight = min(math.exp(x["old_logprobs"] - x["rollout_logprobs"]), config.rollout_correction.cap)
                value, slope = weight * value, weight * slope
            if name == "kl_cov" and x["selected"]:
                d = x["logprobs"] - x["old_logprobs"]
                value, slope = value + config.kl_coef * abs(d), slope + config.kl_coef * math.copysign(1, d)
            d = x["logprobs"] - x["ref_logprobs"]
            kls = {"k1": (d, d), "k2": (d * d / 2, d), "k3": (math.exp(-d) - 1 + d, 1 - math.exp(-d))}
            kl, kl_slope = kls[config.ref_kl_estimator]
            value += config.ref_kl_coef * kl - config.entropy_coef * x["entropy"]
            total += x["token_weights"] * value
            grad[t] = x["token_weights"] * (slope + config.ref_kl_coef * kl_slope)
            entropy_grad[t] = -x["token_weights"] * config.entropy_coef
        start += length
    return total, grad, entropy_grad


def authors(name: str, inputs: LossInputs, logprobs: Tensor, config: Any) -> Tensor:
    """The authors' per-micro-batch losses on padded rows, token-mean, for tokens already chosen."""
    rows = torch.arange(sum(LENGTHS)).split(LENGTHS)
    index = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    filled = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    mask = (inputs.loss_mask[index] & filled).double()
    log_prob, old_log_prob, advantages = logprobs[index], inputs.old_logprobs[index], inputs.advantages[index]
    assert inputs.selected is not None
    chosen = (inputs.selected[index] & filled).nonzero()

    log_ratio = log_prob - old_log_prob
    ratio = torch.exp(log_ratio)
    unclipped = -advantages * ratio
    if name == "clip_cov":
        corr = torch.ones_like(advantages)
        corr[chosen[:, 0], chosen[:, 1]] = 0
        clipped = -advantages * torch.clamp(ratio, 1 - config.eps_low, 1 + config.eps_high)
        losses = torch.maximum(unclipped, clipped) * corr
    else:
        losses = unclipped.clone()
        with_kl = unclipped + config.kl_coef * log_ratio.abs()
        losses[chosen[:, 0], chosen[:, 1]] = with_kl[chosen[:, 0], chosen[:, 1]]
    return (losses * mask).sum() / mask.sum()
