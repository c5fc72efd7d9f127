"""The Entropy Mechanism's heart: the covariance of each token, by which Clip-Cov and KL-Cov pick theirs (families.py).

Per response token i of one optimiser mini-batch (all ranks, all micro-batches), cov_i = (logp_i - mean logp) * (A_i -
mean A) in float64.
Source: arXiv 2505.22617, equations 10-13.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_rl.algorithms.entropy import entropy_spent
from megatron_rl.types import Float, Float64, MiniBatch, Ranks

TOP_FRACTIONS = {"cov/top_0.02pct_mean": 0.0002, "cov/top_0.2pct_mean": 0.002, "cov/top_2pct_mean": 0.02}


def covariance(
    logprobs: Float[Tensor, "N"], advantages: Float[Tensor, "N"], ranks: Ranks | None
) -> tuple[Float64[Tensor, "N"], int]:
    """Return the centred products (nats * advantage units) and the token count N over all `ranks` (0 without tokens).

    ranks: None takes these tokens for all there are.
    """
    return covariances([(logprobs, advantages)], ranks)[0]


def covariances(
    pairs: Sequence[tuple[Float[Tensor, "_"], Float[Tensor, "_"]]], ranks: Ranks | None
) -> list[tuple[Float64[Tensor, "_"], int]]:
    """Return `covariance` of several sets of tokens, each centred by itself, in one collective."""
    doubles = [(logprobs.double(), advantages.double()) for logprobs, advantages in pairs]
    rows = [torch.stack([torch.full_like(logp.sum(), logp.numel()), logp.sum(), adv.sum()]) for logp, adv in doubles]
    sums = torch.stack(rows) if ranks is None else ranks.sum(torch.stack(rows))
    centred = []
    for (logp, adv), (_, logp_sum, adv_sum), size in zip(doubles, sums, sums[:, 0].tolist(), strict=True):
        count = int(size)
        centred.append(((logp - logp_sum / count) * (adv - adv_sum / count) if count else logp, count))
    return centred


def quota(select_fraction: float, count: int) -> int:
    """Return how many tokens are selected out of `count`: at least one, never more than there are."""
    return min(count, max(1, math.floor(select_fraction * count)))


def covariance_metrics(updates: Sequence[MiniBatch], ranks: Ranks) -> dict[str, float]:
    """Measure how the covariance spreads over the tokens of an update, under the statistics of its selection.

    Returns its mean, standard deviation and the means of its largest values, and the mean of its exact counterpart over
    the vocabulary (entropy.py). Each is a mean over the updates that have tokens; empty when none has. Collective.
    """
    centred = covariances([(m.cat_stats("logprobs"), m.cat("advantages")) for m in updates], ranks)
    sums = [
        torch.stack([cov.sum(), (cov**2).sum(), spent(update).sum()])
        for (cov, _), update in zip(centred, updates, strict=True)
    ]
    most = max(TOP_FRACTIONS.values())
    sets = [(c, m.cat("token_ids_global"), quota(most, n)) for (c, n), m in zip(centred, updates, strict=True)]
    tops, totals = ranks.top_ks_and_sum(sets, torch.stack(sums))
    means = [
        torch.stack([*total / count, *(top[: quota(fraction, count)].mean() for fraction in TOP_FRACTIONS.values())])
        for (top, _), total, (_, count) in zip(tops, totals, centred, strict=True)
        if count
    ]
    rows = []
    for mean, square, vocab_mean, *highest in torch.stack(means).tolist() if means else []:  # one wait for the device
        row = {"cov/mean": mean, "cov/std": math.sqrt(max(0.0, square - mean * mean)), "cov/vocab_mean": vocab_mean}
        rows.append(row | dict(zip(TOP_FRACTIONS, highest, strict=True)))
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]} if rows else {}


def spent(mini_batch: MiniBatch) -> Float64[Tensor, "_"]:
    """Return the entropy that each of this rank's response tokens spends, exact over the vocabulary: entropy.py."""
    spent_by_each = [entropy_spent(mb.computed_stats, mb.advantages) for mb in mini_batch.micro_batches]
    return mini_batch.response_tokens(spent_by_each)
