"""The `math` verifier: the last \\boxed answer of a response against the gold answer.

Three readings, the cheap ones first: the texts agree in one spelling; both are numbers, or lists and brackets of
comparable items; math-verify parses both and sympy finds them equal, within the bounds of grading/bounds.py. sympy may
still run for ever, and math-verify's own time limits work in no thread and are off, so call this in a worker with a
deadline (grading/pool.py).
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from megatron_rl.grading import bounds, latex, symbolic
from megatron_rl.grading.latex import Number, Parts, Unit

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:(?=\{)|(?P<bare>[^\s{}\\$]+))")
_SAID = (
    re.compile(r"####\s*(?P<answer>[^\n]+)"),
    re.compile(r"answer\s*(?:\*\*)?\s*(?:is|are|=|:)\s*(?:\*\*)?\s*:?\s*(?P<answer>[^\n]+)", re.I),
)
_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.S)
_PLAIN_NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s*/\s*\d+)?(?:\s*\\?%)?(?![\w])")
_CHOICE = re.compile(r"\(?\s*([A-Z])\s*\)?")
_CHOICE_WITH_TEXT = re.compile(r"(?:\\text\{)?\(?\s*([A-Z])\s*[).:]\}?\s*.+", re.S)
_BASE = re.compile(r"(?P<digits>[0-9A-F]+)(?:_\{?(?P<base>\d+)\}?)?")
_LEAD_IN = re.compile(r"\\text\{[^{}]*(?:is|are|:|=)\s*\}")
_ASSIGNED = re.compile(r"(?P<name>[^=<>]*[^=<>!\\\s])\s*=(?P<value>[^=].*)", re.S)
_MEMBER = re.compile(r"(?P<name>[A-Za-z](?:_\{?\w+\}?)?|\\[a-z]+)\s*\\in(?![a-z])\s*(?P<value>.+)", re.S)
_WORDS = re.compile(r"[^\W\d_]{2,}(?:[\s-]+[^\W\d_]+)*")
_MAX_PARSED = 400  # characters
_MAX_LINE = 2000  # characters of an answer's line that are searched
_DIGITS_OF_A_ROUNDING = 4


def math(response: str, answer: str, *, strict: bool = False) -> float:
    """1.0 if the response's answer is equivalent to the gold `answer`, else 0.0.

    The answer is the content of the last \\boxed; without a box, what follows the last "####" or "answer is", or else
    the last formula or number of the last line. A gold of several parts also accepts one box for each at the end.

    `strict`: only a \\boxed counts, an integer must be written as one, a fraction reduced, and a rounded decimal is not
    the exact value. The rules on integers and fractions are those of PRIME's grader, whose verdict as a whole is laxer
    than either mode of this one: without a box it takes what follows "answer is"; 2.0 is 2; and what these rules refuse
    it still accepts within 1e-4, relative, with 3.14 for pi too, and where numbers differ by a factor of 100. Only the
    order is its own: the items of a list must come as in the gold.
    Raises: ImportError without math-verify.
    Source of the comparison: reward_score/prime_math of verl, which adapts PRIME's.
    """
    if not strict and response.strip() == answer.strip():
        return 1.0  # some golds are sentences
    golds = list(dict.fromkeys([*re.split(r"\s+OR\s+", answer), answer]))
    boxes = last_boxes(response)
    found = boxes[-1] if boxes else None if strict else unboxed_answer(response)
    if found is None:
        return 0.0
    for gold in golds:
        if equal(found, gold, strict=strict):
            return 1.0
        count = len(latex.parts(latex.clean(gold)).items)
        if 1 < count == len(boxes) and equal(",".join(boxes), gold, strict=strict):
            return 1.0
    return 0.0


def last_boxes(response: str) -> list[str]:
    """Contents of the last \\boxed and of those just before it, in order: they are one answer when nothing but a few
    words without a full stop stands between them. Boxes that never close are passed over."""
    part = response.rpartition("</think>")[2]
    spans = _box_spans(part)
    if not spans:
        part, spans = response, _box_spans(response)
    boxes: list[str] = []
    next_start: int | None = None
    for start, end, content in reversed(spans):
        if next_start is not None and not re.fullmatch(r"[^.\n]{0,40}", part[end:next_start]):
            break
        boxes.insert(0, content)
        next_start = start
    return boxes


def _box_spans(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of the outermost closed boxes, of which the last 8 matter."""
    spans, position = [], 0
    starts = [match.start() for match in _BOX.finditer(text)][-64:]
    for start in starts:
        match = _BOX.match(text, start)
        if match is None or start < position:
            continue
        if match["bare"] is not None:
            spans.append((start, match.end(), match["bare"]))
            continue
        end = latex.matching_brace(text, match.end())
        if end > 0 and text[match.end() + 1 : end].strip():
            spans.append((start, end + 1, text[match.end() + 1 : end]))
            position = end
    return spans[-8:]


