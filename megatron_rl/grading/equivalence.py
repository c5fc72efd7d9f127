"""Whether two answers are the same, by what both mean: the readings of the verifier `math` in their order.

The texts agree in one spelling; a notation of its own (choice, word, time, base); numbers with their units; sets of
numbers; lists, tuples and matrices, item by item; equations; expressions, compared exactly (grading/values.py). What no
reading understands is wrong unless the texts agree. docs/grading.md tells it at length.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial

from megatron_rl.grading import expression, latex, notations, regions, units, values
from megatron_rl.grading.grammar import Tree, Unreadable, holds, negative
from megatron_rl.grading.latex import Parts, Same
from megatron_rl.grading.numerals import Number, close, number

_LEAD_IN = re.compile(r"^\s*\\text\{[^{}]*(?:\b(?:is|are)|:|=)\s*\}")
_ASSIGNED = re.compile(r"(?P<name>[^=<>]*[^=<>!\\\s])\s*=(?P<value>[^=].*)", re.S)
_MEMBER = re.compile(r"(?P<name>[A-Za-z](?:_\{?\w+\}?)?|\\[a-z]+)\s*\\in(?![a-z])\s*(?P<value>.+)", re.S)
_QUALIFIER = re.compile(
    r",?\s*\\text\{\s*,?\s*(?:for|where|with)\s[^{}]*\}.*$|,?\s+(?:for (?:any|all|some|every)|where)\s.*$", re.S
)
_MATRIX = re.compile(
    r"(?P<factor>[^&]*?)\\begin\{(?P<kind>[pbB]?matrix|smallmatrix|array)\}(?:\s*\{[lcr|\s]+\})?(?P<body>.*)\\end\{(?P=kind)\}",
    re.S,
)
_NAME = re.compile(r"(?:\\?[A-Za-z]+'*)(?:_\{?[\w\\ {}]+\}?)?\s*(?:\([\w,\s\\]*\))?|\((?:\s*\w\s*,)+\s*\w\s*\)")
_NAMED_TUPLE = re.compile(r"\((?P<names>[\w\s,]+)\)\s*=\s*\((?P<items>.+)\)")
_SAID = re.compile(
    r"(?:(?:so|thus|hence) )?(?:the )?(?:final |correct )?(?:answer|option|choice)s?\s*(?:(?:is|are)\s|:|=)?\s*"
    r"(?=[\d(A-Z$\\-])",
    re.I,
)
_REMARK = re.compile(r"\s*\\text\{\s*\(?as (?:required|desired|expected|claimed|wanted|needed)\)?\s*\}$")
_RELATION = re.compile(r"<|>|=|\\(?:le|ge)(?![a-zA-Z])")
_INFINITY = re.compile(r"([+-]?)\s*\\infty")
_MAX_READ = 400  # characters


@dataclass(frozen=True)
class Policy:
    """What is a matter of taste: the options of `math`, and their defaults."""

    strict: bool = False
    rounding_digits: int = 5
    unevaluated: bool = False


def equal(found: str, gold: str, policy: Policy = Policy()) -> bool:  # noqa: B008  (frozen)
    """Return whether two answers are the same; see `math`. Both are single answers, not responses."""
    if len(found) > max(_MAX_READ, 4 * len(gold)):
        return False
    try:
        return _equal(latex.clean(found), latex.clean(gold), policy)
    except RecursionError:
        return False


def _equal(found: str, gold: str, policy: Policy) -> bool:
    if not found or not gold:
        return False
    if latex.compact(found) == latex.compact(gold):
        return True
    if len(gold) > latex.MAX_CLEANED:
        return False
    return _first(_verdicts(found, gold, policy, partial(_equal, policy=policy)))


@lru_cache(maxsize=4096)  # of nested sets each is compared both ways
def is_understood(text: str) -> bool:
    """Return whether a reading finds that a cleaned answer is itself; else only the same text is the same answer."""

    def same(item: str, _: str) -> bool:
        return item != text and is_understood(item.strip())

    return bool(text) and _first(_verdicts(text, text, Policy(), same))


def _first(verdicts: Iterator[bool | None]) -> bool:
    return next(verdict for verdict in verdicts if verdict is not None)


def _verdicts(found: str, gold: str, policy: Policy, same: Same) -> Iterator[bool | None]:
    """What each reading says, one after the other; None where it does not apply. `same` compares parts."""
    found = _SAID.sub("", found) if not _SAID.match(gold) else found
    for read in (notations.choice, notations.words, notations.base):
        yield read(found, gold)
    found, gold = _same_kind(found, gold)
    yield notations.time(found, gold)
    if ":" in found + gold:
        yield notations.ratio(found, gold, same)
    are_equal = _equal_quantities(found, gold, policy)
    if are_equal or not ("," in found and "," in gold):  # 1,200 may be a list
        yield are_equal
    yield _equal_regions(found, gold, same)
    yield _equal_parts(found, gold, same)
    yield _equal_relations(found, gold)
    yield _equal_expressions(found, gold, policy)


def _same_kind(found: str, gold: str) -> tuple[str, str]:
    """Both without what only one of them says: a name, a modulus, a rounding, a condition; with plus-minus expanded."""
    found = _REMARK.sub("", _LEAD_IN.sub("", found)).strip()
    if "\\approx" in found + gold:
        found, gold = _exact(found), _exact(gold)
    (a, modulus), (b, gold_modulus) = notations.without_modulus(found), notations.without_modulus(gold)
    if modulus == gold_modulus or not modulus or not gold_modulus:
        found, gold = a, b
    if ("text" in found + gold or " for " in found + gold or " where " in found + gold) and re.search(r"[a-z]", gold):
        found, gold = _QUALIFIER.sub("", found) or found, _QUALIFIER.sub("", gold) or gold
    found, gold = _by_name(found, gold), _by_name(gold, found)
    found, gold = _same_side(found, gold)
    return _signs_expanded(found), _signs_expanded(gold)


def _by_name(text: str, other: str) -> str:
    """(a, b) = (1, 2) as a = 1, b = 2 where the other text names each value."""
    match = _NAMED_TUPLE.fullmatch(text)
    if match is None or other.count("=") < 2:
        return text
    names, items = latex.split(match["names"], ","), latex.split(match["items"], ",")
    return ",".join(f"{n}={v}" for n, v in zip(names, items, strict=True)) if len(names) == len(items) else text


def _exact(text: str) -> str:
    """The left side of an approximation, unless it is only a name or nothing."""
    left, sign, right = text.partition("\\approx")
    left, right = left.strip(), right.strip()
    if not sign or left and number(units.split_unit(right)[0]) is None:
        return text
    return right if not left or _is_name(left) and not left.startswith("\\") else left


def _same_side(found: str, gold: str) -> tuple[str, str]:
    """Without the name of the quantity (x =, f(x) =, x in), where only one of them has it or both have the same."""
    if "=" not in found + gold and "\\in" not in found + gold:
        return found, gold
    found_name, found_value = _named(found)
    gold_name, gold_value = _named(gold)
    if found_name and not gold_name and "=" not in gold:
        last = found_value.rpartition("=")[2].strip()
        return last if last and last.count("{") == last.count("}") else found_value, gold
    if gold_name and not found_name and "=" not in found and _is_name(gold_name):
        return found, gold_value
    if found_name and gold_name and latex.compact(found_name) == latex.compact(gold_name):
        return found_value, gold_value
    return found, gold


def _named(text: str) -> tuple[str, str]:
    match = _MEMBER.fullmatch(text) or _ASSIGNED.fullmatch(text)
    if match is None or re.search(r"\\(?:le|ge|ne)(?![a-z])|[<>]|\bor\b|\band\b", text):
        return "", text
    if match["name"].count("{") != match["name"].count("}"):
        return "", text  # the = of a sum's limits
    value = latex.parts(match["value"].strip())
    if len(value.items) > 1 and not value.opening and ("=" in match["value"] or "," in match["name"]):
        return "", text
    return match["name"], match["value"].strip()


def _is_name(text: str) -> bool:
    """Whether the left side of an equation only names what the right side is."""
    return _NAME.fullmatch(text.strip()) is not None


def _signs_expanded(text: str) -> str:
    """With both signs of plus-minus as two items; in a list for each item that has it."""
    if "\\pm" not in text:
        return text
    parts = latex.parts(text)
    if parts.opening in ("", "\\{") and len(parts.items) > 1 or parts.opening == "\\{":
        inner = ",".join(_signs_expanded(item) for item in parts.items)
        return f"\\{{{inner}\\}}" if parts.opening else inner
    plus = re.sub(r"\\mp(?![a-z])", "-", re.sub(r"\\pm(?![a-z])", "+", text))
    minus = re.sub(r"\\mp(?![a-z])", "+", re.sub(r"\\pm(?![a-z])", "-", text))
    return ",".join(re.sub(r"^\s*\+", "", side) for side in (plus, minus))


def _split_units(found: str, gold: str) -> tuple[str, str, Fraction | None]:
    """Both without units, and what to multiply the found one with; None where they measure different things."""
    bare_gold, gold_unit = units.split_unit(gold)
    bare_found, found_unit = units.split_unit(found, letters=gold_unit is not None and bool(gold_unit.dimensions))
    if latex.has_degrees(gold) or latex.has_degrees(found):
        gold_unit, found_unit = (
            units.DEGREE if latex.has_degrees(text) else unit
            for text, unit in ((bare_gold, gold_unit), (bare_found, found_unit))
        )
    if gold_unit is None and found_unit is not None and found_unit.dimensions:
        bare_gold, gold_unit = units.split_unit(gold, letters="\\text" in gold)
    return bare_found, bare_gold, units.ratio(found_unit, gold_unit)


def _equal_quantities(found: str, gold: str, policy: Policy) -> bool | None:
    """The verdict on two numbers with or without units; None when one is no number."""
    whole = found + gold
    found, gold, scale = _split_units(found, gold)
    if latex.has_degrees(found) or latex.has_degrees(gold):
        if latex.has_degrees(gold) and "\\pi" in found or latex.has_degrees(found) and "\\pi" in gold:
            return None
        if "\\text" in whole and "rad" in whole:
            return False
        found, gold = latex.without_degrees(found), latex.without_degrees(gold)
    a, b = number(found), number(gold)
    if a is None or b is None:
        return None
    if scale is None:
        return False
    if policy.strict and (a.form == "integer") != (b.form == "integer"):
        return False
    if policy.strict and b.form == a.form == "fraction" and not a.reduced:
        return False
    if a.percent != b.percent and a.value != b.value:
        scale *= Fraction(1, 100) if a.percent else 100
    return close(a, b, scale, policy.rounding_digits)


def _equal_regions(found: str, gold: str, same: Same) -> bool | None:
    """The verdict on sets of real numbers, member by member; None when neither is one."""
    a, b = regions.read(found), regions.read(gold)
    if a and b:
        return regions.same(a, b, same)
    known, other = (a, gold) if a else (b, found)
    if known is None:
        return None
    only_points = all(isinstance(member, str) for member in known.members)
    plain = None if _RELATION.search(other) else regions.plain(other)
    if plain is None:
        return None if only_points else False
    if only_points and known.members and len(latex.parts(other).items) == 1 and not known.name:
        return None if len(known.members) == 1 else False
    return regions.same(a or plain, b or plain, same)


def _entries(text: str) -> list[list[str]] | None:
    """The entries of a matrix, row by row, each multiplied with the factor before it."""
    enclosed = re.fullmatch(r"[(\[]\s*(\\begin\{.*\})\s*[)\]]", text.strip(), re.S)
    match = _MATRIX.fullmatch(enclosed[1] if enclosed else text.strip())
    if match is None:
        return None
    rows = [row for row in re.split(r"\\\\", match["body"]) if row.strip()]
    factor = match["factor"].strip()
    if factor.endswith("=") or len(factor) > 60:
        return None
    return [[f"({factor})({cell.strip()})" if factor else cell.strip() for cell in row.split("&")] for row in rows]


def _equal_parts(found: str, gold: str, same: Same) -> bool | None:
    """The verdict on matrices, tuples, sets and lists; None when neither is one."""
    a, b = latex.parts(found), latex.parts(gold)
    matrices = _entries(found), _entries(gold)
    if any(matrices):
        return _equal_matrices(*matrices, a, b, same)
    if len(b.items) < 2 and len(a.items) < 2:
        if not a.items or not b.items or not a.opening and not b.opening:
            return None
        return same(a.items[0], b.items[0])
    if len(a.items) < 2 or len(b.items) < 2:
        joined = tuple(t if p.opening else _without_thousands(t) for t, p in ((found, a), (gold, b)))
        return None if joined != (found, gold) and len(latex.parts(joined[0]).items) == 1 else False
    if not _brackets_agree(a, b):
        return False
    if a.opening == b.opening == "\\{":
        is_within = all(any(same(x, y) for y in b.items) for x in a.items)
        return is_within and all(any(same(y, x) for x in a.items) for y in b.items)
    if len(a.items) != len(b.items):
        return False
    in_order = "\\{" not in (a.opening, b.opening) and bool(a.opening or b.opening)
    items, (names, gold_names) = a.items, ([_named(item)[0] for item in p.items] for p in (a, b))
    if all(gold_names) and len(set(gold_names)) == len(items) and not any(names):
        in_order = True  # 1, 2 against a = 1, b = 2
    elif in_order and all(names) and len(set(names)) == len(items) and not any(gold_names):
        items = tuple(item for _, item in sorted(zip(names, items, strict=True)))
    if in_order:
        return all(same(x, y) for x, y in zip(items, b.items, strict=True))
    left = list(b.items)
    for item in items:
        match = next((other for other in left if same(item, other)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _without_thousands(text: str) -> str:
    return re.sub(r"(?<![\d,.])(\d{1,3})((?:,\d{3})+)(?![\d,])", lambda m: m[1] + m[2].replace(",", ""), text)


def _equal_matrices(
    a: list[list[str]] | None, b: list[list[str]] | None, parts: Parts, gold_parts: Parts, same: Same
) -> bool:
    """Entry by entry; a tuple stands for a row or a column where only one of them is a matrix."""
    if a is None or b is None:
        matrix, other = (a, gold_parts) if a is not None else (b or [], parts)
        is_line = len(matrix) == 1 or all(len(row) == 1 for row in matrix)
        if not is_line or other.opening not in ("(", "[", "\\langle"):
            return False
        line = [cell for row in matrix for cell in row]
        a, b = ([line], [list(other.items)]) if a is not None else ([list(other.items)], [line])
    same_shape = [len(row) for row in a] == [len(row) for row in b]
    return same_shape and all(same(x, y) for r, s in zip(a, b, strict=True) for x, y in zip(r, s, strict=True))


def _brackets_agree(a: Parts, b: Parts) -> bool:
    if not a.opening or not b.opening:
        # a list may leave out the brackets of a set or a tuple, never those of an interval
        present = a if a.opening else b
        return present.opening != "[" and present.closing != "]" or present.opening == "[" and len(present.items) > 2
    return (a.opening, a.closing) == (b.opening, b.closing) or {a.opening, b.opening} == {"(", "\\langle"}


def _equal_relations(found: str, gold: str) -> bool | None:
    """The verdict on equations and inequalities, one being a multiple of the other; None when neither is one."""
    relations = [_RELATION.findall(text) for text in (found, gold)]
    if not any(relations) or re.search(r"\\(?:sum|prod)(?![a-z])", found + gold):
        return None
    if [len(signs) for signs in relations] != [1, 1]:
        return False
    kinds, trees = [], []
    try:
        for text, (sign,) in zip((found, gold), relations, strict=True):
            small, large = _RELATION.split(text)
            if sign in regions.UPSIDE_DOWN:
                small, large, sign = large, small, regions.UPSIDE_DOWN[sign]
            kinds.append(sign)
            trees.append(("add", expression.read(small.strip()), negative(expression.read(large.strip()))))
    except Unreadable:
        return False
    return kinds[0] == kinds[1] and values.same_relation(*trees, positive=kinds[0] != "=")


def _equal_expressions(found: str, gold: str, policy: Policy) -> bool:
    infinite = [_INFINITY.fullmatch(text) for text in (found, gold)]
    if any(infinite):
        return all(infinite) and len({m[1].replace("+", "") for m in infinite if m}) == 1
    found, gold, scale = _split_units(found, gold)
    if scale is None or len(found) > max(_MAX_READ, 4 * len(gold)):
        return False
    mixed = latex.has_degrees(found) and "\\pi" in gold or latex.has_degrees(gold) and "\\pi" in found
    angle = r"({})\cdot\frac{{\pi}}{{180}}" if mixed else "{}"  # degrees against radians
    found, gold = (
        angle.format(latex.without_degrees(text)) if latex.has_degrees(text) else text
        for text in (_without_thousands(found), _without_thousands(gold))
    )
    try:
        a, b = expression.read(found), expression.read(gold)
    except Unreadable:
        return False
    if not policy.unevaluated and holds(a, "range") and not holds(b, "range"):
        return False
    if scale != 1:
        a = ("mul", scale, a)
    return values.same(a, b) or bool(policy.rounding_digits) and _rounded(a, b, found, gold, scale, policy)


def _rounded(a: Tree, b: Tree, found: str, gold: str, scale: Fraction, policy: Policy) -> bool:
    """Whether one is a decimal that rounds the exact constant that the other is."""
    rounds_gold = number(found)
    written = rounds_gold or number(gold)
    if written is None or written.percent or not written.step:
        return False  # an exact number rounds nothing
    value = values.constant(b if rounds_gold else a)
    if value is None:
        return False
    pair = (written, Number(value), scale) if rounds_gold else (Number(value), written, Fraction(1))
    return close(*pair, policy.rounding_digits)
