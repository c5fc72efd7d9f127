"""What a step reports about its tokens: entropy, its predicted and realised change, and the train-against-rollout
mismatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_rl.algorithms.covariance import covariance_metrics
from megatron_rl.algorithms.kl import masked_sum_count, mismatch_metrics
from megatron_rl.algorithms.prediction import predicted_change
from megatron_rl.config.loss import LossBase
from megatron_rl.metrics import Metrics
from megatron_rl.metrics.samples import token_values
from megatron_rl.parallel.reduce import Reducer
from megatron_rl.types import CollectResult, MiniBatch, Ranks, TokenStats, TrainBatch


def needs_current_stats(loss: LossBase, index: int) -> bool:
    """Whether selection in mini-batch `index` pays a forward: the first of a step has the weights of old_logprobs."""
    return index > 0 and "current" in (getattr(loss, "cov_logprobs", "old"), getattr(loss, "stats", "old"))


def add_batch_metrics(
    metrics: Metrics, batch: TrainBatch, stats: list[list[TokenStats]], data_parallel: Reducer
) -> None:
    """Entropy (mean, 10% and 90% quantiles, nats) and mismatch of the step's tokens, under the weights that sampled
    them."""
    entropies: list[Tensor] = []
    worst = 0.0
    for mini_batch, of_mini_batch in zip(batch.minibatches(), stats, strict=True):
        for micro_batch, stat in zip(mini_batch.micro_batches, of_mini_batch, strict=True):
            mask = micro_batch.loss_mask
            entropies.append(stat.entropy[mask])
            metrics.add({"entropy/mean": masked_sum_count(stat.entropy, mask)})
            metrics.add(mismatch_metrics(stat.logprobs, micro_batch.rollout_logprobs, mask))
            if mask.any():
                worst = max(worst, float((stat.logprobs - micro_batch.rollout_logprobs)[mask].abs().max()))
    metrics.max("mismatch/abs_max", worst)
    p10, p90 = data_parallel.quantiles(torch.cat(entropies), [0.1, 0.9])
    metrics.set({"entropy/p10": p10, "entropy/p90": p90})


def mean_entropy(batch: TrainBatch, stats: list[list[TokenStats]], data_parallel: Reducer) -> float:
    """Of the step's response tokens over all ranks, nats; NaN when none counts."""
    total = torch.zeros(2, dtype=torch.float64, device=stats[0][0].entropy.device)
    for mini_batch, of_mini_batch in zip(batch.minibatches(), stats, strict=True):
        for micro_batch, stat in zip(mini_batch.micro_batches, of_mini_batch, strict=True):
            total += masked_sum_count(stat.entropy, micro_batch.loss_mask)
    entropy, count = data_parallel.sum(total).tolist()
    return entropy / count if count else float("nan")


def update_metrics(
    updates: Sequence[tuple[MiniBatch, list[TokenStats]]],
    loss: LossBase,
    data_parallel: Reducer,
    context: Ranks | None,
) -> dict[str, float]:
    """Of a step's updates as the loss saw them, with the statistics of their selection: the spread of the covariance,
    and `entropy/predicted_change`, nats per unit of logit step."""
    change = predicted_change(updates, loss, data_parallel, context)
    return covariance_metrics(updates, data_parallel) | {"entropy/predicted_change": change}


def entropy_change(mini_batch: MiniBatch, before: list[TokenStats], after: list[TokenStats]) -> dict[str, Tensor]:
    """Realised change of the mean entropy over a step's updates, on the tokens of one mini-batch: (sum, count),
    nats."""
    change = torch.zeros(2, dtype=torch.float64, device=before[0].entropy.device)
    for micro_batch, old, new in zip(mini_batch.micro_batches, before, after, strict=True):
        change += masked_sum_count(new.entropy - old.entropy, micro_batch.loss_mask)
    return {"entropy/realised_change": change}


def samples_for_log(
    run: Any, collected: CollectResult, mini_batches: Sequence[MiniBatch], stats: list[list[TokenStats]]
) -> list[dict[str, Any]]:
    """The first logging.samples_per_step rollouts, decoded, with the values of their tokens (samples.py) under
    `tokens`. Collective; `run` is train.py's."""
    logged = collected.rollouts[: run.config.logging.samples_per_step]
    if not logged:
        return []
    decode = run.tokenizer.decode
    keys = [(rollout.prompt_id, rollout.sample_index) for rollout in logged]
    values = token_values(mini_batches, stats, keys, run.data_parallel)
    samples = []
    for key, rollout in zip(keys, logged, strict=True):
        prompt = collected.prompts_by_id[rollout.prompt_id]
        sample = {
            "prompt_id": rollout.prompt_id,
            "sample_index": rollout.sample_index,
            "prompt": decode(prompt.token_ids),
            "response": decode(rollout.token_ids[rollout.loss_mask | (rollout.rollout_logprobs != 0)]),
            "answer": prompt.answer,
            "score": rollout.score,
            "reward": rollout.reward,
            "finish_reason": rollout.finish_reason,
        }
        if key in values:
            sample["tokens"] = {"text": [decode([i]) for i in values[key]["token_id"]], **values[key]}
        samples.append(sample)
    return samples
