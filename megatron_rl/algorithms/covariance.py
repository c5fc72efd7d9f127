"""The Entropy Mechanism's heart: the covariance of each token and the tokens that Clip-Cov and KL-Cov pick, globally.

Per response token i of one optimiser mini-batch (all ranks, all micro-batches), cov_i = (logp_i - mean logp) * (A_i -
mean A) in float64. Both methods are one primitive, a distributed top-k over a per-token priority, so the layout never
changes which tokens are picked.
Source: arXiv 2505.22617, equations 10-13.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_rl.algorithms.entropy import entropy_spent
from megatron_rl.types import Float, Float64, MicroBatch, MiniBatch, Ranks

# (mini-batch, covariances [N], counter) -> (candidates, values), bool and float64 [N] of this rank's response tokens
Priority = Callable[[MiniBatch, Tensor, tuple[int, int, int]], tuple[Tensor, Tensor]]
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


def select_tokens(
    mini_batch: MiniBatch,
    priority: Priority,
    fraction: float,
    options: tuple[str, str],
    ranks: Ranks,
    counter: tuple[int, int, int],
) -> MiniBatch:
    """Mark the tokens of highest priority: of all N response tokens floor(fraction * N), at least one.

    options: scope (minibatch, or microbatch as in the authors' code) and estimator (batch or vocab) of the covariance.
    ranks: those that hold different tokens. counter: seed, step and mini-batch, handed to `priority`.
    Returns the mini-batch with `selected`, and global metrics in `selection`. All ranks decide alike. The collectives
    cannot hide behind the update: what they decide enters the loss of its first micro-batch.
    """
    logprobs = mini_batch.cat_stats("logprobs")
    cov, count = covariance(logprobs, mini_batch.cat("advantages"), ranks)
    if count == 0:  # overlong filtering can mask a whole mini-batch
        nothing = [torch.zeros_like(mb.loss_mask) for mb in mini_batch.micro_batches]
        return mini_batch.replace_each("selected", nothing)
    scope, estimator = options
    if scope == "minibatch":
        if estimator == "vocab":
            cov = _spent(mini_batch)
        candidates, values = priority(mini_batch, cov, counter)
        offered = mini_batch.cat("token_ids_global")[candidates]
        _, winners = ranks.top_k(values[candidates], offered, quota(fraction, count))
        chosen = [_marked(micro_batch, winners) for micro_batch in mini_batch.micro_batches]
    else:
        parts = [MiniBatch(mini_batch.index, (micro_batch,)) for micro_batch in mini_batch.micro_batches]
        chosen = [_choose_within(part, priority, fraction, estimator, counter) for part in parts]
    mini_batch = mini_batch.replace_each("selected", chosen)
    entropy = mini_batch.cat_stats("entropy")
    return mini_batch.with_selection(_selection_metrics(mini_batch.cat("selected"), logprobs, entropy, count, ranks))


def _choose_within(
    part: MiniBatch, priority: Priority, fraction: float, estimator: str, counter: tuple[int, int, int]
) -> Tensor:
    """Return `selected` [T] of one micro-batch by itself: what scope microbatch, the authors' code, sees."""
    (micro_batch,) = part.micro_batches
    cov, count = covariance(part.cat_stats("logprobs"), part.cat("advantages"), None)
    if count == 0:
        return torch.zeros_like(micro_batch.loss_mask)
    candidates, values = priority(part, _spent(part) if estimator == "vocab" else cov, counter)
    offered = part.cat("token_ids_global")[candidates]
    # torch's own top-k, ties as they come, as the authors call it
    best = values[candidates].topk(min(quota(fraction, count), len(offered))).indices
    return _marked(micro_batch, offered[best])


def _marked(micro_batch: MicroBatch, winners: Tensor) -> Tensor:
    """Return [T], True on the tokens whose global ids won."""
    # padding and prompt positions are no candidates, so masking again drops their ids (the padding id is -1)
    return torch.isin(micro_batch.token_ids_global, winners) & micro_batch.loss_mask


def covariance_metrics(updates: Sequence[MiniBatch], ranks: Ranks) -> dict[str, float]:
    """Measure how the covariance spreads over the tokens of an update, under the statistics of its selection.

    Returns its mean, standard deviation and the means of its largest values, and the mean of its exact counterpart over
    the vocabulary (entropy.py). Each is a mean over the updates that have tokens; empty when none has. Collective.
    """
    centred = covariances([(m.cat_stats("logprobs"), m.cat("advantages")) for m in updates], ranks)
    sums = [
        torch.stack([cov.sum(), (cov**2).sum(), _spent(update).sum()])
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


def _spent(mini_batch: MiniBatch) -> Tensor:
    spent = [entropy_spent(mb.computed_stats, mb.advantages) for mb in mini_batch.micro_batches]
    return mini_batch.response_tokens(spent)


def _selection_metrics(
    selected: Tensor, logprobs: Tensor, entropy: Tensor, count: int, ranks: Ranks
) -> dict[str, float]:
    values = (torch.ones_like(logprobs), logprobs, entropy)
    picked = torch.stack([torch.where(selected, value, 0.0).double().sum() for value in values])
    number, logp, ent = ranks.sum(picked).tolist()
    metrics = {"select/count": number, "select/fraction": number / count}
    if number:
        metrics |= {"select/logprob_mean": logp / number, "select/entropy_mean": ent / number}
    return metrics
