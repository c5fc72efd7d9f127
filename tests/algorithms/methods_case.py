"""The newer losses a second and a third time: a token in Python floats, and as their authors compute them, on padded
rows.

`by_hand` has no tensors; `AUTHORS` has the authors' intermediate results (masks by index, `r / sg(r)`, clamps in
another order), so that the two share nothing with the package but the meaning of the options.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Row = dict[str, Any]


def by_hand(name: str, config: Any, x: Row, counted: list[Row]) -> tuple[float, float]:
    """Value and derivative of one token's policy-gradient term; `counted`: the counted tokens of its sequence."""
    return HANDS[name](config, x, counted)


def _ppo(config: Any, a: float, r: float) -> tuple[float, float]:
    if a > 0 and r > 1 + config.eps_high:
        return -a * (1 + config.eps_high), 0.0
    if a < 0 and r < 1 - config.eps_low:
        return -a * (1 - config.eps_low), 0.0
    return -a * r, -a * r


def _dual(config: Any, a: float, pair: tuple[float, float]) -> tuple[float, float]:
    if a < 0 and config.dual_clip is not None and pair[0] > -a * config.dual_clip:
        return -a * config.dual_clip, 0.0
    return pair


def _preserved(config: Any, a: float, r: float, beta_low: float, beta_high: float) -> tuple[float, float]:
    value, slope = _ppo(config, a, r)
    if slope == 0.0 and a != 0:
        value *= beta_high if a > 0 else beta_low
        return value, value
    return value, slope


def _ratio(x: Row) -> float:
    return math.exp(x["logprobs"] - x["old_logprobs"])


def _ce_gppo(config: Any, x: Row, _: list[Row]) -> tuple[float, float]:
    a = x["advantages"]
    return _dual(config, a, _preserved(config, a, _ratio(x), config.beta_low, config.beta_high))


def _erc(config: Any, x: Row, _: list[Row]) -> tuple[float, float]:
    a, r = x["advantages"], _ratio(x)
    pair = _ppo(config, a, r) if config.base == "ppo_clip" else _preserved(config, a, r, 1, 1)
    value, slope = _dual(config, a, pair)
    moved = (x["entropy"] + 1e-8) / (x["old_entropy"] + 1e-8)
    return value, slope if 1 - config.entropy_low < moved < 1 + config.entropy_high else 0.0


def _sapo(config: Any, x: Row, _: list[Row]) -> tuple[float, float]:
    a, r = x["advantages"], _ratio(x)
    tau = config.tau_positive if a > 0 else config.tau_negative
    p = 1 / (1 + math.exp(-tau * (r - 1)))
    return -a * 4 * p / tau, -a * 4 * p * (1 - p) * r


def _gmpo(config: Any, x: Row, counted: list[Row]) -> tuple[float, float]:
    a, d = x["advantages"], x["logprobs"] - x["old_logprobs"]

    def clipped(row: Row) -> float:
        log = row["logprobs"] - row["old_logprobs"]
        return min(log, config.eps_high) if a > 0 else max(log, -config.eps_low)

    value = -a * math.exp(sum(map(clipped, counted)) / len(counted))
    return value, value if clipped(x) == d else 0.0


def _dppo(config: Any, x: Row, _: list[Row]) -> tuple[float, float]:
    a, lp, lp0 = x["advantages"], x["logprobs"], x[f"{config.anchor}_logprobs"]
    p, p0 = min(1.0, math.exp(lp)), min(1.0, math.exp(lp0))
    if config.divergence == "tv":
        cut = p - p0 > config.bound_high if a > 0 else p0 - p > config.bound_low
    else:
        kl = p0 * math.log(p0 / p) + (1 - p0) * math.log((1 - p0 + 1e-8) / (1 - p + 1e-8))
        cut = (p > p0 and kl > config.bound_high) if a > 0 else (p < p0 and kl > config.bound_low)
    weight = 0.0 if cut else min(math.exp(lp - lp0), config.max_ratio)
    return -weight * a * lp, -weight * a


def _vespo(config: Any, x: Row, counted: list[Row]) -> tuple[float, float]:
    w = math.prod(math.exp(row["logprobs"] - row[f"{config.anchor}_logprobs"]) for row in counted)
    k, decay = (
        (config.k_negative, config.lambda_negative)
        if x["advantages"] < 0
        else (config.k_positive, config.lambda_positive)
    )
    phi = w**k * math.exp(decay * (1 - w))
    return -phi * x["advantages"] * x["logprobs"], -phi * x["advantages"]


def _repo_r(config: Any, x: Row, _: list[Row]) -> tuple[float, float]:
    a, level = x["advantages"], x["logprobs"] + (x["entropy"] if config.centred else 0.0)
    shaped = max(0.0, a * (1 - config.zeta * level)) if a > 0 else min(0.0, a * (1 + config.zeta * level))
    return _ppo(config, shaped, _ratio(x))


HANDS: dict[str, Callable[[Any, Row, list[Row]], tuple[float, float]]] = {
    "ce_gppo": _ce_gppo,
    "erc": _erc,
    "sapo": _sapo,
    "gmpo": _gmpo,
    "dppo": _dppo,
    "vespo": _vespo,
    "repo_r": _repo_r,
}

# ---- as the authors compute them: [B, L] rows, losses per token (or, GMPO's, per row)


