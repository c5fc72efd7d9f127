"""The Entropy Mechanism's heart: the covariance of each token and the tokens that Clip-Cov and KL-Cov pick, globally.

Per response token i of one optimiser mini-batch (all ranks, all micro-batches), cov_i = (logp_i - mean logp) * (A_i -
mean A) in float64. Both methods are one primitive, a distributed top-k over a per-token priority, so the layout never
changes which tokens
are picked.
Source: arXiv 2505.22617, equations 10-13.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from megatron_rl.algorithms.entropy import entropy_loss_per_step
from megatron_rl.algorithms.hashing import hash_uniform
from megatron_rl.types import MicroBatch, MiniBatch

if TYPE_CHECKING:
    from megatron_rl.config.loss import ClipCovLoss, KlCovLoss, LossBase

TOP_FRACTIONS = {"cov/top_0.02pct_mean": 0.0002, "cov/top_0.2pct_mean": 0.002, "cov/top_2pct_mean": 0.02}
Ranked = tuple[Tensor, Tensor, int]  # values [n_local], their ids, and how many of the largest are wanted


class SupportsReduce(Protocol):
    """The global operations that selection needs; parallel/reduce.py has the real one."""

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over ranks."""
        ...

    def top_k(self, values: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest values of all ranks and their ids."""
        ...

    def top_ks_and_sum(self, sets: Sequence[Ranked], sums: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """`top_k` of each set, and the element-wise sum of `sums` over ranks, in one go."""
        ...


class LocalReducer:
    """One micro-batch by itself: what `cov_scope=microbatch`, the authors' code, sees."""

    def sum(self, values: Tensor) -> Tensor:
        """The values themselves."""
        return values

    def top_k(self, values: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """torch's own top-k, as the authors call it."""
        best = values.topk(min(k, values.numel()))
        return best.values, ids[best.indices]

    def top_ks_and_sum(self, sets: Sequence[Ranked], sums: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """All by themselves."""
        return [self.top_k(*one) for one in sets], sums


def covariance(logprobs: Tensor, advantages: Tensor, reducer: SupportsReduce) -> tuple[Tensor, int]:
    """Centered products `[n_local]` float64 (nats * advantage units) and the global token count N (0 without
    tokens)."""
    return covariances([(logprobs, advantages)], reducer)[0]


def covariances(pairs: Sequence[tuple[Tensor, Tensor]], reducer: SupportsReduce) -> list[tuple[Tensor, int]]:
    """`covariance` of several sets of tokens, each centred by itself, in one collective."""
    doubles = [(logprobs.double(), advantages.double()) for logprobs, advantages in pairs]
    sums = [torch.stack([torch.full_like(logp.sum(), logp.numel()), logp.sum(), adv.sum()]) for logp, adv in doubles]
    centred = []
    for (logp, adv), (size, logp_sum, adv_sum) in zip(doubles, reducer.sum(torch.stack(sums)), strict=True):
        count = int(size)
        centred.append(((logp - logp_sum / count) * (adv - adv_sum / count) if count else logp, count))
    return centred


def quota(select_fraction: float, count: int) -> int:
    """How many tokens are selected out of `count`: at least one, never more than there are."""
    return min(count, max(1, math.floor(select_fraction * count)))


def select_tokens(
    mini_batch: MiniBatch,
    loss: LossBase,
    reducer: SupportsReduce,
    *,
    seed: int,
    step: int,
) -> MiniBatch:
    """Mark the tokens that Clip-Cov or KL-Cov picks in this optimiser mini-batch.

    mini_batch: its `stats`, with sum_p2, are of the weights that `loss.cov_logprobs` asks for. reducer: over the ranks
    that hold different tokens.
    Returns the mini-batch with `selected`, and global metrics in `selection`; for other losses as it was.
    Identical decisions on every rank. Warns once about configurations in which a method cannot work. The collectives
    cannot hide behind the update: what they decide enters the loss of its first micro-batch.
    """
    if loss.type not in PRIORITIES:
        return mini_batch
    logprobs = mini_batch.cat_stats("logprobs")
    cov, count = covariance(logprobs, mini_batch.cat("advantages"), reducer)
    if count == 0:  # overlong filtering can mask a whole mini-batch
        nothing = [torch.zeros_like(mb.loss_mask) for mb in mini_batch.micro_batches]
        return mini_batch.replace_each("selected", nothing)
    cov_loss: ClipCovLoss | KlCovLoss = loss  # type: ignore[assignment]
    _guard(mini_batch, cov_loss, count)
    how = (cov_loss, (seed, step, mini_batch.index))
    if cov_loss.cov_scope == "minibatch":
        if cov_loss.cov_estimator == "vocab":
            cov = _spent(mini_batch)
        chosen = _choose(mini_batch, cov, count, *how, reducer)
    else:
        chosen = [_choose_within(micro_batch, *how) for micro_batch in mini_batch.micro_batches]
    mini_batch = mini_batch.replace_each("selected", chosen)
    entropy = mini_batch.cat_stats("entropy")
    return mini_batch.with_selection(_selection_metrics(mini_batch.cat("selected"), logprobs, entropy, count, reducer))


def _choose_within(micro_batch: MicroBatch, loss: ClipCovLoss | KlCovLoss, counter: tuple[int, int, int]) -> Tensor:
    """`selected [T]` bool of one micro-batch for itself: the authors' scope."""
    part, alone = MiniBatch(counter[-1], (micro_batch,)), LocalReducer()
    cov, count = covariance(part.cat_stats("logprobs"), part.cat("advantages"), alone)
    if count == 0:
        return torch.zeros_like(micro_batch.loss_mask)
    if loss.cov_estimator == "vocab":
        cov = _spent(part)
    return _choose(part, cov, count, loss, counter, alone)[0]


def _choose(
    part: MiniBatch,
    cov: Tensor,
    count: int,
    loss: ClipCovLoss | KlCovLoss,
    counter: tuple[int, int, int],
    reducer: SupportsReduce,
) -> list[Tensor]:
    """`selected [T]` bool per micro-batch: the top quota of the priority over the `count` tokens of `part` on all
    ranks, of which this one's have the covariances `cov [n_local]`."""
    ids = part.cat("token_ids_global")
    candidates, priority = PRIORITIES[loss.type](part, cov, loss, counter)
    _, winners = reducer.top_k(priority[candidates], ids[candidates], quota(loss.select_fraction, count))
    # padding and prompt positions are no candidates, so masking again drops their ids (the padding id is -1)
    return [torch.isin(mb.token_ids_global, winners) & mb.loss_mask for mb in part.micro_batches]


def kl_cov_priority(
    part: MiniBatch, cov: Tensor, loss: KlCovLoss, counter: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """(candidates, priority) `[n_local]`: every token, by its covariance (paper, equation 13)."""
    return torch.ones_like(cov, dtype=torch.bool), cov


def clip_cov_priority(
    part: MiniBatch, cov: Tensor, loss: ClipCovLoss, counter: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """(candidates, priority) `[n_local]`: tokens inside the bounds that PPO's clip has not cut, in a hashed order
    (equation 11).

    The order is a pure function of (seed, step, mini-batch, prompt_id, sample_index, position), so every layout draws
    the same subset.
    """
    clipped = response_tokens(part, [_already_clipped(micro_batch, loss) for micro_batch in part.micro_batches])
    candidates = (cov > loss.cov_low) & (cov < loss.cov_high) & ~clipped
    return candidates, hash_uniform(
        *counter, part.cat("prompt_ids"), part.cat("sample_indices"), part.cat("position_ids")
    )


PRIORITIES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"kl_cov": kl_cov_priority, "clip_cov": clip_cov_priority}


def _already_clipped(micro_batch: MicroBatch, loss: ClipCovLoss) -> Tensor:
    """Tokens `[T]` whose PPO-clip surrogate takes the clipped branch, as the authors' `clip_by_origin`."""
    if micro_batch.old_logprobs is None:
        return torch.zeros_like(micro_batch.loss_mask)
    log_ratio = torch.where(micro_batch.loss_mask, micro_batch.computed_stats.logprobs - micro_batch.old_logprobs, 0.0)
    ratio, advantages = log_ratio.exp(), micro_batch.advantages
    return -advantages * ratio.clamp(1 - loss.eps_low, 1 + loss.eps_high) > -advantages * ratio


def covariance_metrics(updates: Sequence[MiniBatch], reducer: SupportsReduce) -> dict[str, float]:
    """Return how the covariance spreads over the tokens of an update, with the statistics of its selection: its mean,
    standard deviation and the means of its largest values, and the mean of its exact counterpart over the vocabulary
    (entropy.py). Each is a mean over the updates that have tokens; empty when none has. Two collectives."""
    centred = covariances([(m.cat_stats("logprobs"), m.cat("advantages")) for m in updates], reducer)
    sums = [
        torch.stack([cov.sum(), (cov**2).sum(), _spent(update).sum()])
        for (cov, _), update in zip(centred, updates, strict=True)
    ]
    most = max(TOP_FRACTIONS.values())
    sets = [(c, m.cat("token_ids_global"), quota(most, n)) for (c, n), m in zip(centred, updates, strict=True)]
    tops, totals = reducer.top_ks_and_sum(sets, torch.stack(sums))
    rows = []
    for (top, _), total, (_, count) in zip(tops, totals, centred, strict=True):
        if count:
            mean, square, vocab_mean = (total / count).tolist()
            row = {"cov/mean": mean, "cov/std": math.sqrt(max(0.0, square - mean * mean)), "cov/vocab_mean": vocab_mean}
            row |= {name: float(top[: quota(fraction, count)].mean()) for name, fraction in TOP_FRACTIONS.items()}
            rows.append(row)
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]} if rows else {}


def _spent(mini_batch: MiniBatch) -> Tensor:
    spent = [entropy_loss_per_step(mb.computed_stats, mb.advantages) for mb in mini_batch.micro_batches]
    return response_tokens(mini_batch, spent)


def _selection_metrics(
    selected: Tensor, logprobs: Tensor, entropy: Tensor, count: int, reducer: SupportsReduce
) -> dict[str, float]:
    picked = torch.stack([selected.double().sum(), logprobs[selected].double().sum(), entropy[selected].double().sum()])
    number, logp, ent = reducer.sum(picked).tolist()
    metrics = {"select/count": number, "select/fraction": number / count}
    if number:
        metrics |= {"select/logprob_mean": logp / number, "select/entropy_mean": ent / number}
    return metrics


def _guard(mini_batch: MiniBatch, loss: ClipCovLoss | KlCovLoss, count: int) -> None:
    if loss.cov_scope == "microbatch" and any(mb.num_sequences == 1 for mb in mini_batch.micro_batches):
        _warn_once(
            "one sequence",
            "loss.cov_scope=microbatch with one sequence in a micro-batch: its tokens share one advantage, so their "
            "covariance is identically 0. Use cov_scope=minibatch, or raise train.micro_batch_tokens.",
        )
    selected = quota(loss.select_fraction, count)
    if loss.select_fraction >= 0.02 and selected > 1000:
        _warn_once(
            "percentage",
            f"loss.select_fraction={loss.select_fraction} selects {selected} of {count} tokens; it is a fraction, "
            "never a percentage: the paper's 0.2% is 0.002.",
        )


_warned: set[str] = set()


def _warn_once(fault: str, message: str) -> None:
    if fault not in _warned:
        _warned.add(fault)
        warnings.warn(message, stacklevel=2)


def response_tokens(mini_batch: MiniBatch, values: list[Tensor]) -> Tensor:
    """Response tokens `[n_local]` of per-micro-batch tensors `[T]`."""
    pairs = zip(values, mini_batch.micro_batches, strict=True)
    return torch.cat([value[micro_batch.loss_mask] for value, micro_batch in pairs])
