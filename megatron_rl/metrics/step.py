"""What a step reports about its tokens and its updates: `StepReport`."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_rl import device
from megatron_rl.algorithms.control import LossController
from megatron_rl.algorithms.covariance import covariance_metrics
from megatron_rl.algorithms.kl import masked_sum_count, mismatch_metrics
from megatron_rl.algorithms.ledger import ledger
from megatron_rl.algorithms.policy_loss import PolicyLoss
from megatron_rl.algorithms.prediction import predicted_change
from megatron_rl.config import Config
from megatron_rl.data.tokenizer import token_kind
from megatron_rl.metrics.collect import Metrics, Timers
from megatron_rl.metrics.samples import samples_for_log
from megatron_rl.metrics.write import RunLogger
from megatron_rl.packing import Layout, computed, packing_metrics
from megatron_rl.parallel.reduce import Reducer
from megatron_rl.types import CollectResult, MiniBatch, Ranks, TokenStats, TrainBatch, UpdateResult


class Policy(Protocol):
    """The policy as far as a report asks it."""

    @property
    def context(self) -> Ranks | None:
        """Return the sum over the ranks that hold the rest of this rank's sequences; None: they are whole."""

    def stats(self, mini_batch: MiniBatch) -> list[TokenStats]:
        """Return statistics of each micro-batch's tokens under the current weights. A collective."""


class Tangent(Protocol):
    """What was prepared before the updates to tell the entropy's change along their movement of the weights."""

    def changes(self) -> dict[str, float]:
        """Return it to first order, to fourth or both, as metrics in nats per token. A collective."""


class Reported(Protocol):
    """The run as far as a report asks it; run.py has the real one."""

    config: Config
    ranks: Reducer
    layout: Layout
    controller: LossController
    tokenizer: Any
    timers: Timers

    @property
    def policy(self) -> Policy:
        """Return the policy."""

    def entropy_tangent(self, mini_batch: MiniBatch, *, start: bool, way: bool) -> Tangent:
        """Return what tells this mini-batch's change of the entropy along the movement that begins now. A
        collective."""