def _dual_clip(x: dict[str, Tensor], losses: Tensor, c: float) -> Tensor:
    return torch.where(x["advantages"] < 0, torch.min(losses, -x["advantages"] * c), losses)


def authors_ce_gppo(x: dict[str, Tensor], config: Any) -> Tensor:
    """`compute_gppo_loss_general_beta`: three cases by boolean index, then the dual clip."""
    ratio, a = (x["logprobs"] - x["old_logprobs"]).exp(), x["advantages"]
    low = (ratio < 1 - config.eps_low) & (a < 0)
    high = (ratio > 1 + config.eps_high) & (a > 0)
    losses = -ratio * a
    losses[low] = (-config.beta_low * (1 - config.eps_low) / ratio.detach() * ratio * a)[low]
    losses[high] = (-config.beta_high * (1 + config.eps_high) / ratio.detach() * ratio * a)[high]
    return _dual_clip(x, losses, config.dual_clip)


def authors_erc(x: dict[str, Tensor], config: Any) -> Tensor:
    """`compute_policy_loss_grpo_erc` and `..._gppo_erc`: the latter clamps to bounds that carry r's gradient."""
    ratio, a = (x["logprobs"] - x["old_logprobs"]).exp(), x["advantages"]
    low, high = (torch.full_like(ratio, bound) for bound in (1 - config.eps_low, 1 + config.eps_high))
    if config.base == "gppo":
        low, high = low / ratio.detach() * ratio, high / ratio.detach() * ratio
    losses = _dual_clip(x, torch.maximum(-a * ratio, -a * torch.clamp(ratio, low, high)), config.dual_clip)
    moved = (x["entropy"] + 1e-8) / (x["old_entropy"] + 1e-8)
    return torch.where((moved > 0.95) & (moved < 1.05), losses, losses.detach())


def authors_sapo(x: dict[str, Tensor], config: Any) -> Tensor:
    """verl's `compute_policy_loss_sapo`."""
    tau = torch.where(x["advantages"] > 0, 1.0, 1.05).double()
    return -torch.sigmoid(tau * ((x["logprobs"] - x["old_logprobs"]).exp() - 1)) * (4 / tau) * x["advantages"]


def authors_gmpo(x: dict[str, Tensor], config: Any) -> Tensor:
    """train_zero_math_gmpo.py: one sequence at a time, the signs of the log ratios turned and turned back."""
    rows = []
    for i in range(len(x["mask"])):
        mask, a = x["mask"][i], x["advantages"][i, 0]
        sign = -1 if a >= 0 else 1
        turned = sign * (x["logprobs"][i] - x["old_logprobs"][i])
        d = sign * torch.max(turned, torch.clamp(turned, -0.4, 0.4))
        rows.append(-a * (d[mask].sum() / mask.sum()).exp() if mask.any() else d.sum() * 0)
    return torch.stack(rows)


def authors_dppo(x: dict[str, Tensor], config: Any) -> Tensor:
    """`compute_policy_loss_with_mask` of Stable-RL: what is invalid by the sign of the advantage."""
    lp, rollout = x["logprobs"], x[f"{config.anchor}_logprobs"]
    p, p0 = lp.exp(), rollout.exp()
    if config.divergence == "kl":
        kl = p0 * (rollout - lp) + (1 - p0) * torch.log((1.0 - p0 + 1e-8) / (1.0 - p + 1e-8))
        invalid_up, invalid_down = (kl > config.bound_high) & (p > p0), (kl > config.bound_low) & (p < p0)
    else:
        invalid_up, invalid_down = (p - p0) > config.bound_high, (p - p0) < -config.bound_low
    valid = ~torch.where(x["advantages"] > 0, invalid_up, invalid_down)
    return -x["advantages"] * torch.exp(lp - rollout).clamp(max=config.max_ratio).detach() * valid * lp


def authors_vespo(x: dict[str, Tensor], config: Any) -> Tensor:
    """`compute_policy_loss_vespo`: a weight per row, from the advantage of its first token."""
    log_w = torch.clamp(((x["logprobs"] - x["old_logprobs"]).clamp(-20, 20) * x["mask"]).sum(-1), -20, 20)
    w, positive = log_w.detach().exp(), (x["advantages"][:, 0] >= 0).double()
    k, lam = positive * 2.0 + (1 - positive) * 3.0, positive * 3.0 + (1 - positive) * 2.0
    phi = torch.exp(lam + k * w.clamp(min=1e-8).log() - lam * w).detach()
    return -phi[:, None] * x["advantages"] * x["logprobs"]


def authors_repo_r(x: dict[str, Tensor], config: Any) -> Tensor:
    """SkyRL's README: the two signs apart, each clamped to its half, then the clipped surrogate."""
    a, logp = x["advantages"], x["logprobs"].detach()
    up, down = (a * (1 - config.zeta * logp)).clamp(min=0), (a * (1 + config.zeta * logp)).clamp(max=0)
    shaped, ratio = torch.where(a > 0, up, down), (x["logprobs"] - x["old_logprobs"]).exp()
    return torch.maximum(-shaped * ratio, -shaped * ratio.clamp(1 - config.eps_low, 1 + config.eps_high))


AUTHORS: dict[str, Callable[[dict[str, Tensor], Any], Tensor]] = {
    name.removeprefix("authors_"): function for name, function in globals().items() if name.startswith("authors_")
}
