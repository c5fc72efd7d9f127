"""Rollouts into packed micro-batches: which rank and which forward pass gets which sequence.

Every rank holds the full list of rollouts and computes the same assignment, so packing needs no communication. The
assignment changes where a token is computed, never its `token_ids_global`, its mini-batch or its weight in the loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_rl.config import Config
from megatron_rl.packing.balance import Work, deal
from megatron_rl.packing.layout import Layout, shares_prompts
from megatron_rl.packing.micro_batch import Samples, micro_batch
from megatron_rl.parallel.context import local_tokens
from megatron_rl.types import MicroBatch, MiniBatch, Rollout, TrainBatch


def pack(
    rollouts: list[Rollout],
    advantages: Tensor,
    config: Config,
    *,
    step: int,
    dp_rank: int,
    dp_size: int,
    cp_rank: int = 0,
    cp_size: int = 1,
    pad_multiple: int = 1,
    row_multiple: int = 1,
    equal_lengths: bool = False,
    count_multiple: int = 1,
    num_micro_batches: int | None = None,
) -> TrainBatch:
    """This rank's share of one step: the micro-batches of its data-parallel rank, and its context-parallel part of
    each.

    `rollouts`: the step's full list, the same on every rank, ordered by prompt then sample. `advantages`: `[B]` float,
    one per rollout. Mini-batch j holds the j-th run of `train.prompts_per_minibatch` groups. Micro-batches stay within
    `train.micro_batch_tokens` (padding included), and every rank gets the same number of them per mini-batch, the
    smallest that longest-processing-time balancing fits. With `train.share_prompts` they hold predictions alone, and
    what the model computes for them is `MicroBatch.inputs`. `pad_multiple`: micro-batch lengths, over all
    context-parallel ranks, are multiples of it (sequence and context parallelism), and of `row_multiple` times as much
    where the budget allows (`device.row_multiple`). `equal_lengths`: one length for all
    micro-batches of a mini-batch on this rank (pipeline parallelism). The count per mini-batch is a multiple of
    `count_multiple` (virtual pipeline stages), or forced by `num_micro_batches`.

    Raises: ValueError, naming the rollouts, when groups are incomplete or out of order, a rollout is empty, has no
    response, exceeds the budget or the configured lengths, or an advantage is not finite.
    """
    layout = Layout(
        budget=config.train.micro_batch_tokens,
        dp_rank=dp_rank,
        dp_size=dp_size,
        cp_rank=cp_rank,
        cp_size=cp_size,
        pad_multiple=pad_multiple,
        row_multiple=row_multiple,
        equal_lengths=equal_lengths,
        count_multiple=count_multiple,
        num_micro_batches=num_micro_batches,
        share_prompts=shares_prompts(config),
        aggregation=config.loss.aggregation,
        constant_length=config.rollout.max_response_tokens,
        stride=config.max_sequence_tokens,
    )
    _check_groups(rollouts, config)
    _check_rollouts(rollouts, layout, may_be_masked=config.algorithm.overlong.filter)
    if advantages.shape != (len(rollouts),):
        raise ValueError(
            f"advantages: got shape {tuple(advantages.shape)}, expected [{len(rollouts)}], one per rollout"
        )
    if not torch.isfinite(advantages).all():
        bad = [_name(rollouts[i]) for i in torch.nonzero(~torch.isfinite(advantages)).flatten().tolist()]
        raise ValueError(f"advantages are not finite for {_listed(bad)}; look at the rewards of these groups")
    size = config.train.prompts_per_minibatch * config.rollout.samples_per_prompt
    mini_batches = tuple(
        _pack_minibatch(index, range(start, start + size), rollouts, advantages, layout)
        for index, start in enumerate(range(0, len(rollouts), size))
    )
    return TrainBatch(step, mini_batches)


def pack_supervised(
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    micro_batch_tokens: int,
    dp_rank: int,
    dp_size: int,
    index: int = 0,
    cp_rank: int = 0,
    cp_size: int = 1,
    pad_multiple: int = 1,
    row_multiple: int = 1,
    equal_lengths: bool = False,
    count_multiple: int = 1,
    num_micro_batches: int | None = None,
) -> MiniBatch:
    """One supervised update: (prompt_ids, response_ids) pairs, the same full list on every rank, token mean.

    Advantages are 1 and rollout_logprobs 0, so that a loss of -advantage * logprobs is the cross entropy of the
    responses. `prompt_ids` are positions in the list. The other arguments are those of `pack`.

    Raises: ValueError as `pack`.
    """
    rollouts = [_as_rollout(i, prompt, response) for i, (prompt, response) in enumerate(sequences)]
    layout = Layout(
        budget=micro_batch_tokens,
        dp_rank=dp_rank,
        dp_size=dp_size,
        cp_rank=cp_rank,
        cp_size=cp_size,
        pad_multiple=pad_multiple,
        row_multiple=row_multiple,
        equal_lengths=equal_lengths,
        count_multiple=count_multiple,
        num_micro_batches=num_micro_batches,
        share_prompts=False,
        aggregation="token_mean",
        constant_length=micro_batch_tokens,
        stride=max((len(r.token_ids) for r in rollouts), default=0),
    )
    if not rollouts:
        raise ValueError("no sequences to pack: the supervised data set is empty")
    _check_rollouts(rollouts, layout, may_be_masked=False)
    return _pack_minibatch(index, range(len(rollouts)), rollouts, torch.ones(len(rollouts)), layout)


def computed(batch: TrainBatch) -> Tensor:
    """int64 [4], of this rank's part: tokens computed, without padding; pairs of such a token and one that it attends
    to, itself included; positions, padding among them; response tokens that count."""
    totals = []
    for mb in (mb for mini_batch in batch.minibatches() for mb in mini_batch.micro_batches):
        inputs = mb.model_inputs()
        pairs = torch.where(inputs.real, inputs.position_ids + 1, 0).sum()
        positions = torch.full_like(pairs, len(inputs.real))
        totals.append(torch.stack([inputs.real.sum(), pairs, positions, mb.loss_mask.sum()]))
    return torch.stack(totals).sum(0)


def packing_metrics(batch: TrainBatch) -> dict[str, float]:
    """How well this rank's share is packed.

    `packing/padding_fraction` of all positions; `packing/micro_batches` per mini-batch (mean); `packing/tokens`,
    without padding; `packing/imbalance`: longest micro-batch of a mini-batch over its mean, minus 1, the worst
    mini-batch.
    """
    positions, tokens, count, imbalance = 0, 0, 0, 0.0
    for mini_batch in batch.minibatches():
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
    bins = deal(
        work,
        layout.capacity,
        layout.dp_rank,
        layout.dp_size,
        count_multiple=layout.count_multiple,
        num_micro_batches=layout.num_micro_batches,
    )
    totals = [work.load(chosen) for chosen in bins]
    longest = max(totals)
    micro_batches = []
    for chosen, total in zip(bins, totals, strict=True):
        length = layout.filled(longest if layout.equal_lengths else total)
        whole = micro_batch(chosen, samples, length, layout, work if layout.share_prompts else None)
        micro_batches.append(whole if layout.cp_size == 1 else _context_part(whole, layout))
    return MiniBatch(index, tuple(micro_batches))


def _context_part(whole: MicroBatch, layout: Layout) -> MicroBatch:
    """This context-parallel rank's tokens. The first rank brings the denominator of all."""
    mine = local_tokens(whole.cu_seqlens, layout.cp_rank, layout.cp_size)
    fields = {field.name: getattr(whole, field.name) for field in dataclasses.fields(whole)}
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
        loss_mask=torch.arange(length) >= len(prompt),
        finish_reason="stop",
        weight_version=0,
    )


