"""How an update with a given loss will change the entropy, to first order, before it is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_rl.algorithms.covariance import SupportsReduce
from megatron_rl.algorithms.entropy import entropy_loss_per_step
from megatron_rl.algorithms.losses import LOSSES, loss_inputs
from megatron_rl.types import MicroBatch, MiniBatch, SupportsSum, TokenStats

if TYPE_CHECKING:
    from megatron_rl.config_loss import LossBase


def effective_advantages(
    micro_batch: MicroBatch, stats: TokenStats, loss: LossBase, context: SupportsSum | None = None
) -> Tensor:
    """The advantage with which plain policy gradient would push each token as the loss does: `-d loss / d logprob`,
    `[T]` float32, 0 outside `loss_mask`.

    On-policy it is A for GRPO. Clipping, selection, weights, KL-Cov's penalty, importance weights and the reference KL
    are in it; an entropy bonus, which does not act through the sampled token, is not. The aggregation's weights count
    as 1. `stats`: of the weights at which the update is made; `context`: see `loss_inputs`.
    """
    logprobs = stats.logprobs.detach().clone().requires_grad_()
    inputs = loss_inputs(micro_batch, TokenStats(logprobs, stats.entropy.detach()), context)
    inputs = dataclasses.replace(inputs, token_weights=micro_batch.loss_mask.float())
    with torch.enable_grad():
        loss_sum = LOSSES[loss.type](inputs, loss).loss_sum  # type: ignore[attr-defined]
        return -torch.autograd.grad(loss_sum, logprobs)[0]


def predicted_change(
    updates: Sequence[tuple[MiniBatch, list[TokenStats]]],
    loss: LossBase,
    reducer: SupportsReduce,
    context: SupportsSum | None = None,
) -> float:
    """Of the entropy by several updates, each with the statistics of the weights at which it is made, in nats per unit
    of logit step: the sum of the mean over each update's response tokens, of all ranks, of the token's own entropy
    change. That is Theorem 1 per state (entropy.py), exact over the vocabulary, with `effective_advantages`. An update
    without tokens changes nothing."""
    rows = []
    for mini_batch, stats in updates:
        sums = torch.zeros(2, dtype=torch.float64, device=stats[0].entropy.device)
        for micro_batch, stat in zip(mini_batch.micro_batches, stats, strict=True):
            lost = entropy_loss_per_step(stat, effective_advantages(micro_batch, stat, loss, context))
            lost = lost[micro_batch.loss_mask]
            sums += torch.stack([-lost.sum(), torch.full_like(lost.sum(), lost.numel())])
        rows.append(sums)
    totals, counts = reducer.sum(torch.stack(rows)).unbind(1)
    return float((totals / counts.clamp_min(1)).sum())
