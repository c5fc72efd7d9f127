"""What a rank's requests brought, and what the other ranks hear of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_rl.types import ELSEWHERE, Rollout


@dataclass(frozen=True, slots=True)
class Answers:
    """The rollouts of one rank's requests, and why no more can come."""

    rollouts: list[Rollout]  # graded; those that servers lost are missing
    problem: str


Facts = tuple[Any, ...]  # a rollout's fields but its tokens
_TOKENS = ("token_ids", "rollout_logprobs", "sampled", "routes")
_FACTS = tuple(field.name for field in dataclasses.fields(Rollout) if field.name not in _TOKENS)
_NO_TOKENS: dict[str, Any] = dict(zip(_TOKENS, (ELSEWHERE, ELSEWHERE, ELSEWHERE, None), strict=True))


def facts_of(rollouts: Sequence[Rollout]) -> list[Facts]:
    """Return all of the rollouts but their tokens, whose lengths are known: some hundred bytes each."""
    return [tuple(getattr(rollout, name) for name in _FACTS) for rollout in rollouts]


def from_facts(facts: Sequence[Facts]) -> list[Rollout]:
    """Return the rollouts, with tokens that are elsewhere."""
    return [Rollout(**_NO_TOKENS, **dict(zip(_FACTS, row, strict=True))) for row in facts]
