"""The answer that a response gives, and which answers are equal."""

from __future__ import annotations

from megatron_rl.grading import latex
from megatron_rl.grading.math_answer import last_boxes, unboxed_answer
from megatron_rl.grading.verdict import Grader

_MAX_NORMALISED = 400  # characters; a longer answer is no answer to tell from others by more than its text


def answer_of(response: str, *, by_text: bool) -> str | None:
    """What the response answers, as the verifier `math` finds it: the last \\boxed, or what it ends with. None when
    nothing is found. `by_text`: all of it."""
    if by_text:
        return response.strip() or None
    boxes = last_boxes(response)
    found = boxes[-1] if boxes else unboxed_answer(response)
    return (found or "").strip() or None


def normalised(answer: str) -> str:
    """A spelling that equal answers often share."""
    return latex.clean(answer) if len(answer) <= _MAX_NORMALISED else answer


def same_answer(grader: Grader, a: str, b: str) -> bool:
    """Whether the grader takes one of two normalised answers for the other. Numbers need no grader."""
    numbers = latex.number(a), latex.number(b)
    if numbers[0] is not None and numbers[1] is not None:
        return numbers[0].value == numbers[1].value and numbers[0].percent == numbers[1].percent
    # the grader may know units, sets and expressions in one direction only
    return any(grader.submit(f"\\boxed{{{x}}}", y).result().values[0] >= 1 for x, y in ((a, b), (b, a)))