def unboxed_answer(response: str) -> str | None:
    """The answer of a response without a box, or None."""
    text = response.rpartition("</think>")[2].strip()
    if _BOX.search(text):
        return None  # the box was cut
    for pattern in _SAID:
        said = [match["answer"] for match in pattern.finditer(text)]
        if said:
            return _core(said[-1])
    if re.search(r"(?:\$\$|\\\])[\s.]*$", text):  # a displayed formula at the end spans lines
        formulas = _FORMULA.findall(text)
        return next(filter(None, formulas[-1]), None) if formulas else None
    lines = [line for line in text.split("\n") if line.strip()]
    return _core(lines[-1]) if lines else None


def _core(line: str) -> str:
    """The formula of a line, or its last number when it has words around it, or all of it."""
    line = line.strip()[-_MAX_LINE:]
    formulas = [next(filter(None, match.groups())) for match in _FORMULA.finditer(line)]
    if formulas:
        only_math = not re.search(r"[a-zA-Z]{3,}", _FORMULA.sub("", line))
        return ",".join(formulas) if only_math and len(formulas) > 1 else formulas[-1]
    if len(line) <= _MAX_PARSED and latex.number(latex.clean(line)) is not None:
        return line
    if "\\" in line or not re.search(r"[a-zA-Z]{2,}\s+\S", line):
        return line
    numbers = _PLAIN_NUMBER.findall(line)
    return numbers[-1] if numbers else line


# --- equivalence ------------------------------------------------------------------------------------------------------


def equal(found: str, gold: str, *, strict: bool = False) -> bool:
    """Whether two answers are the same; see `math`. `found` and `gold` are single answers, not responses."""
    if len(found) > max(_MAX_PARSED, 4 * len(gold)):
        return False
    return _equal_clean(latex.clean(found), latex.clean(gold), strict)


def _equal_clean(found: str, gold: str, strict: bool) -> bool:
    if not found or not gold:
        return False
    if _compact(found) == _compact(gold):
        return True
    choice = _CHOICE.fullmatch(gold)
    if choice:
        given = _CHOICE.fullmatch(found) or _CHOICE_WITH_TEXT.fullmatch(found)
        if given:
            return given[1] == choice[1]
    if _WORDS.fullmatch(gold) and _WORDS.fullmatch(found):
        return gold.casefold() == found.casefold()
    if _WORDS.fullmatch(gold) and len(gold) > 3:
        return False  # sympy would take the letters for a product
    if "_" in found + gold:
        a, b = _BASE.fullmatch(_compact(found)), _BASE.fullmatch(_compact(gold))
        if a and b:  # the problem may name the base, so that the answer need not
            return a["digits"] == b["digits"] and (a["base"] == b["base"] or None in (a["base"], b["base"]))
    if "\\text" in found + gold and _letters(found) == _letters(gold):
        return True
    found, gold = _same_side(_LEAD_IN.sub("", found), gold)
    found, gold = _expand_signs(found), _expand_signs(gold)
    verdict = _equal_numbers(found, gold, strict)
    if verdict is None or (not verdict and "," in found and "," in gold):
        verdict = _equal_parts(found, gold, strict)
    return _equal_symbolic(found, gold, strict) if verdict is None else verdict


def _compact(text: str) -> str:
    return re.sub(r"\s+", "", text).replace("\\text{", "{")


