"""The weight stream: Megatron shards gathered over TP (experts that are dealt out: over EP), sent along PP, renamed by
the mapping table, in size-bounded buckets.

Every rank receives every Hugging Face tensor, a bucket at a time: peak extra memory is a few buckets, not the model.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PretrainedConfig

from megatron_rl.models.mapping import Row, experts_per_rank, find_row, from_shards
from megatron_rl.parallel.groups import Groups
from megatron_rl.parallel.reduce import all_gather_flat
from megatron_rl.types import Shaped


@dataclass(frozen=True, slots=True)
class _Entry:
    """One parameter of a stage. `rows`: one, or that of each rank's expert when experts are dealt out."""

    rows: tuple[Row, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_dealt(self) -> bool:
        return len(self.rows) > 1


def weight_stream(
    parameters: list[tuple[str, Shaped[Tensor, "..."]]],
    hf: PretrainedConfig,
    groups: Groups,
    *,
    bucket_bytes: int = 512 * 2**20,
) -> Iterator[tuple[str, Shaped[Tensor, "..."]]]:
    """Yield (hf_name, full tensor) of the whole model on every rank, in one order; a collective that all must exhaust.

    parameters: this rank's (Megatron name, shard) pairs, layers numbered over the whole model. bucket_bytes: bound on a
    gathered bucket (one parameter at least).
    """
    local = [_entry(name, parameter, hf, groups) for name, parameter in parameters]
    stages: list[list[_Entry]] = groups.stage_ranks.gather_objects(local)
    sent: set[str] = set()
    for stage, entries in enumerate(stages):
        start = 0
        for bucket in _buckets(entries, bucket_bytes, groups):
            shards = [p for _, p in parameters[start : start + len(bucket)]] if stage == groups.pp_rank else None
            start += len(bucket)
            groups.all_ranks.barrier()  # a rank may be writing the last bucket to a disk, or waiting for a server
            # in a frame of its own, so that no name here keeps this bucket alive while the next is gathered
            yield from _whole_tensors(_exchange(bucket, shards, stage, groups, parameters[0][1].device), hf, sent)


def _whole_tensors(
    exchanged: Iterable[tuple[_Entry, list[Tensor]]], hf: PretrainedConfig, sent: set[str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the Hugging Face tensors of a bucket; add their names to `sent`, and leave out those that it holds."""
    for entry, tensors in exchanged:
        if entry.rows[0].hf[0] in sent:  # a tied output layer is the embedding again
            continue
        whole = [[tensor] for tensor in tensors] if entry.is_dealt else [tensors]
        for row, row_shards in zip(entry.rows, whole, strict=True):
            sent.update(row.hf)
            yield from zip(row.hf, from_shards(row, row_shards, hf), strict=True)


def _entry(name: str, parameter: Tensor, hf: PretrainedConfig, groups: Groups) -> _Entry:
    row = find_row(name, hf.tie_word_embeddings)
    ranks = groups.ep_size if row.is_expert else 1
    offsets = [rank * experts_per_rank(hf, groups.ep_size) for rank in range(ranks)]
    rows = tuple(find_row(name, hf.tie_word_embeddings, offset) for offset in offsets)
    return _Entry(rows, tuple(parameter.shape), parameter.dtype)


def _buckets(entries: list[_Entry], bound: int, groups: Groups) -> Iterator[list[_Entry]]:
    bucket: list[_Entry] = []
    size = 0
    for entry in entries:
        nbytes = entry.numel * entry.dtype.itemsize * (groups.ep_size if entry.is_dealt else groups.tp_size)
        if bucket:
            fits = entry.dtype == bucket[0].dtype and entry.is_dealt == bucket[0].is_dealt
            if not fits or size + nbytes > bound:
                yield bucket
                bucket, size = [], 0
        bucket.append(entry)
        size += nbytes
    if bucket:
        yield bucket


def _exchange(
    bucket: list[_Entry], shards: list[Tensor] | None, stage: int, groups: Groups, device: torch.device
) -> Iterator[tuple[_Entry, list[Tensor]]]:
    """All-gather a bucket over its stage's tensor- (or expert-) parallel ranks, then broadcast it over the pipeline."""
    group, ranks = (groups.ep, groups.ep_size) if bucket[0].is_dealt else (groups.tp, groups.tp_size)
    total = sum(entry.numel for entry in bucket)
    gathered = torch.empty(ranks, total, dtype=bucket[0].dtype, device=device)
    if shards is not None:
        flats = [shard.detach().reshape(-1) for shard in shards]
        all_gather_flat(gathered.view(-1), torch.cat(flats) if len(flats) > 1 else flats[0], group=group)
    if groups.pp_size > 1:
        dist.broadcast(gathered, src=groups.pp_ranks[stage], group=groups.pp)
    first = bucket[0]
    if len(bucket) == 1 and first.rows[0].kind == "vocab":
        # the largest weight: its shards lie behind each other already, and a copy would double it
        yield first, [gathered.view(-1, *first.shape[1:])]
        return
    offset = 0
    for entry in bucket:
        columns = gathered[:, offset : offset + entry.numel]
        offset += entry.numel
        yield entry, [column.reshape(entry.shape) for column in columns]
