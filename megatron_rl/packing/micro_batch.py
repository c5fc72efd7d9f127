"""From a mini-batch's samples to the tensors of one micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_rl.algorithms.aggregation import token_weights
from megatron_rl.models.expert_routes import place_routes
from megatron_rl.packing.balance import Work
from megatron_rl.types import Inputs, MicroBatch, Rollout

if TYPE_CHECKING:
    from megatron_rl.packing.layout import Layout


@dataclass(frozen=True, slots=True)
class Samples:
    """A mini-batch's samples, known by their index in the step, and their tokens one behind the other: `[N]`."""

    starts: dict[int, int]  # sample -> where it begins
    lengths: dict[int, int]
    first_counted: dict[int, int]  # position of the first token that counts; the length where none does
    routes: dict[int, Tensor | None]  # see models/expert_routes.py
    token_ids: Tensor
    loss_mask: Tensor
    rollout_logprobs: Tensor
    response_positions: Tensor  # which token of its response, from 0; -1 before it
    advantages: Tensor
    indices: Tensor  # the sample
    prompt_ids: Tensor
    sample_indices: Tensor

    @staticmethod
    def of(members: range, rollouts: list[Rollout], advantages: Tensor) -> Samples:
        """Those with the indices `members`; `advantages` `[B]` are the step's."""
        chosen = [rollouts[i] for i in members]
        sizes = [len(rollout.token_ids) for rollout in chosen]
        lengths, loss_mask = torch.tensor(sizes), torch.cat([rollout.loss_mask for rollout in chosen])
        ends, counted = lengths.cumsum(0), loss_mask.cumsum(0)
        starts = ends - lengths
        counted_before = counted[starts] - loss_mask[starts].long()
        # no token from `starts` on has a higher count than `counted_before` until the first that counts
        first = torch.searchsorted(counted, counted_before + 1)
        owners = torch.tensor([(i, rollouts[i].prompt_id, rollouts[i].sample_index) for i in members])
        return Samples(
            dict(zip(members, starts.tolist(), strict=True)),
            dict(zip(members, sizes, strict=True)),
            dict(zip(members, (torch.minimum(first, ends) - starts).tolist(), strict=True)),
            {i: rollouts[i].routes for i in members},
            torch.cat([rollout.token_ids for rollout in chosen]),
            loss_mask,
            torch.cat([rollout.rollout_logprobs for rollout in chosen]),
            counted - 1 - counted_before.repeat_interleave(lengths),
            advantages[members.start : members.stop].float().repeat_interleave(lengths),
            *owners.repeat_interleave(lengths, dim=0).unbind(1),
        )

    def work(self) -> Work:
        """The tokens that the predictions of a response need: all before its last, of which a group shares the prompt.
        A sample without a counted token needs none."""
        needed = {i: length - 1 if self.first_counted[i] < length else 0 for i, length in self.lengths.items()}
        by_prompt: dict[int, list[int]] = {}
        for i, start in self.starts.items():
            if needed[i]:
                by_prompt.setdefault(int(self.prompt_ids[start]), []).append(i)
        groups: dict[int, int] = {}
        prefixes: dict[int, int] = {}
        for group, members in by_prompt.items():
            starts = torch.tensor([self.starts[i] for i in members])
            prompts = self.token_ids[starts[:, None] + torch.arange(min(self.first_counted[i] for i in members))]
            prefixes[group] = int((prompts == prompts[0]).all(0).cumprod(0).sum())
            groups.update(dict.fromkeys(members, group) if prefixes[group] else {})
        return Work(needed, groups, prefixes)


def micro_batch(chosen: list[int], samples: Samples, length: int, layout: Layout, work: Work | None) -> MicroBatch:
    """The `chosen` samples, in `length` tokens for the model. `work`: the samples' own, where they share prompts; then
    the micro-batch holds predictions alone, and its `inputs` are those `length` tokens."""
    if work is None:
        sequences = [(samples.starts[i], n, n - 1, 0) for i, n in ((i, samples.lengths[i]) for i in chosen)]
        widths = [layout.padded(tokens) for _, tokens, *_ in sequences]
        whole = _micro_batch(sequences, _filled(widths, length), len(chosen), samples, layout)
        starts = whole.cu_seqlens[: len(chosen)].tolist()
        return whole.replace(routes=place_routes([samples.routes[i] for i in chosen], starts, length))
    skips = {i: samples.first_counted[i] - 1 for i in chosen if work.lengths[i]}
    counts = {i: work.lengths[i] - skip for i, skip in skips.items()}
    sequences = [(samples.starts[i] + skip, counts[i], counts[i], skip) for i, skip in skips.items()]
    # one position at least, so that nothing needs to think of an empty tensor
    predictions = _micro_batch(sequences, _filled(list(counts.values()), 1), len(chosen), samples, layout)
    return predictions.replace(inputs=_inputs(counts, predictions.position_ids, samples, length, work))