def _letters(text: str) -> str:
    return re.sub(r"\\text(?![a-z])|[\s{}.,;]", "", text).casefold()


def _same_side(found: str, gold: str) -> tuple[str, str]:
    """Without the name of the quantity (x =, f(x) =, x in), where only one of them has it or both have the same."""
    found_name, found_value = _named(found)
    gold_name, gold_value = _named(gold)
    if found_name and not gold_name and "=" not in gold:
        last = found_value.rpartition("=")[2].strip()
        return last if last and last.count("{") == last.count("}") else found_value, gold
    if gold_name and not found_name and "=" not in found and _is_name(gold_name):
        return found, gold_value
    if found_name and gold_name and _compact(found_name).casefold() == _compact(gold_name).casefold():
        return found_value, gold_value
    return found, gold


def _named(text: str) -> tuple[str, str]:
    if len(latex.parts(text).items) > 1:
        return "", text
    match = _MEMBER.fullmatch(text) or _ASSIGNED.fullmatch(text)
    if match is None or re.search(r"\\(?:le|ge|ne)(?![a-z])", match["name"]):
        return "", text
    if match["name"].count("{") != match["name"].count("}"):
        return "", text  # the = of a sum's limits
    return match["name"], match["value"].strip()


def _is_name(text: str) -> bool:
    """Whether the left side of an equation only names what the right side is."""
    return re.fullmatch(r"(?:\\?[A-Za-z]+'*)(?:_\{?[\w\\]+\}?)?\s*(?:\([\w,\s\\]*\))?", text.strip()) is not None


def _expand_signs(text: str) -> str:
    if not re.search(r"\\pm(?![a-z])", text) or len(latex.split(text, ",;")) > 1:
        return text
    plus = re.sub(r"\\mp(?![a-z])", "-", re.sub(r"\\pm(?![a-z])", "+", text))
    minus = re.sub(r"\\mp(?![a-z])", "+", re.sub(r"\\pm(?![a-z])", "-", text))
    return ",".join(re.sub(r"^\s*\+", "", side) for side in (plus, minus))


def _equal_numbers(found: str, gold: str, strict: bool) -> bool | None:
    """The verdict on two numbers with or without units; None when one is no number."""
    if latex.has_degrees(found) or latex.has_degrees(gold):
        if latex.has_degrees(gold) and "\\pi" in found or latex.has_degrees(found) and "\\pi" in gold:
            return None
        found, gold = latex.without_degrees(found), latex.without_degrees(gold)
    gold, gold_unit = latex.split_unit(gold)
    with_unit = gold_unit is not None and gold_unit.dimension != ""
    found, found_unit = latex.split_unit(found, words=latex.number(gold) is not None, letters=with_unit)
    b = latex.number(gold)
    a = latex.number(found)
    if a is None or b is None:
        return None
    scale = _unit_ratio(found_unit, gold_unit)
    if scale is None:
        return False
    if strict and (a.form == "integer") != (b.form == "integer"):
        return False
    if strict and b.form == a.form == "fraction" and not a.reduced:
        return False
    if a.percent != b.percent and a.value != b.value:
        scale *= Fraction(1, 100) if a.percent else 100
    return close(a, b, scale, strict)


def _unit_ratio(found: Unit | None, gold: Unit | None) -> Fraction | None:
    """What to multiply the found number with; None when the units measure different things."""
    if found is None or gold is None or not found.dimension or not gold.dimension:
        return Fraction(1)
    return found.size / gold.size if found.dimension == gold.dimension else None


def close(found: Number, gold: Number, scale: Fraction, strict: bool) -> bool:
    """Equal, or one is the other rounded: the found decimal to four digits or more, the gold one to three or more."""
    value = found.value * scale
    if value == gold.value:
        return True
    if strict or (gold.form == "integer" and not gold.percent):
        return False
    step = found.step * abs(scale)
    if found.form == "decimal" and found.digits >= _DIGITS_OF_A_ROUNDING and (not gold.step or gold.step <= step):
        return abs(value - gold.value) <= step / 2
    if gold.form == "decimal" and gold.digits >= _DIGITS_OF_A_ROUNDING - 1 and step <= gold.step:
        return abs(value - gold.value) <= gold.step / 2
    return False


