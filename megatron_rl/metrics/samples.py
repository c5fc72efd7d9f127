"""The per-token values of the few samples that a step logs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_rl.algorithms.covariance import covariances
from megatron_rl.types import MiniBatch, Prompt, Ranks, Rollout

Key = tuple[int, int]  # prompt id, sample index


def samples_for_log(
    logged: Sequence[Rollout],
    prompts_by_id: Mapping[int, Prompt],
    batch: Sequence[MiniBatch],
    updates: Sequence[MiniBatch],
    tokenizer: Any,
    ranks: Ranks,
) -> list[dict[str, Any]]:
    """Return these rollouts decoded, with the values of their tokens (`token_values`) under `tokens`, on the first of
    `ranks`; nothing elsewhere. Collective.

    logged: with tokens on one of `ranks` at least. batch, updates: the mini-batches that hold them, see `token_values`.
    """
    if not logged:
        return []
    decode = tokenizer.decode
    keys = [(rollout.prompt_id, rollout.sample_index) for rollout in logged]
    held = {key: rollout.response_ids for key, rollout in zip(keys, logged, strict=True) if rollout.has_tokens}
    own = held, token_values(batch, updates, keys, ranks)
    parts = ranks.exchange_objects([own, *[None] * (ranks.size - 1)])
    if parts[0] is None:
        return []
    responses = {key: response for held, _ in parts for key, response in held.items()}
    samples = []
    for key, rollout in zip(keys, logged, strict=True):
        prompt = prompts_by_id[rollout.prompt_id]
        sample = {
            "prompt_id": rollout.prompt_id,
            "sample_index": rollout.sample_index,
            "prompt": decode(prompt.token_ids),
            "response": decode(responses[key]),
            "answer": prompt.answer,
            "score": rollout.score,
            "reward": rollout.reward,
            "finish_reason": rollout.finish_reason,
        }
        if rows := [row for _, values in parts for row in values.get(key, [])]:
            columns = _columns(sorted(rows))
            sample["tokens"] = {"text": [decode([i]) for i in columns["token_id"]], **columns}
        samples.append(sample)
    return samples


def token_values(
    batch: Sequence[MiniBatch], updates: Sequence[MiniBatch], wanted: Sequence[Key], ranks: Ranks
) -> dict[Key, list[list[float]]]:
    """Return, per counted response token of the `wanted` samples that this rank computes, a row: position; token id;
    logprob and entropy, nats; the centred product of its optimiser mini-batch (nats * advantage); whether the method
    picked it. Collective.

    batch: the mini-batches that hold `wanted`, the same on every rank, with the statistics at the step's start, so that
    a later one chosen with `cov_logprobs: current` was chosen by newer values than these; none where it has none.
    updates: the same as they were trained on, with `selected`. ranks: over the ranks that hold different tokens.
    """
    rows: dict[Key, list[list[float]]] = {}
    if not batch:
        return rows
    logprobs_of = [mini_batch.cat_stats("logprobs") for mini_batch in batch]
    advantages_of = [mini_batch.cat("advantages") for mini_batch in batch]
    centred = covariances(list(zip(logprobs_of, advantages_of, strict=True)), ranks)
    for mini_batch, update, logprobs, (cov, _) in zip(batch, updates, logprobs_of, centred, strict=True):
        columns = [mini_batch.cat(name) for name in ("position_ids", "labels")]
        columns += [logprobs, mini_batch.cat_stats("entropy"), cov, _picked(update)]
        owners = torch.stack([mini_batch.cat("prompt_ids"), mini_batch.cat("sample_indices")], 1)
        keys = torch.tensor(wanted, device=owners.device)
        which, where = (keys[:, None] == owners).all(2).nonzero().unbind(1)
        values = torch.stack([column[where].double() for column in columns], 1)
        for i, row in zip(which.tolist(), values.tolist(), strict=True):
            rows.setdefault(wanted[i], []).append(row)
    return rows


def _picked(update: MiniBatch) -> Tensor:
    """Return bool `[N_local]`: the response tokens that the method picked; none where it picks none."""
    picked = [torch.zeros_like(mb.loss_mask) if mb.selected is None else mb.selected for mb in update.micro_batches]
    return update.response_tokens(picked)


def _columns(rows: Sequence[Sequence[float]]) -> dict[str, list[Any]]:
    _, token_ids, logprobs, entropy, cov, picked = zip(*rows, strict=True)
    return {
        "token_id": [int(i) for i in token_ids],
        "logprob": _rounded(logprobs),
        "entropy": _rounded(entropy),
        "covariance": _rounded(cov),
        "selected": [i for i, chosen in enumerate(picked) if chosen],
    }


def _rounded(values: Sequence[float]) -> list[float | None]:
    """Four digits; null for what JSON has no number for."""
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values]
