"""Rollouts into packed micro-batches: which rank and which forward pass gets which sequence.

Every rank holds the full list of rollouts and computes the same assignment, so packing needs no communication. The
assignment changes where a token is computed, never its `token_ids_global`, its mini-batch or its weight in the loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl import device
from megatron_rl.algorithms.aggregation import token_weights
from megatron_rl.config import Config
from megatron_rl.config_checks import ConfigError
from megatron_rl.dealing import Work, deal
from megatron_rl.packing_checks import check_groups, check_rollouts, listed, named
from megatron_rl.parallel.context import local_tokens
from megatron_rl.types import MicroBatch, MiniBatch, Rollout, TrainBatch


@dataclass(frozen=True, slots=True)
class Layout:
    """What decides the shape of a rank's micro-batches."""

    budget: int  # tokens of one micro-batch, padding included
    dp_rank: int
    dp_size: int
    cp_rank: int
    cp_size: int
    pad_multiple: int
    equal_lengths: bool
    count_multiple: int
    num_micro_batches: int | None
    share_prompts: bool
    aggregation: str
    constant_length: int
    stride: int  # token_ids_global = rollout index * stride + position; at least the longest sequence

    def __post_init__(self) -> None:
        """Raises: ValueError for places and multiples that cannot be."""
        for name in ("dp", "cp"):
            rank, size = getattr(self, f"{name}_rank"), getattr(self, f"{name}_size")
            if not 0 <= rank < size:
                raise ValueError(f"{name}_rank={rank} is not in [0, {name}_size={size})")
        forced = self.num_micro_batches
        if self.pad_multiple < 1 or (forced is not None and (forced < 1 or forced % self.count_multiple)):
            raise ValueError(
                f"pad_multiple={self.pad_multiple} and num_micro_batches={forced} must be at least 1, the second a "
                f"multiple of {self.count_multiple}"
            )
        if self.pad_multiple % self.sequence_multiple:
            raise ValueError(
                f"pad_multiple={self.pad_multiple} must be a multiple of {self.sequence_multiple} tokens, two chunks "
                f"for each of {self.cp_size} context-parallel ranks"
            )
        if self.capacity == 0:
            raise ValueError(
                f"micro_batch_tokens={self.budget} is below the padding multiple {self.pad_multiple}; raise it"
            )

    @property
    def capacity(self) -> int:
        """Tokens that fit once the length is rounded up to the padding multiple."""
        return self.budget // self.pad_multiple * self.pad_multiple

    @property
    def sequence_multiple(self) -> int:
        """Each sequence is padded to a multiple of it, to be cut into two chunks for every context-parallel rank."""
        return 2 * self.cp_size if self.cp_size > 1 else 1

    def padded(self, length: int) -> int:
        """Tokens that a sequence of `length` takes up."""
        return -(-length // self.sequence_multiple) * self.sequence_multiple


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
    equal_lengths: bool = False,
    count_multiple: int = 1,
    num_micro_batches: int | None = None,
) -> TrainBatch:
    """This rank's share of one step: the micro-batches of its data-parallel rank, and its context-parallel part of
    each.

    `rollouts`: the step's full list, the same on every rank, ordered by prompt then sample. `advantages`: `[B]` float,
    one per rollout. Mini-batch j holds the j-th run of `train.prompts_per_minibatch` groups. Micro-batches stay within
    `train.micro_batch_tokens` (padding included), and every rank gets the same number of them per mini-batch, the
    smallest that longest-processing-time balancing fits. With `train.share_prompts` the samples of a group that meet in
    a micro-batch have their prompt in common (`MicroBatch.prefixes`). `pad_multiple`: micro-batch lengths, over all
    context-parallel ranks, are multiples of it (sequence and context parallelism). `equal_lengths`: one length for all
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
        equal_lengths=equal_lengths,
        count_multiple=count_multiple,
        num_micro_batches=num_micro_batches,
        share_prompts=cp_size == 1 and shares_prompts(config),
        aggregation=config.loss.aggregation,
        constant_length=config.rollout.max_response_tokens,
        stride=config.data.max_prompt_tokens + config.rollout.max_response_tokens,
    )
    check_groups(rollouts, config)
    check_rollouts(rollouts, layout, may_be_masked=config.algorithm.overlong.filter)
    if advantages.shape != (len(rollouts),):
        raise ValueError(
            f"advantages: got shape {tuple(advantages.shape)}, expected [{len(rollouts)}], one per rollout"
        )
    if not torch.isfinite(advantages).all():
        bad = [named(rollouts[i]) for i in torch.nonzero(~torch.isfinite(advantages)).flatten().tolist()]
        raise ValueError(f"advantages are not finite for {listed(bad)}; look at the rewards of these groups")
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
    check_rollouts(rollouts, layout, may_be_masked=False)
    return _pack_minibatch(index, range(len(rollouts)), rollouts, torch.ones(len(rollouts)), layout)


def shares_prompts(config: Config) -> bool:
    """Whether the samples of a group compute their prompt once (train.share_prompts), where sequences are whole.

    Exact: each sample keeps the prompt's last token, attention sees the rest through the prefix, and positions go on.
    A GPU has no such path here: it would need an attention kernel that takes a shared prefix (a block mask, or two
    calls merged by their log-sum-exp), which Transformer Engine's packed one does not. Under context parallelism the
    two chunks of a rank would have to see a prefix that other ranks hold.
    Raises: ConfigError when it is on and cannot work on this machine.
    Source: prefix grouping, arXiv 2506.05433.
    """
    if config.train.share_prompts is True and device.ON_GPU:
        raise ConfigError(
            "train.share_prompts=true: on a GPU Transformer Engine's attention has no shared prefix; set auto or false"
        )
    return config.train.share_prompts is not False and not device.ON_GPU


def computed(batch: TrainBatch) -> Tensor:
    """int64 [4], of this rank's part: tokens without padding, a shared prompt counted once; pairs of such a token and
    one that it attends to, itself included; positions, padding among them; response tokens that count."""
    totals = []
    for mini_batch in batch.minibatches():
        for mb in mini_batch.micro_batches:
            real = mb.token_ids_global >= 0
            pairs = torch.where(real, mb.position_ids + 1, 0).sum()
            totals.append(torch.stack([real.sum(), pairs, torch.full_like(pairs, len(real)), mb.loss_mask.sum()]))
    return torch.stack(totals).sum(0)


def packing_metrics(batch: TrainBatch) -> dict[str, float]:
    """How well this rank's share is packed.

    `packing/padding_fraction` of all positions; `packing/micro_batches` per mini-batch (mean); `packing/tokens`,
    without padding; `packing/imbalance`: longest micro-batch of a mini-batch over its mean, minus 1, the worst
    mini-batch.
    """
    positions, tokens, count, imbalance = 0, 0, 0, 0.0
    for mini_batch in batch.minibatches():
        filled = [int((mb.token_ids_global >= 0).sum()) for mb in mini_batch.micro_batches]
        positions += sum(len(mb.token_ids) for mb in mini_batch.micro_batches)
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
    source = _source(members, rollouts, advantages)
    groups, prefixes = _shared_prompts(source) if layout.share_prompts else ({}, {})
    work = Work({i: layout.padded(length) for i, length in source.lengths.items()}, groups, prefixes)
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
        wanted = max(1, longest if layout.equal_lengths else total)
        padded = -(-wanted // layout.pad_multiple) * layout.pad_multiple
        whole = _micro_batch(chosen, work, padded, source, layout)
        micro_batches.append(whole if layout.cp_size == 1 else _context_part(whole, layout))
    return MiniBatch(index, tuple(micro_batches))


@dataclass(frozen=True, slots=True)
class _Source:
    """A mini-batch's samples one behind the other, `[N]` tokens, from which micro-batches pick."""

    starts: dict[int, int]  # index of the sample in the step -> where it begins
    lengths: dict[int, int]
    token_ids: Tensor
    loss_mask: Tensor
    rollout_logprobs: Tensor
    response_positions: Tensor  # which token of its response, from 0; -1 before it
    advantages: Tensor
    indices: Tensor  # of the sample in the step
    prompt_ids: Tensor
    sample_indices: Tensor


