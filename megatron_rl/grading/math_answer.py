"""The `math` verifier: a response's answer against the gold answer, by what both mean."""

import re
from functools import lru_cache

from megatron_rl.grading import latex
from megatron_rl.grading.equivalence import Policy, equal, is_understood
from megatron_rl.grading.extraction import answers, last_boxes

_SENTENCE = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}\s+[a-zA-Z]+.*(?:\$|\\\(|\\boxed)", re.S)


def math(
    response: str,
    answer: str,
    *,
    strict: bool = False,
    rounding_digits: int = 5,
    unevaluated: bool = False,
    earlier_box: bool = False,
) -> float:
    """Return 1.0 if the response's answer is equivalent to the gold `answer`, else 0.0.

    The answer is the content of the last \\boxed; without a box, what follows the last "####" or "answer is", or else
    the last formula or number of the last line.

    `strict`: only a \\boxed counts, an integer must be written as one, a fraction reduced, and a rounded decimal is not
    the exact value, as in PRIME's grader (reward_score/prime_math of verl).
    `rounding_digits`: significant digits from which on a decimal may round an exact gold; 0: never.
    `unevaluated`: a sum or product over a range counts as its value, though the gold is a value.
    `earlier_box`: an earlier box counts when the last one was cut.
    """
    if not strict and response.strip() == answer.strip():
        return 1.0  # some golds are sentences
    policy = Policy(strict, 0 if strict else rounding_digits, unevaluated)
    if strict and not last_boxes(response):
        return 0.0
    readings = answers(response, earlier_box=earlier_box)
    for gold in _golds(answer):
        for position, found in enumerate(readings):
            if position and len(latex.parts(latex.clean(gold)).items) != len(latex.parts(latex.clean(found)).items):
                continue  # boxes together are meant where the gold has as many parts
            if equal(found, gold, policy):
                return 1.0
    return 0.0


@lru_cache(maxsize=4096)  # the samples of one prompt share their gold
def _golds(answer: str) -> tuple[str, ...]:
    """What a gold answer allows: itself, alternatives that OR parts, and the answer in a sentence."""
    golds = [*re.split(r"\s+OR\s+", answer), answer]
    if len(answer) <= latex.MAX_CLEANED and _SENTENCE.search(answer) and not _is_read(answer):
        golds += answers(answer)[:1]
    return tuple(dict.fromkeys(golds))


def compared_as_text(gold: str) -> bool:
    """Return whether no reading understands a gold answer, so that only the same text can be right."""
    return not any(_is_read(text) for text in _golds(gold))


def _is_read(gold: str) -> bool:
    try:
        return len(gold) <= latex.MAX_CLEANED and is_understood(latex.clean(gold))
    except RecursionError:
        return False
