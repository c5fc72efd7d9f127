"""From a mini-batch's samples to the tensors of one micro-batch."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from megatron_rl.algorithms.aggregation import token_weights
from megatron_rl.algorithms.balance import Work
from megatron_rl.models.expert_routes import place_routes
from megatron_rl.packing.layout import Layout
from megatron_rl.types import Inputs, MicroBatch, Rollout


@dataclass(frozen=True, slots=True)
class Samples:
    """A rank's samples of a mini-batch by their index in the step, and their tokens one behind the other: `[N]`."""

    starts: dict[int, int]  # sample -> where it begins
    lengths: dict[int, int]
    prompt_lengths: dict[int, int]  # tokens before the first that was sampled
    routes: dict[int, Tensor | None]  # see models/expert_routes.py
    token_ids: Tensor
    counted: Tensor  # bool, sampled, in a rollout that counts
    rollout_logprobs: Tensor
    response_positions: Tensor  # which token of its response, from 0; -1 before it
    response_lengths: Tensor  # tokens of its response that count
    advantages: Tensor
    indices: Tensor  # the sample
    prompt_ids: Tensor
    sample_indices: Tensor

    @classmethod
    def of(cls, members: list[int], rollouts: list[Rollout], advantages: Tensor) -> Self:
        """Return those with the indices `members`, whose tokens this rank holds; `advantages` `[B]` are the step's."""
        chosen = [rollouts[i] for i in members] or [_NOTHING]
        sizes = [len(rollout.token_ids) for rollout in chosen]
        lengths = torch.tensor(sizes)
        counted = torch.cat([r.sampled if r.counts else torch.zeros_like(r.sampled) for r in chosen])
        ends, so_far = lengths.cumsum(0), counted.cumsum(0)
        starts = ends - lengths
        counted_before = so_far[starts] - counted[starts].long()
        counts = so_far[ends - 1] - counted_before
        owners = torch.tensor([(i, rollouts[i].prompt_id, rollouts[i].sample_index) for i in members] or [(-1, -1, -1)])
        of_members = advantages[members].float() if members else torch.zeros(1)
        return cls(
            dict(zip(members, starts.tolist(), strict=False)),
            {i: rollouts[i].lengths.total for i in members},
            {i: rollouts[i].lengths.prompt for i in members},
            {i: rollouts[i].routes for i in members},
            torch.cat([rollout.token_ids for rollout in chosen]),
            counted,
            torch.cat([rollout.rollout_logprobs for rollout in chosen]),
            so_far - 1 - counted_before.repeat_interleave(lengths),
            counts.repeat_interleave(lengths),
            of_members.repeat_interleave(lengths),
            *owners.repeat_interleave(lengths, dim=0).unbind(1),
        )


# one token of nobody, so that the micro-batches of a rank without samples have something to read their padding from
_NOTHING = Rollout(-1, -1, torch.zeros(1, dtype=torch.int64), torch.zeros(1), torch.zeros(1, dtype=torch.bool), "", 0)


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of one sample's tokens that stands somewhere in a micro-batch."""

    begin: int  # its first token in `Samples`
    tokens: int
    position: int  # of that token in its sample
    predictions: int = 0  # how many of its tokens predict the next, from the first on
    prefix: int = -1  # which segment holds the tokens before it; -1: none


_PADDING = Segment(begin=0, tokens=0, position=0)


def micro_batch(chosen: list[int], samples: Samples, length: int, layout: Layout, work: Work | None) -> MicroBatch:
    """Return the `chosen` samples in `length` tokens for the model. `work`: the samples' own, where they share prompts;
    then the micro-batch holds predictions alone, and its `inputs` are those `length` tokens."""
    return _whole(chosen, samples, length, layout) if work is None else _shared(chosen, samples, length, layout, work)


def _whole(chosen: list[int], samples: Samples, length: int, layout: Layout) -> MicroBatch:
    """Each sample for itself: the model computes what the micro-batch holds.

    tokens      p p p r r r | p p r r | .       two samples, then padding
    labels      . . r r r . | . r r . | .       a prediction for each token of a response
    """
    segments = [Segment(samples.starts[i], n, 0, n - 1) for i, n in ((i, samples.lengths[i]) for i in chosen)]
    widths = [layout.padded(segment.tokens) for segment in segments]
    packed = _predictions(segments, _with_padding(widths, length), len(chosen), samples, layout)
    starts = packed.cu_seqlens[: len(chosen)].tolist()
    return packed.replace(routes=place_routes([samples.routes[i] for i in chosen], starts, length))


def _shared(chosen: list[int], samples: Samples, length: int, layout: Layout, work: Work) -> MicroBatch:
    """The samples of a prompt compute it once; each predicts its response from the prompt's last token on.

    model       p p p | r r | r r r | .         a prompt, two responses without their last tokens, padding
    rows        3 4 5 | 3 6 7 8                 the output that each prediction reads (from 1): both begin with
    labels      r r r | r r r r                 that of the prompt's last token
    """
    skips = {i: samples.prompt_lengths[i] - 1 for i in chosen if work.lengths[i]}
    counts = {i: work.lengths[i] - skip for i, skip in skips.items()}
    segments = [Segment(samples.starts[i] + skip, counts[i], skip, counts[i]) for i, skip in skips.items()]
    # one position at least, so that nothing needs to think of an empty tensor
    packed = _predictions(segments, _with_padding(list(counts.values()), 1), len(chosen), samples, layout)
    return packed.replace(inputs=_shared_inputs(counts, packed.position_ids, samples, length, work))


