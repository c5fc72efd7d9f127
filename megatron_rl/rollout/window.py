"""The prompts that a step has drawn, in their order, and which of them it may keep.

A step trains on the first `wanted` groups **in drawn order** that are kept. In the order of finishing it would prefer
short responses; so a group counts once all groups before it are judged, however long that takes. What is drawn and how
soon it is answered therefore changes what a step costs, and never what it keeps.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from megatron_rl.rollout.engine import Request
from megatron_rl.types import Prompt, Rollout

# groups that count as kept before any is judged: one bad group at the beginning says little
_PRIOR = 2


@dataclass(slots=True, eq=False)
class Group:
    """A prompt that was drawn, and the answers to it."""

    prompt: Prompt
    requests: list[Request]  # by sample_index
    rank: int | None = None  # that asks for all samples; None: ranks share the samples of a draw
    cursor_before: dict[str, int] | None = None  # None: a held-out problem, whose rewards are not shaped
    arrived: list[float] = field(default_factory=list)  # when answers came, time.time()
    answers: dict[int, Rollout] = field(default_factory=dict)  # by sample_index
    rollouts: list[Rollout] = field(default_factory=list)  # with shaped rewards, once all answers are there


Keeps = Callable[[Sequence[Rollout]], bool]


def num_settled(groups: Sequence[Group], wanted: int, keeps: Keeps) -> int | None:
    """Return how many of the first groups hold the `wanted` kept ones; None while that is not certain."""
    kept = 0
    for number, group in enumerate(groups, 1):
        if not group.rollouts:
            return None
        kept += keeps(group.rollouts)
        if kept == wanted:
            return number
    return None


def num_to_draw(
    groups: Sequence[Group],
    wanted: int,
    keeps: Keeps,
    oversample: float | Literal["auto"] = "auto",
    seen: Sequence[bool] = (),
) -> int:
    """Return how many more groups to draw so that `wanted` are kept on average, by the fraction that was kept of the
    judged ones.

    A group under way counts as kept once its answers differ, and until then by that fraction of the answers that it
    waits for: the more agree, the less it promises. `oversample`: a fraction of `wanted` beyond this; "auto": none.
    `seen`: which groups were kept before these.
    """
    judged = [keeps(group.rollouts) for group in groups if group.rollouts]
    under_way = [group for group in groups if not group.rollouts]
    promised = [1 - len(g.answers) / len(g.requests) for g in under_way if not keeps(list(g.answers.values()))]
    chance = (sum(judged) + sum(seen) + _PRIOR) / (len(judged) + len(seen) + _PRIOR)
    missing = wanted - sum(judged) - (len(under_way) - len(promised))
    if missing <= 0:
        return 0
    extra = 0.0 if oversample == "auto" else oversample * wanted
    return max(0, math.ceil(round(missing / chance + extra - sum(promised), 6)))
