"""How an update with a given loss will change the entropy, to first order, before it is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_rl.algorithms.entropy import entropy_spent
from megatron_rl.types import Float, LossInputs, MicroBatch, MiniBatch, Ranks, TokenStats

if TYPE_CHECKING:
    from megatron_rl.algorithms.policy_loss import PolicyLoss


def effective_advantages(
    seen: Sequence[MicroBatch], loss: PolicyLoss, context: Ranks | None = None
) -> Float[Tensor, "T"]:
    """Return the advantage with which plain policy gradient would push each token as the loss does.

    It is `-d loss / d logprob`, 0 outside `loss_mask`, of the micro-batches one behind the other.

    On-policy it is A for GRPO. Clipping, selection, weights, KL-Cov's penalty, importance weights and the reference KL
    are in it; an entropy bonus, which does not act through the sampled token, is not. The aggregation's weights count
    as 1. The current policy is that of the micro-batches' `stats`. context: the context-parallel ranks, if there are
    several.
    """
    inputs = _joined([micro_batch.loss_inputs(micro_batch.computed_stats, context) for micro_batch in seen])
    logprobs = inputs.logprobs.detach().clone().requires_grad_()
    inputs = dataclasses.replace(
        inputs, logprobs=logprobs, entropy=inputs.entropy.detach(), token_weights=inputs.loss_mask.float()
    )
    with torch.enable_grad():
        loss_sum = loss(inputs).loss_sum
        return -torch.autograd.grad(loss_sum, logprobs)[0]


def predicted_change(
    updates: Sequence[MiniBatch], loss: PolicyLoss, ranks: Ranks, context: Ranks | None = None
) -> float:
    """Return the entropy change by several updates to first order, in nats per unit of logit step.

    updates: each with the statistics of the weights at which it is made. Of each counts the mean, over its response
    tokens on all ranks, of the token's own entropy change: Theorem 1 per state (entropy.py), exact over the vocabulary,
    with `effective_advantages`. An update without tokens changes nothing.
    """
    seen = [micro_batch for update in updates for micro_batch in update.micro_batches]
    names = [field.name for field in dataclasses.fields(TokenStats)]
    stats = TokenStats(*(torch.cat([getattr(mb.computed_stats, name) for mb in seen]) for name in names))
    spent = entropy_spent(stats, effective_advantages(seen, loss, context))
    mask = torch.cat([micro_batch.loss_mask for micro_batch in seen])
    sizes = [sum(len(micro_batch.loss_mask) for micro_batch in update.micro_batches) for update in updates]
    spent = torch.where(mask, spent, 0.0)
    sums = [
        torch.stack([-a.sum(), b.double().sum()]) for a, b in zip(spent.split(sizes), mask.split(sizes), strict=True)
    ]
    totals, counts = ranks.sum(torch.stack(sums)).unbind(1)
    return float((totals / counts.clamp_min(1)).sum())


def _joined(parts: Sequence[LossInputs]) -> LossInputs:
    """Join several micro-batches into one: each loss is a sum over tokens or whole sequences."""
    ends = torch.tensor([0, *(len(part.loss_mask) for part in parts[:-1])]).cumsum(0).tolist()
    bounds = [part.cu_seqlens[start > 0 :] + start for part, start in zip(parts, ends, strict=True)]
    fields: dict[str, Any] = {"cu_seqlens": torch.cat(bounds), "context": parts[0].context}
    for field in dataclasses.fields(LossInputs):
        if field.name not in fields:
            values = [getattr(part, field.name) for part in parts]
            fields[field.name] = None if values[0] is None else torch.cat(values)
    return LossInputs(**fields)