def _equal_parts(found: str, gold: str, strict: bool) -> bool | None:
    """The verdict on tuples, intervals, unions, sets and lists; None when the two are not alike in that."""
    found_union, gold_union = _unions(found, gold)
    if max(len(found_union), len(gold_union)) > 1 and len(found_union) == len(gold_union):
        return _match_up(found_union, gold_union, strict)
    found, gold = found_union[0], gold_union[0]
    a, b = latex.parts(latex.column_as_tuple(found)), latex.parts(latex.column_as_tuple(gold))
    if len(b.items) < 2 and not b.opening or len(a.items) < 2 and not a.opening:
        return None
    if len(a.items) != len(b.items):
        return False
    if not _brackets_agree(a, b):
        return False
    if "\\{" in (a.opening, b.opening) or not a.opening and not b.opening:
        return _match_up(list(a.items), list(b.items), strict)
    return all(_equal_clean(x, y, strict) for x, y in zip(a.items, b.items, strict=True))


def _unions(found: str, gold: str) -> tuple[list[str], list[str]]:
    """The members of unions; inequalities become intervals where the other side has intervals."""
    a, b = latex.intervals(found), latex.intervals(gold)
    plain_a, plain_b = ([part.strip() for part in re.split(r"\\cup(?![a-z])", text)] for text in (found, gold))
    if (a is None) == (b is None):
        return plain_a, plain_b
    return a or plain_a, b or plain_b


def _brackets_agree(a: Parts, b: Parts) -> bool:
    if not a.opening or not b.opening:
        # a list may leave out the brackets of a set or a tuple, never those of a half-open interval
        present = a if a.opening else b
        return (present.opening, present.closing) not in (("[", ")"), ("(", "]"))
    return (a.opening, a.closing) == (b.opening, b.closing) or {a.opening, b.opening} == {"(", "\\langle"}


def _match_up(found: list[str], gold: list[str], strict: bool) -> bool:
    """Whether the items agree in some order."""
    left = list(gold)
    for item in found:
        match = next((g for g in left if _equal_clean(item, g, strict)), None)
        if match is None:
            return False
        left.remove(match)
    return not left


def _equal_symbolic(found: str, gold: str, strict: bool) -> bool:
    """By math-verify, after units and degrees are gone."""
    if not bounds.readable(found, gold):
        return False
    found, gold = _in_radians(found, gold)
    found, gold = (latex.split_unit(text)[0] for text in (found, gold))
    a, b = symbolic.parsed(found), symbolic.parsed(gold)
    if a is None or b is None:
        return False
    if a == b:
        return True
    if not bounds.workable(a, b):
        return False
    a, b = symbolic.with_imaginary_unit(a), symbolic.with_imaginary_unit(b)
    if not strict:
        rounded = _rounded(found, b, gold) if latex.number(found) else _rounded_gold(a, gold)
        if rounded:
            return True
    return symbolic.same(a, b)


def _in_radians(found: str, gold: str) -> tuple[str, str]:
    mixed = latex.has_degrees(found) and "\\pi" in gold or latex.has_degrees(gold) and "\\pi" in found
    texts = []
    for text in (found, gold):
        bare = latex.without_degrees(text)
        texts.append(rf"({bare})\cdot\frac{{\pi}}{{180}}" if mixed and latex.has_degrees(text) else bare)
    return texts[0], texts[1]


def _rounded(found: str, gold_parsed: Any, gold: str) -> bool:
    """Whether the number `found` rounds the exact value of an expression."""
    value, number = symbolic.constant(gold_parsed), latex.number(found)
    if value is None or number is None or number.percent:
        return False
    return close(number, Number(value, "fraction", Fraction(0), 0, False, True), Fraction(1), strict=False)


def _rounded_gold(found_parsed: Any, gold: str) -> bool:
    """Whether the gold decimal rounds the exact value of the expression that was found."""
    number = latex.number(gold)
    value = symbolic.constant(found_parsed) if number else None
    if value is None or number is None or number.percent:
        return False
    return close(Number(value, "fraction", Fraction(0), 0, False, True), number, Fraction(1), strict=False)
