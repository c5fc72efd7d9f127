"""What a rank's requests brought, on its way to the other ranks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from megatron_rl.types import Rollout


@dataclass(frozen=True, slots=True)
class Answers:
    """The rollouts of one rank's requests, and why no more can come.

    They are gathered over all ranks as pickled objects; `__reduce__` makes that one tensor of each kind for all
    rollouts instead of three for each, and changes nothing else.
    """

    rollouts: list[Rollout]  # graded; those that servers lost are missing
    problem: str

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how to build these answers again from columns."""
        rollouts = self.rollouts
        columns = [torch.cat([getattr(r, name) for r in rollouts]) if rollouts else None for name in _PER_TOKEN]
        rest = [tuple(getattr(r, name) for name in _PER_ROLLOUT) for r in rollouts]
        return _from_columns, (columns, [len(r.token_ids) for r in rollouts], rest, self.problem)


_PER_TOKEN = ("token_ids", "rollout_logprobs", "sampled")
_PER_ROLLOUT = tuple(field.name for field in dataclasses.fields(Rollout) if field.name not in _PER_TOKEN)


def _from_columns(columns: list[Any], sizes: list[int], rest: list[tuple[Any, ...]], problem: str) -> Answers:
    fields = zip(*(column.split(sizes) for column in columns), strict=True) if sizes else ()
    named = [dict(zip(_PER_TOKEN + _PER_ROLLOUT, (*a, *b), strict=True)) for a, b in zip(fields, rest, strict=True)]
    return Answers([Rollout(**values) for values in named], problem)
