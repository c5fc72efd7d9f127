"""Divergences between policies from the log-probabilities of sampled tokens, all in nats and all without a host sync.

Exponents are bounded at 20 nats, as in verl: exp(20) = 4.9e8 stays finite in float32, a ratio that far out carries no
information, and its gradient is 0 beyond the bound.
"""

import torch
from torch import Tensor

from megatron_rl.types import Bool, Float, Float64, Shaped

LOG_RATIO_LIMIT = 20.0  # nats


def safe_exp(log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return `exp` of a log ratio clamped to +-20 nats, never inf. NaN stays NaN: a fault upstream must show."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def kl_penalty(logprobs: Float[Tensor, "T"], ref_logprobs: Float[Tensor, "T"], kind: str) -> Float[Tensor, "T"]:
    """Return an estimate of KL(pi || ref) on tokens sampled from pi, in nats, differentiable in `logprobs`.

    With `d = logprobs - ref_logprobs`:

    | kind | value            | derivative | it follows                                                        |
    |------|------------------|------------|-------------------------------------------------------------------|
    | k1   | d                | d          | the gradient of KL(pi || ref), as a KL in the reward would        |
    | k2   | d^2 / 2          | d          | the gradient of KL(pi || ref)                                     |
    | k3   | e^-d - 1 + d     | 1 - e^-d   | the gradient of KL(ref || pi); near d = 0 the same (GRPO's choice) |

    k1's own derivative is 1, whose expectation under pi is zero: as a loss it would restrain nothing. It therefore has
    the derivative of k2; k2 and k3 have their own, and k3 is bounded.

    Raises: ValueError on an unknown kind.
    Source: joschu.net/blog/kl-approx.html (values); arXiv 2510.01555 (gradients).
    """
    difference = logprobs - ref_logprobs
    k2 = difference**2 / 2
    if kind == "k1":
        return k2 - k2.detach() + difference.detach()
    if kind == "k2":
        return k2
    if kind == "k3":
        return k3(-difference)
    raise ValueError(f"KL estimator {kind!r} is unknown; expected k1, k2 or k3")


def k3(log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return `r - 1 - log r >= 0` for `log r = log p - log q` on tokens sampled from q: it estimates KL(q || p), nats.

    Constant above +20 nats, where its derivative would exceed 4.9e8; below, the derivative tends to -1. expm1 keeps the
    small values that matter: at log r = 1e-4 (value 5e-9) `exp - 1` in float32 is noise.
    """
    bounded = log_ratio.clamp_max(LOG_RATIO_LIMIT)
    return bounded.expm1() - bounded


def mismatch_metrics(
    old_logprobs: Float[Tensor, "T"], rollout_logprobs: Float[Tensor, "T"], loss_mask: Bool[Tensor, "T"]
) -> dict[str, Float64[Tensor, "2"]]:
    """Measure how far the engine's log-probabilities are from the trainer's on the counted tokens: an engine's error
    when both have the same weights, else also the distance between two policies.

    Returns (sum, count) of each, nats: `mismatch/abs_mean`, and two estimates of KL(rollout || old), `mismatch/kl` (k3,
    never negative) and `mismatch/kl_k1` (of larger variance). Masked positions may hold anything.
    """
    difference = torch.where(loss_mask, old_logprobs - rollout_logprobs, 0.0).detach()
    return {
        "mismatch/abs_mean": masked_sum_count(difference.abs(), loss_mask),
        "mismatch/kl": masked_sum_count(k3(difference), loss_mask),
        "mismatch/kl_k1": masked_sum_count(-difference, loss_mask),
    }


def masked_sum_count(values: Shaped[Tensor, "T"], mask: Bool[Tensor, "T"]) -> Float64[Tensor, "2"]:
    """Return the sum of `values` over `mask`, and how many there are; detached."""
    return torch.stack([torch.where(mask, values.detach(), 0.0).double().sum(), mask.double().sum()])