class StepReport:
    """The metrics, the ledger and the logged samples of one step: begun before its updates, finished after them.

    Every method is a collective. A step whose old log-probabilities were not recomputed has no entry in the ledger, no
    values of tokens, and neither `mismatch/*` nor entropies of the old policy; where its loss marks no tokens, no
    covariances and changes of the entropy either.
    """

    def __init__(self, run: Reported, step: int, collected: CollectResult, batch: TrainBatch, loss: PolicyLoss) -> None:
        """`batch`: with the statistics at the start of the step; `loss`: that of the step's updates."""
        self._run, self._step, self._collected, self._batch, self._loss = run, step, collected, batch, loss
        self._metrics = Metrics(device.device())
        self._metrics.set(collected.metrics | run.controller.metrics)
        self._updates: list[MiniBatch] = []
        options, first = run.config.train, batch.mini_batches[0]
        way = bool(options.entropy_tangent_every) and step % options.entropy_tangent_every == 0
        with run.timers("probe"):
            wanted = options.entropy_tangent or way
            self._tangent = run.entropy_tangent(first, start=options.entropy_tangent, way=way) if wanted else None

    def updated(self, mini_batch: MiniBatch, result: UpdateResult) -> None:
        """Take in one update: the mini-batch with its marks and the statistics that they are from, and the result."""
        self._updates.append(mini_batch)
        self._metrics.add_means(mini_batch.selection)
        self._metrics.add(result.sums)
        self._metrics.add_means(
            {"optimizer/grad_norm": result.grad_norm, "optimizer/skipped_fraction": float(result.skipped)}
        )
        self._metrics.set({"optimizer/lr": result.learning_rate})

    def finish(self, logger: RunLogger) -> dict[str, float]:
        """Return the step's metrics, the same on every rank; its ledger and samples go to `logger`."""
        run, batch, metrics, options = self._run, self._batch, self._metrics, self._run.config.logging
        after = self._probe()
        with run.timers("metrics"):
            recomputed = has_stats(batch.mini_batches)
            if recomputed:
                add_batch_metrics(metrics, batch, run.ranks)
            if has_stats(self._updates):
                metrics.set(covariance_metrics(self._updates, run.ranks))  # as the loss saw them
                change = predicted_change(self._updates, self._loss, run.ranks, run.policy.context)
                metrics.set({"entropy/predicted_change": change})  # nats per unit of logit step
            if recomputed and options.ledger_every and self._step % options.ledger_every == 0:
                with run.timers.spans("ledger"):
                    entry = ledger(batch, after, run.ranks, partial(token_kind, run.tokenizer))
                    logger.log_ledger(self._step, entry, run.tokenizer)
            metrics.set(batch_totals(batch, self._collected, run.ranks))
            logged = self._collected.rollouts[: options.samples_per_step]
            holding = slice(-(-len(logged) // run.layout.samples_per_minibatch) if recomputed else 0)
            parts = batch.mini_batches[holding], self._updates[holding]
            samples = samples_for_log(logged, self._collected.prompts_by_id, *parts, run.tokenizer, run.ranks)
            logger.log_samples(self._step, samples)
            return metrics.reduce(run.ranks.sum, run.ranks.max)

    def _probe(self) -> list[TokenStats] | None:
        """Return the first mini-batch's statistics after the updates, where the config asks for them and those of
        before are known."""
        run, first = self._run, self._updates[0]
        with run.timers("probe"):
            after = run.policy.stats(first) if run.config.train.entropy_probe and has_stats([first]) else None
            if self._tangent is not None:
                self._metrics.set(self._tangent.changes())
        if after is not None:
            self._metrics.add(entropy_change(first, after))
        return after


def has_stats(mini_batches: Sequence[MiniBatch]) -> bool:
    """Tell whether these have the statistics of a forward pass, alike on every rank."""
    return all(micro_batch.stats is not None for each in mini_batches for micro_batch in each.micro_batches)


def add_batch_metrics(metrics: Metrics, batch: TrainBatch, ranks: Reducer) -> None:
    """Add the entropy (mean, 10% and 90% quantiles, nats) and the mismatch of the step's tokens, under the weights that
    sampled them."""
    entropies, worst = [], []
    for mini_batch in batch.mini_batches:
        entropies.append(mini_batch.cat_stats("entropy"))
        worst.append((mini_batch.cat_stats("logprobs") - mini_batch.cat("rollout_logprobs")).abs())
    for micro_batch in batch.micro_batches:  # nothing here waits for the device
        stats, mask = micro_batch.computed_stats, micro_batch.loss_mask
        metrics.add({"entropy/mean": masked_sum_count(stats.entropy, mask)})
        metrics.add(mismatch_metrics(stats.logprobs, micro_batch.rollout_logprobs, mask))
    metrics.max("mismatch/abs_max", torch.cat([*worst, worst[0].new_zeros(1)]).max())
    p10, p90 = ranks.quantiles(torch.cat(entropies), [0.1, 0.9])
    metrics.set({"entropy/p10": p10, "entropy/p90": p90})


def batch_totals(batch: TrainBatch, collected: CollectResult, ranks: Reducer) -> dict[str, float]:
    """Return the tokens of the step over all ranks, and this rank's packing and memory.

    `batch/tokens` are the positions computed: padding counts, a shared prompt once; `batch/sequence_tokens` are those
    of the samples, prompt and response each.
    """
    tokens, pairs, positions, response_tokens = ranks.sum(computed(batch)).tolist()
    return {
        "batch/tokens": float(positions),
        "batch/response_tokens": float(response_tokens),
        "batch/sequence_tokens": float(sum(rollout.lengths.total for rollout in collected.rollouts)),
        "packing/computed_tokens": float(tokens),
        "packing/attention_pairs": float(pairs),
        "memory/peak_bytes": float(device.peak_memory_bytes()),
        **packing_metrics(batch),
    }


def entropy_change(mini_batch: MiniBatch, after: list[TokenStats]) -> dict[str, Tensor]:
    """Return the realised change of the mean entropy over a step's updates, on the tokens of one mini-batch: (sum,
    count), nats."""
    change = torch.zeros(2, dtype=torch.float64, device=after[0].entropy.device)
    for micro_batch, new in zip(mini_batch.micro_batches, after, strict=True):
        change += masked_sum_count(new.entropy - micro_batch.computed_stats.entropy, micro_batch.loss_mask)
    return {"entropy/realised_change": change}