def _source(members: range, rollouts: list[Rollout], advantages: Tensor) -> _Source:
    chosen = [rollouts[i] for i in members]
    sizes = [len(rollout.token_ids) for rollout in chosen]
    lengths, loss_mask = torch.tensor(sizes), torch.cat([rollout.loss_mask for rollout in chosen])
    starts, counted = lengths.cumsum(0) - lengths, loss_mask.cumsum(0)
    owners = torch.tensor([(i, rollouts[i].prompt_id, rollouts[i].sample_index) for i in members])
    return _Source(
        dict(zip(members, starts.tolist(), strict=True)),
        dict(zip(members, sizes, strict=True)),
        torch.cat([rollout.token_ids for rollout in chosen]),
        loss_mask,
        torch.cat([rollout.rollout_logprobs for rollout in chosen]),
        counted - 1 - (counted - loss_mask.long())[starts].repeat_interleave(lengths),
        advantages[members.start : members.stop].float().repeat_interleave(lengths),
        *owners.repeat_interleave(lengths, dim=0).unbind(1),
    )


def _shared_prompts(source: _Source) -> tuple[dict[int, int], dict[int, int]]:
    """sample -> group, and group -> the tokens that all its samples begin with and that predict nothing which counts:
    the prompt but its last token, whose prediction differs between the samples."""
    room = {i: length - 1 for i, length in source.lengths.items()}  # what is left for a prefix
    firsts = (source.loss_mask & (source.response_positions == 0)).nonzero()[:, 0]
    for i, at in zip(source.indices[firsts].tolist(), firsts.tolist(), strict=True):
        room[i] = at - source.starts[i] - 1
    samples: dict[int, list[int]] = {}
    for i, start in source.starts.items():
        samples.setdefault(int(source.prompt_ids[start]), []).append(i)
    groups: dict[int, int] = {}
    prefixes: dict[int, int] = {}
    for group, members in samples.items():
        starts, length = torch.tensor([source.starts[i] for i in members]), min(room[i] for i in members)
        rows = source.token_ids[starts[:, None] + torch.arange(length)]
        # responses without a counted token leave room for more than the prompt
        prefixes[group] = int((rows == rows[0]).all(0).cumprod(0).sum())
        groups.update(dict.fromkeys(members, group) if prefixes[group] else {})
    return groups, prefixes