def _micro_batch(
    sequences: list[tuple[int, int, int, int]], widths: list[int], num_samples: int, samples: Samples, layout: Layout
) -> MicroBatch:
    """`sequences`: (first token in `samples`, tokens, how many of them predict the next, position of the first).
    `widths`: of the sequences with their padding; one more is padding alone."""
    which, offset, cu_seqlens = _places(widths)
    begin, tokens, predict, position = torch.tensor([*sequences, (0, 0, 0, 0)]).unbind(1)
    real, predicting = offset < tokens[which], offset < predict[which]
    at = torch.where(real, begin[which] + offset, 0)
    label_at = torch.where(predicting, at + 1, 0)
    loss_mask = predicting & samples.loss_mask[label_at]
    weights, denominator = token_weights(layout.aggregation, loss_mask, cu_seqlens, layout.constant_length)
    position_ids = position[which] + offset

    def of_labels(values: Tensor) -> Tensor:
        return torch.where(loss_mask, values[label_at], 0)

    def of_tokens(values: Tensor, padding: int) -> Tensor:
        return torch.where(real, values[at], padding)

    return MicroBatch(
        token_ids=of_tokens(samples.token_ids, 0),
        labels=of_labels(samples.token_ids),
        position_ids=position_ids,
        response_positions=of_labels(samples.response_positions),
        cu_seqlens=cu_seqlens,
        loss_mask=loss_mask,
        advantages=of_labels(samples.advantages),
        rollout_logprobs=of_labels(samples.rollout_logprobs),
        token_weights=weights,
        prompt_ids=of_tokens(samples.prompt_ids, -1),
        sample_indices=of_tokens(samples.sample_indices, -1),
        # position 0 is never a label, so no two coincide
        token_ids_global=torch.where(real, samples.indices[at] * layout.stride + position_ids + 1, -1),
        loss_denominator=denominator,
        num_sequences=num_samples,
    )


def _inputs(counts: dict[int, int], position_ids: Tensor, samples: Samples, length: int, work: Work) -> Inputs:
    """`counts`: predictions of each sample that has any, in their order; `position_ids`: theirs, `[T]`."""
    shared, at = work.shared(list(counts)), dict[int, int]()  # group -> its prefix among the sequences
    sequences: list[tuple[int, int, int, int]] = []  # first token in `samples`, tokens, position of the first, prefix
    rows: list[tuple[int, int, int]] = []  # of each sample: where its prefix and its own tokens begin, prefix tokens
    ends = [0]
    for i in counts:
        group = work.groups.get(i, -1)
        skip = work.prefixes[group] if group in shared else 0
        if skip and group not in at:
            at[group] = len(sequences)
            sequences.append((samples.starts[i], skip, 0, -1))
            ends.append(ends[-1] + skip)
        rows.append((ends[at[group]] if skip else 0, ends[-1], skip))
        if own := work.lengths[i] - skip:  # a response of one token is predicted by the prompt alone
            sequences.append((samples.starts[i] + skip, own, skip, at[group] if skip else -1))
            ends.append(ends[-1] + own)
    which, offset, cu_seqlens = _places(_filled([tokens for _, tokens, *_ in sequences], length))
    begin, tokens, position, prefixes = torch.tensor([*sequences, (0, 0, 0, -1)]).unbind(1)
    prefixes = prefixes[: len(cu_seqlens) - 1]
    of_prefix, own_begin, skip_of = torch.tensor([*rows, (0, 0, 0)]).unbind(1)
    sample, *_ = _places(_filled(list(counts.values()), len(position_ids)))
    in_prefix = position_ids < skip_of[sample]
    row = position_ids + torch.where(in_prefix, of_prefix[sample], own_begin[sample] - skip_of[sample])
    real = offset < tokens[which]
    return Inputs(
        token_ids=torch.where(real, samples.token_ids[torch.where(real, begin[which] + offset, 0)], 0),
        position_ids=position[which] + offset,
        cu_seqlens=cu_seqlens,
        real=real,
        prefixes=prefixes if any(prefix >= 0 for *_, prefix in sequences) else None,
        rows=row,
    )


def _filled(widths: list[int], length: int) -> list[int]:
    """With what is missing to `length` as one more."""
    missing = length - sum(widths)
    return [*widths, missing] if missing > 0 else widths


def _places(widths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """For sequences of these widths: which one a position is in `[T]`, where in it `[T]`, and cu_seqlens."""
    width = torch.tensor(widths)
    ends = width.cumsum(0)
    which = torch.arange(len(widths)).repeat_interleave(width)
    offset = torch.arange(len(which)) - (ends - width)[which]
    return which, offset, torch.cat([ends.new_zeros(1), ends]).int()
