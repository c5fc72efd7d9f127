"""The weight stream: Megatron shards gathered over TP, sent along PP, renamed by the mapping table, in size-bounded
buckets.

Every rank receives every Hugging Face tensor, one bucket at a time, so that peak extra memory is a few buckets and not
the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PretrainedConfig

from megatron_rl.convert.mapping import Row, find_row, from_shards
from megatron_rl.parallel.groups import Groups
from megatron_rl.parallel.reduce import Reducer, all_gather_flat


@dataclass(frozen=True, slots=True)
class _Entry:
    row: Row
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def weight_stream(
    parameters: list[tuple[str, Tensor]],
    hf: PretrainedConfig,
    groups: Groups,
    *,
    layer_offset: int,
    bucket_bytes: int = 512 * 2**20,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (hf_name, full tensor) of the whole model on every rank, in the same order; a collective: all ranks must
    exhaust it.

    parameters: this stage's (local Megatron name, shard) pairs. bucket_bytes: bound on a gathered bucket (one parameter
    at least).
    """
    mine = [_Entry(find_row(n, layer_offset, hf.tie_word_embeddings), tuple(p.shape), p.dtype) for n, p in parameters]
    stages: list[list[_Entry]] = Reducer(groups.pp, parameters[0][1].device).gather_objects(mine)
    sent: set[str] = set()
    for stage, entries in enumerate(stages):
        start = 0
        for bucket in _buckets(entries, bucket_bytes // groups.tp_size):
            shards = [p for _, p in parameters[start : start + len(bucket)]] if stage == groups.pp_rank else None
            start += len(bucket)
            for row, tensors in _exchange(bucket, shards, stage, groups, parameters[0][1].device):
                if row.hf[0] in sent:  # a tied output layer is the embedding again
                    continue
                sent.update(row.hf)
                yield from zip(row.hf, from_shards(row, tensors, hf), strict=True)


def _buckets(entries: list[_Entry], bound: int) -> Iterator[list[_Entry]]:
    bucket: list[_Entry] = []
    size = 0
    for entry in entries:
        nbytes = entry.numel * entry.dtype.itemsize
        if bucket and (size + nbytes > bound or entry.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(entry)
        size += nbytes
    if bucket:
        yield bucket


def _exchange(
    bucket: list[_Entry], shards: list[Tensor] | None, stage: int, groups: Groups, device: torch.device
) -> Iterator[tuple[Row, list[Tensor]]]:
    """All-gather a bucket over its stage's tensor-parallel ranks, then broadcast it along the pipeline."""
    total = sum(entry.numel for entry in bucket)
    gathered = torch.empty(groups.tp_size, total, dtype=bucket[0].dtype, device=device)
    if shards is not None:
        flat = torch.cat([shard.detach().reshape(-1) for shard in shards])
        all_gather_flat(gathered.view(-1), flat, group=groups.tp)
    if groups.pp_size > 1:
        dist.broadcast(gathered, src=groups.pp_ranks[stage], group=groups.pp)
    offset = 0
    for entry in bucket:
        columns = gathered[:, offset : offset + entry.numel]
        offset += entry.numel
        yield entry.row, [column.reshape(entry.shape) for column in columns]