def _sequences(chosen: list[int], work: Work, source: _Source) -> list[tuple[int, int, int, int, int]]:
    """Of a micro-batch, shared prefixes before the samples that share them: (where it begins in the source, tokens, how
    many of them predict the next one, position of the first, the sequence that is its prefix or -1)."""
    found: list[tuple[int, int, int, int, int]] = []
    shared, at = work.shared(chosen), dict[int, int]()
    for i in chosen:
        group, start, length = work.groups.get(i, -1), source.starts[i], source.lengths[i]
        skip = work.prefixes[group] if group in shared else 0
        if skip and group not in at:
            at[group] = len(found)
            found.append((start, skip, 0, 0, -1))
        found.append((start + skip, length - skip, length - skip - 1, skip, at[group] if skip else -1))
    return found


def _micro_batch(chosen: list[int], work: Work, length: int, source: _Source, layout: Layout) -> MicroBatch:
    sequences = _sequences(chosen, work, source)
    widths = [layout.padded(tokens) for _, tokens, *_ in sequences]
    if sum(widths) < length:
        sequences.append((0, 0, 0, 0, -1))  # padding
        widths.append(length - sum(widths))
    begin, tokens, predict, position, prefixes = torch.tensor(sequences).unbind(1)
    width = torch.tensor(widths)
    which = torch.arange(len(widths)).repeat_interleave(width)
    ends = width.cumsum(0)
    offset = torch.arange(length) - (ends - width)[which]
    real, predicting = offset < tokens[which], offset < predict[which]
    at = torch.where(real, begin[which] + offset, 0)
    label_at = torch.where(predicting, at + 1, 0)
    loss_mask = predicting & source.loss_mask[label_at]
    cu_seqlens = torch.cat([ends.new_zeros(1), ends]).int()
    weights, denominator = token_weights(layout.aggregation, loss_mask, cu_seqlens, layout.constant_length)
    position_ids = position[which] + offset

    def of_labels(values: Tensor) -> Tensor:
        return torch.where(loss_mask, values[label_at], 0)

    def of_tokens(values: Tensor, padding: int) -> Tensor:
        return torch.where(real, values[at], padding)

    return MicroBatch(
        token_ids=of_tokens(source.token_ids, 0),
        labels=of_labels(source.token_ids),
        position_ids=position_ids,
        response_positions=of_labels(source.response_positions),
        cu_seqlens=cu_seqlens,
        prefixes=prefixes if bool((prefixes >= 0).any()) else None,
        loss_mask=loss_mask,
        advantages=of_labels(source.advantages),
        rollout_logprobs=of_labels(source.rollout_logprobs),
        token_weights=weights,
        prompt_ids=of_tokens(source.prompt_ids, -1),
        sample_indices=of_tokens(source.sample_indices, -1),
        # position 0 is never a label, so no two coincide
        token_ids_global=torch.where(real, source.indices[at] * layout.stride + position_ids + 1, -1),
        loss_denominator=denominator,
        num_sequences=len(chosen),
    )


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
