"""The answer that a response gives, and which answers are equal."""

from collections.abc import Sequence

from megatron_rl.eval.statistics import Ints, label
from megatron_rl.grading import latex
from megatron_rl.grading.extraction import answers
from megatron_rl.grading.numerals import number
from megatron_rl.grading.verdict import Grader

_MAX_NORMALISED = 400  # characters; a longer answer is no answer to tell from others by more than its text
_ACCEPTED = "\0accepted"  # no answer's text


def answer_of(response: str, *, by_text: bool) -> str | None:
    """Return what the response answers, as the verifier `math` reads it: the last \\boxed, or all of several that are
    one answer together, or what it ends with. None when there is nothing. `by_text`: all of it."""
    if by_text:
        return response.strip() or None
    readings = answers(response)
    return (readings[0] if readings else "").strip() or None


def classes(found: Sequence[str | None], accepted: Sequence[bool], grader: Grader) -> Ints:
    """Return classes `[n]` of equal answers as grading sees them: what it accepted is one answer, the gold one, and
    what it refused is another, whatever the texts say; refused answers are compared with each other."""
    texts = [
        _ACCEPTED if right else None if answer is None else normalised(answer)
        for answer, right in zip(found, accepted, strict=True)
    ]
    return label(texts, lambda a, b: _ACCEPTED not in (a, b) and same_answer(grader, a, b))


def normalised(answer: str) -> str:
    """Return a spelling that equal answers often share."""
    return latex.clean(answer) if len(answer) <= _MAX_NORMALISED else answer


def same_answer(grader: Grader, a: str, b: str) -> bool:
    """Return whether the grader takes one of two normalised answers for the other. Numbers need no grader."""
    x, y = number(a), number(b)
    if x is not None and y is not None:
        return x.value == y.value and x.percent == y.percent
    # the grader may know units, sets and expressions in one direction only
    return any(grader.submit(f"\\boxed{{{p}}}", q).result().values[0] >= 1 for p, q in ((a, b), (b, a)))
