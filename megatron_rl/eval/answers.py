"""The answer that a response gives, and which answers are equal."""

from __future__ import annotations

import re
from fractions import Fraction

from megatron_rl.reward import RewardFn

_SPACES = re.compile(r"\\[,;!: ]|~|\s+")
_NUMBER = re.compile(r"-?(\d+|\d*\.\d+)")


def answer_of(response: str, *, boxed: bool) -> str | None:
    r"""What the response answers: the content of its last \boxed{}, None without a closed one; or all of its text."""
    if not boxed:
        return response.strip() or None
    start = response.rfind("\\boxed{")
    if start < 0:
        return None
    begin = start + len("\\boxed{")
    depth = 1
    for end in range(begin, len(response)):
        depth += {"{": 1, "}": -1}.get(response[end], 0)
        if depth == 0:
            return response[begin:end].strip() or None
    return None


def normalised(answer: str) -> str:
    """A spelling that equal answers often share: no spaces, one kind of fraction and bracket."""
    text = answer.strip().strip("$").rstrip(".")
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\\left", "").replace("\\right", "")
    return _SPACES.sub("", text)


def same_answer(grade: RewardFn, a: str, b: str) -> bool:
    """Whether the grader takes one for the other, in either order. Numbers that are written out need no grader."""
    if _NUMBER.fullmatch(a) and _NUMBER.fullmatch(b):
        return Fraction(a) == Fraction(b)
    return any(grade(f"\\boxed{{{x}}}", y) >= 1 for x, y in ((a, b), (b, a)))
