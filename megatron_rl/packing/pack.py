"""Rollouts into packed micro-batches: which rank and which forward pass gets which sequence.

Every rank knows the lengths of all rollouts and computes the same assignment (dealing.py). It changes where a token is
computed, never its `token_ids_global`, its mini-batch or its weight in the loss.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_rl.packing.dealing import Deal, check_rollouts, deal_samples, deal_step, listed, name_of
from megatron_rl.packing.layout import Layout
from megatron_rl.packing.micro_batch import Samples, micro_batch
from megatron_rl.parallel.context import local_tokens
from megatron_rl.types import MicroBatch, MiniBatch, Rollout, TrainBatch


def pack(
    rollouts: list[Rollout], advantages: Tensor, layout: Layout, *, step: int, deals: Sequence[Deal] | None = None
) -> TrainBatch:
    """Return this rank's share of one step: its data-parallel rank's micro-batches, its context-parallel part of each.

    `rollouts`: the step's full list, ordered by prompt then sample, with the tokens of this rank's at least.
    `advantages`: `[B]` float, one per rollout. `deals`: what `deal_step` says of them, where it was asked before.
    With `share_prompts` micro-batches hold predictions alone, and what the model computes is `MicroBatch.inputs`.

    Raises: ValueError as `deal_step`, or when an advantage is not finite.
    """
    deals = deal_step(rollouts, layout) if deals is None else deals
    if advantages.shape != (len(rollouts),):
        raise ValueError(
            f"advantages: got shape {tuple(advantages.shape)}, expected [{len(rollouts)}], one per rollout"
        )
    if not torch.isfinite(advantages).all():
        bad = [name_of(rollouts[i]) for i in torch.nonzero(~torch.isfinite(advantages)).flatten().tolist()]
        raise ValueError(f"advantages are not finite for {listed(bad)}; look at the rewards of these prompts")
    mini_batches = tuple(_packed(index, each, rollouts, advantages, layout) for index, each in enumerate(deals))
    return TrainBatch(step, mini_batches)


def pack_supervised(sequences: Sequence[tuple[Sequence[int], Sequence[int]]], layout: Layout) -> MiniBatch:
    """Return this rank's share of one supervised update on (prompt_ids, response_ids) pairs, the same full list on
    every rank, with equal weight for every token of a response.

    Advantages are 1 and rollout_logprobs 0, so that a loss of -advantage * logprobs is the cross entropy of the
    responses. `prompt_ids` of the micro-batches are positions in the list.

    Raises: ValueError as `pack`.
    """
    rollouts = [_as_rollout(i, prompt, response) for i, (prompt, response) in enumerate(sequences)]
    if not rollouts:
        raise ValueError("no sequences to pack: the supervised data set is empty")
    longest = max(len(rollout.token_ids) for rollout in rollouts)
    layout = dataclasses.replace(layout, share_prompts=False, aggregation="token_mean", max_tokens=longest)
    check_rollouts(rollouts, layout)
    dealt = deal_samples(range(len(rollouts)), rollouts, layout)
    return _packed(0, dealt, rollouts, torch.ones(len(rollouts)), layout)


def computed(batch: TrainBatch) -> Tensor:
    """Return int64 [4] of this rank's part: tokens computed, without padding; pairs of such a token and one that it
    attends to, itself included; positions, padding among them; response tokens that count."""
    totals = []
    for mb in batch.micro_batches:
        inputs = mb.model_inputs()
        pairs = torch.where(inputs.real, inputs.position_ids + 1, 0).sum()
        positions = torch.full_like(pairs, len(inputs.real))
        totals.append(torch.stack([inputs.real.sum(), pairs, positions, mb.loss_mask.sum()]))
    return torch.stack(totals).sum(0)


def packing_metrics(batch: TrainBatch) -> dict[str, float]:
    """Return how well this rank's share is packed.

    `packing/padding_fraction` of all positions; `packing/micro_batches` per mini-batch (mean); `packing/tokens`,
    without padding; `packing/imbalance`: longest micro-batch over its mini-batch's mean, minus 1, the worst.
    """
    positions, tokens, count, imbalance = 0, 0, 0, 0.0
    for mini_batch in batch.mini_batches:
        filled = torch.stack([mb.model_inputs().real.sum() for mb in mini_batch.micro_batches]).tolist()
        positions += sum(len(mb.model_inputs().token_ids) for mb in mini_batch.micro_batches)
        tokens += sum(filled)
        count += len(filled)
        if sum(filled):
            imbalance = max(imbalance, max(filled) * len(filled) / sum(filled) - 1.0)
    return {
        "packing/padding_fraction": 1.0 - tokens / positions,
        "packing/micro_batches": count / len(batch.mini_batches),
        "packing/tokens": float(tokens),
        "packing/imbalance": imbalance,
    }


def _packed(index: int, dealt: Deal, rollouts: list[Rollout], advantages: Tensor, layout: Layout) -> MiniBatch:
    work, bins = dealt.work, dealt.bins[layout.dp_rank]
    samples = Samples.of(sorted(i for chosen in bins for i in chosen), rollouts, advantages)
    totals = [work.load(chosen) for chosen in bins]
    longest = max(totals)
    micro_batches = []
    for chosen, total in zip(bins, totals, strict=True):
        length = layout.filled(longest if layout.equal_lengths else total)
        whole = micro_batch(chosen, samples, length, layout, work if layout.share_prompts else None)
        micro_batches.append(whole if layout.cp_size == 1 else _context_part(whole, layout))
    return MiniBatch(index, tuple(micro_batches))


def _context_part(whole: MicroBatch, layout: Layout) -> MicroBatch:
    """Return this context-parallel rank's tokens. The first rank brings the denominator of all."""
    mine = local_tokens(whole.cu_seqlens, layout.cp_rank, layout.cp_size)
    fields = {each.name: getattr(whole, each.name) for each in dataclasses.fields(whole)}
    part = {name: value[mine] for name, value in fields.items() if isinstance(value, Tensor) and name != "cu_seqlens"}
    denominator = whole.loss_denominator if layout.cp_rank == 0 else 0
    return whole.replace(**part, cu_seqlens=whole.cu_seqlens // layout.cp_size, loss_denominator=denominator)


def _as_rollout(index: int, prompt: Sequence[int], response: Sequence[int]) -> Rollout:
    length = len(prompt) + len(response)
    return Rollout(
        prompt_id=index,
        sample_index=0,
        token_ids=torch.tensor([*prompt, *response], dtype=torch.int64),
        rollout_logprobs=torch.zeros(length),
        sampled=torch.arange(length) >= len(prompt),
        finish_reason="stop",
        weight_version=0,
    )
