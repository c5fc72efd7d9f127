"""The Entropy Mechanism's heart: the covariance of each token and the tokens that Clip-Cov and KL-Cov pick, globally.

Per response token i of one optimiser mini-batch (all ranks, all micro-batches), cov_i = (logp_i - mean logp) * (A_i -
mean A) in float64. Both methods are one primitive, a distributed top-k over a per-token priority, so the layout never
changes which tokens are picked.
Source: arXiv 2505.22617, equations 10-13.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_rl.algorithms.entropy import entropy_spent
from megatron_rl.algorithms.hashing import hash_uniform
from megatron_rl.types import Bool, Float, Float64, MicroBatch, MiniBatch, Ranks

if TYPE_CHECKING:
    from megatron_rl.config.loss import ClipCovLoss, KlCovLoss, LossBase

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


def select_tokens(mini_batch: MiniBatch, loss: LossBase, ranks: Ranks, *, seed: int, step: int) -> MiniBatch:
    """Mark the tokens that Clip-Cov or KL-Cov picks in this optimiser mini-batch.

    mini_batch: its `stats`, with sum_p2, are of the weights that `loss.cov_logprobs` asks for. ranks: those that
    hold different tokens.
    Returns the mini-batch with `selected`, and global metrics in `selection`; for other losses as it was. All ranks
    decide alike. The collectives cannot hide behind the update: what they decide enters the loss of its first
    micro-batch.
    """
    if loss.type not in PRIORITIES:
        return mini_batch
    logprobs = mini_batch.cat_stats("logprobs")
    cov, count = covariance(logprobs, mini_batch.cat("advantages"), ranks)
    if count == 0:  # overlong filtering can mask a whole mini-batch
        nothing = [torch.zeros_like(mb.loss_mask) for mb in mini_batch.micro_batches]
        return mini_batch.replace_each("selected", nothing)
    cov_loss: ClipCovLoss | KlCovLoss = loss  # type: ignore[assignment]
    counter = (seed, step, mini_batch.index)
    if cov_loss.cov_scope == "minibatch":
        if cov_loss.cov_estimator == "vocab":
            cov = _spent(mini_batch)
        candidates, priority = PRIORITIES[cov_loss.type](mini_batch, cov, cov_loss, counter)
        offered = mini_batch.cat("token_ids_global")[candidates]
        _, winners = ranks.top_k(priority[candidates], offered, quota(cov_loss.select_fraction, count))
        chosen = [_marked(micro_batch, winners) for micro_batch in mini_batch.micro_batches]
    else:
        chosen = [_choose_within(micro_batch, cov_loss, counter) for micro_batch in mini_batch.micro_batches]
    mini_batch = mini_batch.replace_each("selected", chosen)
    entropy = mini_batch.cat_stats("entropy")
    return mini_batch.with_selection(_selection_metrics(mini_batch.cat("selected"), logprobs, entropy, count, ranks))


def _choose_within(micro_batch: MicroBatch, loss: ClipCovLoss | KlCovLoss, counter: tuple[int, int, int]) -> Tensor:
    """Return `selected` [T] of one micro-batch by itself: what `cov_scope=microbatch`, the authors' code, sees."""
    part = MiniBatch(counter[-1], (micro_batch,))
    cov, count = covariance(part.cat_stats("logprobs"), part.cat("advantages"), None)
    if count == 0:
        return torch.zeros_like(micro_batch.loss_mask)
    if loss.cov_estimator == "vocab":
        cov = _spent(part)
    candidates, priority = PRIORITIES[loss.type](part, cov, loss, counter)
    offered = part.cat("token_ids_global")[candidates]
    # torch's own top-k, ties as they come, as the authors call it
    best = priority[candidates].topk(min(quota(loss.select_fraction, count), len(offered))).indices
    return _marked(micro_batch, offered[best])


def _marked(micro_batch: MicroBatch, winners: Tensor) -> Tensor:
    """Return [T], True on the tokens whose global ids won."""
    # padding and prompt positions are no candidates, so masking again drops their ids (the padding id is -1)
    return torch.isin(micro_batch.token_ids_global, winners) & micro_batch.loss_mask


def clip_cov_priority(
    part: MiniBatch, cov: Float64[Tensor, "N"], loss: ClipCovLoss, counter: tuple[int, int, int]
) -> tuple[Bool[Tensor, "N"], Float64[Tensor, "N"]]:
    """Return (candidates, priority): tokens inside the bounds that PPO's clip has not cut, in a hashed order
    (equation 11).

    The order is a pure function of (seed, step, mini-batch, prompt_id, sample_index, position), so every layout draws
    the same subset.
    """
    clipped = part.response_tokens([_already_clipped(micro_batch, loss) for micro_batch in part.micro_batches])
    candidates = (cov > loss.cov_low) & (cov < loss.cov_high) & ~clipped
    return candidates, hash_uniform(
        *counter, part.cat("prompt_ids"), part.cat("sample_indices"), part.cat("position_ids")
    )


PRIORITIES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "kl_cov": lambda part, cov, loss, counter: (torch.ones_like(cov, dtype=torch.bool), cov),  # all: equation 13
    "clip_cov": clip_cov_priority,
}


def _already_clipped(micro_batch: MicroBatch, loss: ClipCovLoss) -> Tensor:
    """Return [T], True where PPO-clip's surrogate takes the clipped branch: the authors' `clip_by_origin`."""
    if micro_batch.old_logprobs is None:
        return torch.zeros_like(micro_batch.loss_mask)
    log_ratio = torch.where(micro_batch.loss_mask, micro_batch.computed_stats.logprobs - micro_batch.old_logprobs, 0.0)
    ratio, advantages = log_ratio.exp(), micro_batch.advantages
    return -advantages * ratio.clamp(1 - loss.eps_low, 1 + loss.eps_high) > -advantages * ratio


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
