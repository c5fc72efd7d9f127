"""What other ranks hear of a rank's rollouts."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from megatron_rl.packing.dealing import TOKENS
from megatron_rl.types import Rollout

Facts = tuple[Any, ...]  # a rollout's fields but its tokens
_FACTS = tuple(field.name for field in dataclasses.fields(Rollout) if field.name not in TOKENS)
# a tensor without data raises whatever one reads from it: tokens that are elsewhere are never taken for none
_NO_TOKENS: dict[str, Any] = dict.fromkeys(TOKENS, torch.empty((), device="meta")) | {"routes": None}


def facts_of(rollouts: Sequence[Rollout]) -> list[Facts]:
    """Return all of the rollouts but their tokens, whose lengths are known: some hundred bytes each."""
    return [tuple(getattr(rollout, name) for name in _FACTS) for rollout in rollouts]


def from_facts(facts: Sequence[Facts]) -> list[Rollout]:
    """Return the rollouts, with tokens that are elsewhere."""
    return [Rollout(**_NO_TOKENS, **dict(zip(_FACTS, row, strict=True))) for row in facts]
