"""Micro-batches of several mini-batches in one forward pass: without a gradient, nothing needs their boundaries."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_rl.types import Inputs, MicroBatch, TokenStats


def runs_within(micro_batches: Sequence[MicroBatch], budget: int) -> list[list[MicroBatch]]:
    """Neighbours that together have at most `budget` tokens for the model to compute; one alone may have more. Those
    with routes to replay stay apart from those without."""
    runs: list[list[MicroBatch]] = []
    total = 0
    for micro_batch in micro_batches:
        tokens = micro_batch.model_inputs().token_ids.numel()
        alike = runs and (runs[-1][0].routes is None) == (micro_batch.routes is None)
        if alike and total + tokens <= budget:
            runs[-1].append(micro_batch)
            total += tokens
        else:
            runs.append([micro_batch])
            total = tokens
    return runs


def joined(parts: Sequence[MicroBatch]) -> MicroBatch:
    """One micro-batch of the parts' sequences, in their order, with what all parts have; paddings stay where they are,
    as sequences."""
    if len(parts) == 1:
        return parts[0]
    tensors = _joined_fields(parts, {"cu_seqlens"})
    return parts[0].replace(
        **tensors,
        cu_seqlens=_joined_boundaries([part.cu_seqlens for part in parts]),
        inputs=None if parts[0].inputs is None else _joined_inputs([part.model_inputs() for part in parts]),
        loss_denominator=sum(part.loss_denominator for part in parts),
        num_sequences=sum(part.num_sequences for part in parts),
    )


def parted(stats: TokenStats, parts: Sequence[MicroBatch]) -> list[TokenStats]:
    """The statistics of each of the parts from those of the micro-batch that `joined` made of them."""
    lengths = [part.token_ids.numel() for part in parts]
    values = [getattr(stats, field.name) for field in dataclasses.fields(stats)]
    columns = [[None] * len(parts) if value is None else value.split(lengths) for value in values]
    return [TokenStats(*of_part) for of_part in zip(*columns, strict=True)]


def _joined_inputs(parts: Sequence[Inputs]) -> Inputs:
    tokens = _before([part.token_ids.numel() for part in parts])
    sequences = _before([part.cu_seqlens.numel() - 1 for part in parts])
    prefixes, rows = [], []
    for part, first_sequence, first_token in zip(parts, sequences, tokens, strict=True):
        none = torch.full_like(part.cu_seqlens[1:], -1, dtype=torch.int64)
        own = none if part.prefixes is None else part.prefixes
        prefixes.append(torch.where(own >= 0, own + first_sequence, -1))
        assert part.rows is not None  # wherever a micro-batch has inputs of its own
        rows.append(part.rows + first_token)
    return Inputs(
        **_joined_fields(parts, {"cu_seqlens", "prefixes", "rows"}),
        cu_seqlens=_joined_boundaries([part.cu_seqlens for part in parts]),
        prefixes=None if all(part.prefixes is None for part in parts) else torch.cat(prefixes),
        rows=torch.cat(rows),
    )


def _joined_fields(parts: Sequence[MicroBatch] | Sequence[Inputs], but: set[str]) -> dict[str, Any]:
    fields = {}
    for field in dataclasses.fields(parts[0]):
        values = [getattr(part, field.name) for part in parts]
        if field.name not in but and any(isinstance(value, Tensor) for value in values):
            fields[field.name] = None if any(value is None for value in values) else torch.cat(values)
    return fields


def _joined_boundaries(parts: Sequence[Tensor]) -> Tensor:
    before = _before([int(part[-1]) for part in parts])
    rest = [part[1:] + offset for part, offset in zip(parts, before, strict=True)]
    return torch.cat([parts[0][:1], *rest])


def _before(counts: Sequence[int]) -> list[int]:
    """Of each count, the sum of those before it."""
    return [sum(counts[:i]) for i in range(len(counts))]