def _predictions(
    segments: list[Segment], widths: list[int], num_samples: int, samples: Samples, layout: Layout
) -> MicroBatch:
    """Return what the segments' tokens predict. `widths`: of the segments with their padding, and of padding alone."""
    segment, offset, cu_seqlens = _places(widths)
    begin, tokens, position, predictions, _ = _columns(segments)
    real, predicting = offset < tokens[segment], offset < predictions[segment]
    source = torch.where(real, begin[segment] + offset, 0)
    label_source = torch.where(predicting, source + 1, 0)
    loss_mask = predicting & samples.counted[label_source]
    weights, denominator = token_weights(layout.aggregation, loss_mask, cu_seqlens, layout.constant_length)
    position_ids = position[segment] + offset

    def of_labels(values: Tensor) -> Tensor:
        return torch.where(loss_mask, values[label_source], 0)

    def of_tokens(values: Tensor, padding: int) -> Tensor:
        return torch.where(real, values[source], padding)

    return MicroBatch(
        token_ids=of_tokens(samples.token_ids, 0),
        labels=of_labels(samples.token_ids),
        position_ids=position_ids,
        response_positions=of_labels(samples.response_positions),
        response_lengths=of_labels(samples.response_lengths),
        cu_seqlens=cu_seqlens,
        loss_mask=loss_mask,
        advantages=of_labels(samples.advantages),
        rollout_logprobs=of_labels(samples.rollout_logprobs),
        token_weights=weights,
        prompt_ids=of_tokens(samples.prompt_ids, -1),
        sample_indices=of_tokens(samples.sample_indices, -1),
        # position 0 is never a label, so no two coincide
        token_ids_global=torch.where(real, samples.indices[source] * layout.max_tokens + position_ids + 1, -1),
        loss_denominator=denominator,
        num_sequences=num_samples,
        longest=max(widths),
    )


def _shared_inputs(counts: dict[int, int], position_ids: Tensor, samples: Samples, length: int, work: Work) -> Inputs:
    """Return what the model computes for the predictions of `_shared`. `counts`: predictions of each sample that has
    any, in their order; `position_ids`: theirs, `[T]`."""
    together = work.shared(list(counts))
    segments: list[Segment] = []
    ends = [0]
    prefix_of: dict[int, int] = {}  # samples that share a prompt -> its segment
    outputs: list[tuple[int, int, int]] = []  # of each sample: where its prefix and its own tokens begin, prefix tokens

    def append(segment: Segment) -> int:
        segments.append(segment)
        ends.append(ends[-1] + segment.tokens)
        return len(segments) - 1

    for i in counts:
        family = work.families.get(i, -1)
        skip = work.prefixes[family] if family in together else 0
        if skip and family not in prefix_of:
            prefix_of[family] = append(Segment(samples.starts[i], skip, 0))
        begins = samples.starts[i], segments[prefix_of.get(family, 0)].begin if skip else 0
        if skip and not torch.equal(*(samples.token_ids[begin : begin + skip] for begin in begins)):
            raise ValueError(f"samples of prompt {family} begin with other tokens; expected its {skip} first in all")
        prefix = prefix_of[family] if skip else -1
        outputs.append((ends[prefix] if skip else 0, ends[-1], skip))
        if own := work.lengths[i] - skip:  # a response of one token is predicted by the prompt alone
            append(Segment(samples.starts[i] + skip, own, skip, prefix=prefix))
    widths = _with_padding([s.tokens for s in segments], length)
    segment, offset, cu_seqlens = _places(widths)
    begin, tokens, position, _, prefixes = _columns(segments)
    real = offset < tokens[segment]
    sample, *_ = _places(_with_padding(list(counts.values()), len(position_ids)))
    prefix_begin, own_begin, prefix_tokens = torch.tensor([*outputs, (0, 0, 0)]).unbind(1)
    in_prefix = position_ids < prefix_tokens[sample]
    shift = torch.where(in_prefix, prefix_begin[sample], own_begin[sample] - prefix_tokens[sample])
    return Inputs(
        token_ids=torch.where(real, samples.token_ids[torch.where(real, begin[segment] + offset, 0)], 0),
        position_ids=position[segment] + offset,
        cu_seqlens=cu_seqlens,
        real=real,
        longest=max(widths),
        prefixes=prefixes[: len(cu_seqlens) - 1] if any(s.prefix >= 0 for s in segments) else None,
        rows=position_ids + shift,
    )


def _columns(segments: list[Segment]) -> tuple[Tensor, ...]:
    """Return begin, tokens, position, predictions and prefix of the segments and of one of padding, `[S + 1]` each."""
    rows = [(s.begin, s.tokens, s.position, s.predictions, s.prefix) for s in [*segments, _PADDING]]
    return torch.tensor(rows).unbind(1)


def _with_padding(widths: list[int], length: int) -> list[int]:
    """Return the widths, with what is missing to `length` as one more."""
    missing = length - sum(widths)
    return [*widths, missing] if missing > 0 else widths


def _places(widths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return, for segments of these widths, which one a position is in `[T]`, where in it `[T]`, and cu_seqlens."""
    width = torch.tensor(widths)
    ends = width.cumsum(0)
    segment = torch.arange(len(widths)).repeat_interleave(width)
    offset = torch.arange(len(segment)) - (ends - width)[segment]
    return segment, offset, torch.cat([ends.new_zeros(1), ends]).int()