def _check_groups(rollouts: list[Rollout], config: Config) -> None:
    groups, samples = config.train.prompts_per_step, config.rollout.samples_per_prompt
    if len(rollouts) != groups * samples:
        raise ValueError(
            f"got {len(rollouts)} rollouts, expected {groups * samples} "
            f"(train.prompts_per_step={groups} * rollout.samples_per_prompt={samples})"
        )
    for start in range(0, len(rollouts), samples):
        group = rollouts[start : start + samples]
        order = [r.sample_index for r in group]
        if len({r.prompt_id for r in group}) > 1 or order != sorted(set(order)):
            raise ValueError(
                f"rollouts {start} to {start + samples - 1} are {_listed([_name(r) for r in group])}; expected "
                f"{samples} "
                "samples of one prompt with ascending sample_index: order the list by prompt, then sample"
            )


def _check_rollouts(rollouts: list[Rollout], layout: Layout, *, may_be_masked: bool) -> None:
    """`may_be_masked`: overlong filtering may have cleared the loss_mask of a response that was cut."""
    faults = []
    for rollout in rollouts:
        length = len(rollout.token_ids)
        if rollout.loss_mask.shape != (length,) or rollout.rollout_logprobs.shape != (length,):
            faults.append(
                f"{_name(rollout)}: token_ids, loss_mask and rollout_logprobs have {length}, "
                f"{len(rollout.loss_mask)} and "
                f"{len(rollout.rollout_logprobs)} entries; expected equal lengths"
            )
        elif length == 0:
            faults.append(f"{_name(rollout)}: no tokens")
        elif not rollout.loss_mask.any() and not (may_be_masked and rollout.finish_reason == "length"):
            faults.append(f"{_name(rollout)}: the response has length 0 (loss_mask is False everywhere)")
        elif rollout.loss_mask[0]:
            faults.append(
                f"{_name(rollout)}: the response starts at token 0; no position predicts it, so give a prompt"
            )
        elif layout.padded(length) > layout.capacity:
            faults.append(
                f"{_name(rollout)}: {layout.padded(length)} tokens exceed micro_batch_tokens={layout.budget} "
                f"(of which {layout.capacity} are usable with lengths padded to a multiple of {layout.pad_multiple})"
            )
        elif length > layout.stride:
            faults.append(
                f"{_name(rollout)}: {length} tokens exceed max_prompt_tokens + max_response_tokens = {layout.stride}"
            )
    if faults:
        raise ValueError("rollouts cannot be packed: " + _listed(faults))


def _name(rollout: Rollout) -> str:
    return f"(prompt_id={rollout.prompt_id}, sample_index={rollout.sample_index})"


def _listed(items: list[str], most: int = 8) -> str:
    return "; ".join(items[:most]) + (f"; and {len(items) - most} more" if len(items) > most else "")
