"""The per-token values of the few samples that a step logs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_rl.algorithms.covariance import covariances, response_tokens
from megatron_rl.parallel.reduce import Reducer
from megatron_rl.types import MiniBatch, Prompt, Rollout, TrainBatch

Key = tuple[int, int]  # prompt id, sample index


def samples_for_log(
    logged: Sequence[Rollout],
    prompts_by_id: Mapping[int, Prompt],
    batch: TrainBatch,
    updates: Sequence[MiniBatch],
    tokenizer: Any,
    ranks: Reducer,
) -> list[dict[str, Any]]:
    """Return these rollouts decoded, with the values of their tokens (`token_values`) under `tokens`. Collective."""
    if not logged:
        return []
    decode = tokenizer.decode
    keys = [(rollout.prompt_id, rollout.sample_index) for rollout in logged]
    values = token_values(batch, updates, keys, ranks)
    samples = []
    for key, rollout in zip(keys, logged, strict=True):
        prompt = prompts_by_id[rollout.prompt_id]
        sample = {
            "prompt_id": rollout.prompt_id,
            "sample_index": rollout.sample_index,
            "prompt": decode(prompt.token_ids),
            "response": decode(rollout.response_ids),
            "answer": prompt.answer,
            "score": rollout.score,
            "reward": rollout.reward,
            "finish_reason": rollout.finish_reason,
        }
        if key in values:
            sample["tokens"] = {"text": [decode([i]) for i in values[key]["token_id"]], **values[key]}
        samples.append(sample)
    return samples


def token_values(
    batch: TrainBatch, updates: Sequence[MiniBatch], wanted: Sequence[Key], ranks: Reducer
) -> dict[Key, dict[str, list[Any]]]:
    """Return, per counted response token of the `wanted` samples, in order: `token_id`; `logprob` and `entropy`, nats;
    `covariance`, the centred product of its optimiser mini-batch (nats * advantage). `selected` lists the indices of
    the tokens that the method picked.

    batch: with the statistics at the step's start, so that a later mini-batch chosen with `cov_logprobs: current` was
    chosen by newer values than these. updates: its mini-batches as they were trained on, with `selected`. ranks: over
    the ranks that hold different tokens.
    Collective; the same on every rank. A sample without counted tokens is left out.
    """
    mine: list[tuple[Key, tuple[float, ...]]] = []
    logprobs_of = [mini_batch.cat_stats("logprobs") for mini_batch in batch.mini_batches]
    advantages_of = [mini_batch.cat("advantages") for mini_batch in batch.mini_batches]
    centred = covariances(list(zip(logprobs_of, advantages_of, strict=True)), ranks)
    for mini_batch, update, logprobs, (cov, _) in zip(batch.mini_batches, updates, logprobs_of, centred, strict=True):
        columns = [mini_batch.cat(name) for name in ("position_ids", "labels")]
        columns += [logprobs, mini_batch.cat_stats("entropy"), cov, _picked(update)]
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


def _picked(update: MiniBatch) -> Tensor:
    """Return bool `[N_local]`: the response tokens that the method picked; none where it picks none."""
    picked = [torch.zeros_like(mb.loss_mask) if mb.selected is None else mb.selected for mb in update.micro_batches]
    return response_tokens(update, picked)


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
