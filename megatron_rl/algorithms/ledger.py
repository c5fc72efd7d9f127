"""Who spent the entropy: a step's tokens by token id, position in the response and quantile of covariance.

Each row sums up tokens that share one of these: their number, and in nats what their own updates cost to first order
(`spent`, entropy.py: per unit of logit step, so shares matter and not the scale) and how the entropy at their states
changed over the step's updates (`realised`, on the mini-batch that the probe forwards again). Sums run over all ranks
and micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_rl.algorithms.covariance import covariance, response_tokens
from megatron_rl.algorithms.entropy import entropy_spent
from megatron_rl.types import Ranks, TokenStats, TrainBatch

TOP_TOKENS = 24  # token ids listed by name; the rest is one row
QUANTILES = (0.5, 0.8, 0.9, 0.98, 0.998)  # edges between rows of covariance: the bottom half to the top 0.2%
COLUMNS = ("count", "spent", "probed", "realised")


def ledger(batch: TrainBatch, after: Sequence[TokenStats] | None, ranks: Ranks) -> dict[str, Any]:
    """Return one step's entry, plain data, the same on every rank; empty when no token counts.

    batch: with the statistics at the start of the step, with sum_p2. after: those of the first mini-batch after the
    updates; None: nothing was probed, and `realised` is 0 over 0 tokens.
    Returns `columns`; `total` (one row of the columns); `tokens`: [token id, columns...], those with the largest
    |spent| first, ties by id, and `other_tokens`; `positions`: [first, last position, columns...] in the response,
    from 0, by powers of two; `covariance`: [upper edge, columns...] between the quantiles `quantiles` of the step's
    centred products (covariance.py), the last edge null.
    """
    mini_batches = batch.mini_batches
    labels = torch.cat([mb.cat("labels") for mb in mini_batches])
    positions = torch.cat([mb.cat("response_positions") for mb in mini_batches])
    logprobs = torch.cat([mb.cat_stats("logprobs") for mb in mini_batches])
    advantages = torch.cat([mb.cat("advantages") for mb in mini_batches])
    cov, count = covariance(logprobs, advantages, ranks)
    if count == 0:
        return {}
    values = _values(batch, after)
    edges = ranks.quantiles(cov, list(QUANTILES))
    # the quantile is an element of the float32 values, so they are compared in that precision
    quantile = torch.searchsorted(torch.tensor(edges, dtype=torch.float32, device=cov.device), cov.float())
    bucket = torch.frexp((positions + 1).double()).exponent.long() - 1  # floor(log2), exactly
    by_token, by_position, by_quantile = _sums([labels, bucket, quantile], values, ranks)
    order = sorted(by_token, key=lambda i: (-abs(by_token[i][1]), i))
    empty = [0.0] * len(COLUMNS)
    return {
        "columns": list(COLUMNS),
        "total": _add(by_quantile.values()),
        "tokens": [[i, *by_token[i]] for i in order[:TOP_TOKENS]],
        "other_tokens": _add([by_token[i] for i in order[TOP_TOKENS:]]),
        "positions": [[2**b - 1, 2 ** (b + 1) - 2, *by_position[b]] for b in sorted(by_position)],
        "quantiles": list(QUANTILES),
        "covariance": [[edge, *by_quantile.get(i, empty)] for i, edge in enumerate([*edges, None])],
    }


def _values(batch: TrainBatch, after: Sequence[TokenStats] | None) -> Tensor:
    """Return [N, COLUMNS] float64: the columns of each response token."""
    parts = []
    for mini_batch in batch.mini_batches:
        micro_batches = mini_batch.micro_batches
        spent = response_tokens(mini_batch, [entropy_spent(mb.computed_stats, mb.advantages) for mb in micro_batches])
        change, probed = torch.zeros_like(spent), 0.0
        if after is not None and mini_batch.index == 0:
            entropies = response_tokens(mini_batch, [stats.entropy for stats in after])
            change, probed = (entropies - mini_batch.cat_stats("entropy")).double(), 1.0
        ones = torch.ones_like(spent)
        parts.append(torch.stack([ones, spent, ones * probed, change], 1))
    return torch.cat(parts)


def _sums(groupings: Sequence[Tensor], values: Tensor, ranks: Ranks) -> list[dict[int, list[float]]]:
    """Return for each of the `groupings` (keys [N]) the sums of the rows of `values` [N, C] by key, over all ranks."""
    local = []
    for keys in groupings:
        unique, index = keys.unique(return_inverse=True)
        sums = torch.zeros(len(unique), values.shape[1], dtype=values.dtype, device=values.device)
        local.append((unique.tolist(), sums.index_add_(0, index, values).tolist()))
    totals: list[dict[int, list[float]]] = [{} for _ in groupings]
    for parts in ranks.gather_objects(local):
        for total, (ids, rows) in zip(totals, parts, strict=True):
            for i, row in zip(ids, rows, strict=True):
                total[i] = _add([total[i], row]) if i in total else row
    return totals


def _add(rows: Any) -> list[float]:
    return [sum(column) for column in zip(*rows, strict=True)] or [0.0] * len(COLUMNS)
