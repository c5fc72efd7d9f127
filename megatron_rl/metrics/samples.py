"""The per-token values of the few samples that a step logs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from megatron_rl.algorithms.covariance import covariances, response_tokens
from megatron_rl.parallel.reduce import Reducer
from megatron_rl.types import MiniBatch, TokenStats

Key = tuple[int, int]  # prompt id, sample index


def token_values(
    mini_batches: Sequence[MiniBatch], stats: Sequence[Sequence[TokenStats]], wanted: Sequence[Key], ranks: Reducer
) -> dict[Key, dict[str, list[Any]]]:
    """Per counted response token of the `wanted` samples, in order: `token_id`; `logprob` and `entropy`, nats;
    `covariance`, the centred product of its optimiser mini-batch (nats * advantage). `selected` lists the indices of
    the tokens that the method picked.

    mini_batches: as the updates saw them, with `selected`. stats: at the step's start, so that a later mini-batch
    chosen with `cov_logprobs: current` was chosen by newer values than these. ranks: over the data-parallel ranks.
    Collective; the same on every rank. A sample without counted tokens is left out.
    """
    mine: list[tuple[Key, tuple[float, ...]]] = []
    both = list(zip(mini_batches, stats, strict=True))
    logprobs_of = [response_tokens(mini_batch, [s.logprobs for s in of_it]) for mini_batch, of_it in both]
    pairs = [(logprobs, m.cat("advantages")) for logprobs, m in zip(logprobs_of, mini_batches, strict=True)]
    centred = covariances(pairs, ranks)
    for (mini_batch, of_it), logprobs, (cov, _) in zip(both, logprobs_of, centred, strict=True):
        entropy = response_tokens(mini_batch, [s.entropy for s in of_it])
        columns = [mini_batch.cat(name) for name in ("position_ids", "labels")]
        picked = [torch.zeros_like(m.loss_mask) if m.selected is None else m.selected for m in mini_batch.micro_batches]
        columns += [logprobs, entropy, cov, response_tokens(mini_batch, picked)]
        prompts, samples = mini_batch.cat("prompt_ids"), mini_batch.cat("sample_indices")
        for key in wanted:
            rows = ((prompts == key[0]) & (samples == key[1])).nonzero()[:, 0]
            if len(rows):
                mine += [(key, row) for row in zip(*(column[rows].tolist() for column in columns), strict=True)]
    found: dict[Key, list[tuple[float, ...]]] = {}
    for part in ranks.gather_objects(mine):
        for key, row in part:
            found.setdefault(key, []).append(row)
    return {key: _columns(sorted(rows)) for key, rows in found.items()}


def _columns(rows: Sequence[tuple[float, ...]]) -> dict[str, list[Any]]:
    _, token_ids, logprobs, entropy, cov, picked = zip(*rows, strict=True)
    return {
        "token_id": list(token_ids),
        "logprob": _rounded(logprobs),
        "entropy": _rounded(entropy),
        "covariance": _rounded(cov),
        "selected": [i for i, chosen in enumerate(picked) if chosen],
    }


def _rounded(values: Sequence[float]) -> list[float | None]:
    """Four digits; null for what JSON has no number for."""
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values]
