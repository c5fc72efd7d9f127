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
    oversample: float | Literal["auto"] = 0.0,
    seen: Sequence[bool] = (),
) -> int:
    """Return how many more groups to draw so that `wanted` are likely to be kept, by the fraction that was kept of the
    judged ones.

    `oversample`: a fraction of `wanted` beyond the number that is kept on average; "auto": so many that one standard
    deviation of the number kept makes up for: each is kept by the same chance p, so with x groups that are not judged
    yet x p - sqrt(x p (1 - p)) = what is missing. `seen`: which groups were kept before these.
    """
    judged = [keeps(group.rollouts) for group in groups if group.rollouts]
    missing, chance = wanted - sum(judged), (sum(judged) + sum(seen) + _PRIOR) / (len(judged) + len(seen) + _PRIOR)
    if missing <= 0:
        return 0
    if oversample == "auto":
        deviation = math.sqrt(chance * (1 - chance))
        needed = ((deviation + math.sqrt(deviation**2 + 4 * chance * missing)) / (2 * chance)) ** 2
    else:
        needed = missing / chance + oversample * wanted
    return max(0, math.ceil(round(needed, 6)) - (len(groups) - len(judged)))
