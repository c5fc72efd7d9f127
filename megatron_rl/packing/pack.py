"""Rollouts into packed micro-batches: which rank and which forward pass gets which sequence.

Every rank holds the full list of rollouts and computes the same assignment, so packing needs no communication. The
assignment changes where a token is computed, never its `token_ids_global`, its mini-batch or its weight in the loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_rl.packing.balance import Work, deal
from megatron_rl.packing.layout import Layout
from megatron_rl.packing.micro_batch import Samples, micro_batch
from megatron_rl.parallel.context import local_tokens
from megatron_rl.types import MicroBatch, MiniBatch, Rollout, TrainBatch


def pack(rollouts: list[Rollout], advantages: Tensor, layout: Layout, *, step: int) -> TrainBatch:
    """Return this rank's share of one step: the micro-batches of its data-parallel rank, and its context-parallel part
    of each.

    `rollouts`: the step's full list, the same on every rank, ordered by prompt then sample. `advantages`: `[B]` float,
    one per rollout. Mini-batch j holds the j-th run of `prompts_per_minibatch` prompts. Every rank gets the same number
    of micro-batches per mini-batch, the smallest that longest-processing-time balancing fits into the token budget.
    With `share_prompts` they hold predictions alone, and what the model computes for them is `MicroBatch.inputs`.

    Raises: ValueError, naming the rollouts, when the samples of a prompt are incomplete or out of order, a rollout is
    empty, has no response, exceeds the budget or the configured lengths, or an advantage is not finite.
    """
    _check_order(rollouts, layout)
    _check_rollouts(rollouts, layout)
    if advantages.shape != (len(rollouts),):
        raise ValueError(
            f"advantages: got shape {tuple(advantages.shape)}, expected [{len(rollouts)}], one per rollout"
        )
    if not torch.isfinite(advantages).all():
        bad = [_name(rollouts[i]) for i in torch.nonzero(~torch.isfinite(advantages)).flatten().tolist()]
        raise ValueError(f"advantages are not finite for {_listed(bad)}; look at the rewards of these prompts")
    size = layout.samples_per_minibatch
    mini_batches = tuple(
        _pack_minibatch(index, range(start, start + size), rollouts, advantages, layout)
        for index, start in enumerate(range(0, len(rollouts), size))
    )
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
    layout = layout.supervised(max(len(rollout.token_ids) for rollout in rollouts))
    _check_rollouts(rollouts, layout)
    return _pack_minibatch(0, range(len(rollouts)), rollouts, torch.ones(len(rollouts)), layout)


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
    without padding; `packing/imbalance`: longest micro-batch of a mini-batch over its mean, minus 1, the worst
    mini-batch.
    """
    positions, tokens, count, imbalance = 0, 0, 0, 0.0
    for mini_batch in batch.mini_batches:
        filled = [int(mb.model_inputs().real.sum()) for mb in mini_batch.micro_batches]
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


def _pack_minibatch(
    index: int, members: range, rollouts: list[Rollout], advantages: Tensor, layout: Layout
) -> MiniBatch:
    samples = Samples.of(members, rollouts, advantages)
    work = samples.work() if layout.share_prompts else Work({i: layout.padded(n) for i, n in samples.lengths.items()})
    bins = deal(work, layout.capacity, layout.dp_rank, layout.dp_size, count_multiple=layout.count_multiple)
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


def _check_order(rollouts: list[Rollout], layout: Layout) -> None:
    prompts, samples = layout.prompts_per_step, layout.samples_per_prompt
    if len(rollouts) != prompts * samples:
        raise ValueError(
            f"got {len(rollouts)} rollouts, expected {prompts * samples} "
            f"(train.prompts_per_step={prompts} * rollout.samples_per_prompt={samples})"
        )
    for start in range(0, len(rollouts), samples):
        siblings = rollouts[start : start + samples]
        order = [r.sample_index for r in siblings]
        if len({r.prompt_id for r in siblings}) > 1 or order != sorted(set(order)):
            raise ValueError(
                f"rollouts {start} to {start + samples - 1} are {_listed([_name(r) for r in siblings])}; expected "
                f"{samples} samples of one prompt with ascending sample_index: order the list by prompt, then sample"
            )


def _check_rollouts(rollouts: list[Rollout], layout: Layout) -> None:
    faults = [f"{_name(rollout)}: {fault}" for rollout in rollouts if (fault := _fault(rollout, layout))]
    if faults:
        raise ValueError("rollouts cannot be packed: " + _listed(faults))


def _fault(rollout: Rollout, layout: Layout) -> str | None:
    """Return why the rollout cannot be packed; None when it can."""
    length = len(rollout.token_ids)
    if rollout.sampled.shape != (length,) or rollout.rollout_logprobs.shape != (length,):
        return (
            f"token_ids, sampled and rollout_logprobs have {length}, {len(rollout.sampled)} and "
            f"{len(rollout.rollout_logprobs)} entries; expected equal lengths"
        )
    if length == 0:
        return "no tokens"
    if not rollout.sampled.any():
        return "the response has length 0 (sampled is False everywhere)"
    if rollout.sampled[0]:
        return "the response starts at token 0; no position predicts it, so give a prompt"
    if layout.padded(length) > layout.capacity:
        return (
            f"{layout.padded(length)} tokens exceed micro_batch_tokens={layout.micro_batch_tokens} "
            f"(of which {layout.capacity} are usable with lengths padded to a multiple of {layout.pad_multiple})"
        )
    if length > layout.max_tokens:
        return f"{length} tokens exceed max_prompt_tokens + max_response_tokens = {layout.max_tokens}"
    return None


def _name(rollout: Rollout) -> str:
    return f"(prompt_id={rollout.prompt_id}, sample_index={rollout.sample_index})"


def _listed(items: list[str], most: int = 8) -> str:
    return "; ".join(items[:most]) + (f"; and {len(items) - most} more" if len(items) > most else "")
