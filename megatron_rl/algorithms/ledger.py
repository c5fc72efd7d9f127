"""Who spent the entropy: a step's tokens by token id, kind of token, place in the response and quantile of covariance.

Each row sums up tokens that share one of these: their number; in nats what their own updates cost to first order
(`spent`, entropy.py: per unit of logit step, so shares matter and not the scale); how the entropy at their states
changed over the step's updates (`realised`, on the mini-batch that the probe forwards again); and their centred
products (`covariance`, covariance.py). Sums run over all ranks and micro-batches.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_rl.algorithms.covariance import covariance
from megatron_rl.algorithms.entropy import entropy_spent
from megatron_rl.types import Float64, Int64, Ranks, TokenStats, TrainBatch

TOP_TOKENS = 24  # token ids listed by name; the rest is one row
QUANTILES = (0.5, 0.8, 0.9, 0.98, 0.998)  # edges between rows of covariance: the bottom half to the top 0.2%
COLUMNS = ("count", "spent", "probed", "realised", "covariance")


def ledger(
    batch: TrainBatch, after: Sequence[TokenStats] | None, ranks: Ranks, kind_of: Callable[[int], str]
) -> dict[str, Any]:
    """Return one step's entry, plain data, on the first of `ranks`; empty elsewhere and when no token counts.

    The token ids are dealt out, so that a rank sums up its share of them, and the first gets no more than their totals.

    batch: with the statistics at the start of the step, with sum_p2. after: those of the first mini-batch after the
    updates; None: nothing was probed, and `realised` is 0 over 0 tokens. kind_of: of a token id, asked on the first.
    Returns `columns`; `total` (one row of the columns); `tokens`: [token id, columns...], those with the largest
    |spent| first, ties by id, and `other_tokens`; `kinds`: [kind, columns...], by name; `positions`: [first, last
    position, columns...] in the response, from 0, by powers of two; `quarters`: [quarter, columns...] of the response,
    0 to 3, floor(4 position / length); `covariance`: [upper edge, columns...] between the quantiles `quantiles` of the
    step's centred products (covariance.py), the last edge null.
    """
    mini_batches = batch.mini_batches
    labels = torch.cat([mb.cat("labels") for mb in mini_batches])
    positions = torch.cat([mb.cat("response_positions") for mb in mini_batches])
    quarters = 4 * positions // torch.cat([mb.cat("response_lengths") for mb in mini_batches])
    logprobs = torch.cat([mb.cat_stats("logprobs") for mb in mini_batches])
    advantages = torch.cat([mb.cat("advantages") for mb in mini_batches])
    cov, count = covariance(logprobs, advantages, ranks)
    if count == 0:
        return {}
    values = torch.cat([_values(batch, after), cov[:, None]], 1)
    edges = ranks.quantiles(cov, list(QUANTILES))
    # the quantile is an element of the float32 values, so they are compared in that precision
    quantile = torch.searchsorted(torch.tensor(edges, dtype=torch.float32, device=cov.device), cov.float())
    bucket = torch.frexp((positions + 1).double()).exponent.long() - 1  # floor(log2), exactly
    sums = _sums_on_first([labels, bucket, quarters, quantile], values, ranks)
    if sums is None:
        return {}
    (token_ids, of_tokens), *others = sums
    groups = (dict(zip(keys.tolist(), rows.tolist(), strict=True)) for keys, rows in others)
    by_position, by_quarter, by_quantile = groups
    order = of_tokens[:, 1].abs().argsort(descending=True, stable=True)  # the ids ascend, so ties stay by id
    tokens = [[i, *row] for i, row in zip(token_ids[order].tolist(), of_tokens[order].tolist(), strict=True)]
    kinds: dict[str, list[list[float]]] = {}
    for token_id, *row in tokens:
        kinds.setdefault(kind_of(token_id), []).append(row)
    empty = [0.0] * len(COLUMNS)
    return {
        "columns": list(COLUMNS),
        "total": _add(by_quantile.values()),
        "tokens": tokens[:TOP_TOKENS],
        "other_tokens": _add([row[1:] for row in tokens[TOP_TOKENS:]]),
        "positions": [[2**b - 1, 2 ** (b + 1) - 2, *by_position[b]] for b in sorted(by_position)],
        "quarters": [[quarter, *by_quarter[quarter]] for quarter in sorted(by_quarter)],
        "kinds": [[kind, *_add(kinds[kind])] for kind in sorted(kinds)],
        "quantiles": list(QUANTILES),
        "covariance": [[edge, *by_quantile.get(i, empty)] for i, edge in enumerate([*edges, None])],
    }


def _values(batch: TrainBatch, after: Sequence[TokenStats] | None) -> Tensor:
    """Return [N, C] float64: all COLUMNS but the last, of each response token."""
    parts = []
    for mini_batch in batch.mini_batches:
        micro_batches = mini_batch.micro_batches
        spent = mini_batch.response_tokens([entropy_spent(mb.computed_stats, mb.advantages) for mb in micro_batches])
        change, probed = torch.zeros_like(spent), 0.0
        if after is not None and mini_batch.index == 0:
            entropies = mini_batch.response_tokens([stats.entropy for stats in after])
            change, probed = (entropies - mini_batch.cat_stats("entropy")).double(), 1.0
        ones = torch.ones_like(spent)
        parts.append(torch.stack([ones, spent, ones * probed, change], 1))
    return torch.cat(parts)


def _sums_on_first(
    groupings: Sequence[Tensor], values: Tensor, ranks: Ranks
) -> list[tuple[Int64[Tensor, "G"], Float64[Tensor, "G C"]]] | None:
    """Return for each of the `groupings` (keys [N]) its keys, ascending, and the sums of the rows of `values` [N, C]
    over all ranks, on the host; None on all ranks but the first.

    Key i is summed up by rank i modulo their number, in the order of ranks.
    """
    local = [_sums(keys, values) for keys in groupings]
    shares: list[list[Any]] = [[] for _ in range(ranks.size)]
    for keys, sums in local:
        owners = keys % ranks.size
        order, sizes = owners.argsort(stable=True), owners.bincount(minlength=ranks.size).tolist()
        for share, *part in zip(shares, keys[order].split(sizes), sums[order].split(sizes), strict=True):
            share.append(part)
    own = _merged(ranks.exchange_objects(shares))
    parts = ranks.exchange_objects([own, *[None] * (ranks.size - 1)])
    return None if parts[0] is None else _merged(parts)


def _merged(parts: Sequence[Any]) -> list[tuple[Tensor, Tensor]]:
    """Return `_sums` of each grouping over what each rank sent of it."""
    return [_sums(*map(torch.cat, zip(*of_ranks, strict=True))) for of_ranks in zip(*parts, strict=True)]


def _sums(keys: Int64[Tensor, "N"], values: Float64[Tensor, "N C"]) -> tuple[Tensor, Tensor]:
    """Return the distinct keys, ascending, and the sums of their rows, on the host."""
    unique, index = keys.unique(return_inverse=True)
    return unique.cpu(), values.new_zeros(len(unique), values.shape[1]).index_add_(0, index, values).cpu()


def _add(rows: Any) -> list[float]:
    return [sum(column) for column in zip(*rows, strict=True)] or [0.0] * len(COLUMNS)
