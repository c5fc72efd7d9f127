"""Sets of real numbers: intervals, unions, inequalities in one letter, the reals without some points."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from megatron_rl.grading import latex

Same = Callable[[str, str], bool]


@dataclass(frozen=True)
class Interval:
    """Two ends, each included with a square bracket."""

    opening: str
    low: str
    high: str
    closing: str


@dataclass(frozen=True)
class Region:
    """Members, of which a text is a point; `name`: of the variable, "" when none is named."""

    name: str
    members: tuple[Interval | str, ...]

    @property
    def only_points(self) -> bool:
        """Whether no interval is among the members."""
        return all(isinstance(member, str) for member in self.members)


_MARK = re.compile(r"^\]|[<>|]|\\(?:le|ge|ne|in|cup|infty|emptyset|setminus|mathbb)(?![a-zA-Z])| or |all real|\\\{")
_JOINED = re.compile(r"\\cup(?![a-zA-Z])|,?\s+or\s+")
_BOTH = re.compile(r",?\s+and\s+")
_SIGN = re.compile(r"<|>|=|\\(?:le|ge|ne)(?![a-zA-Z])")
_NAME = re.compile(r"\\?[a-zA-Z]+(?:_\{?\w+\}?)?")
_MEMBER = re.compile(r"(?P<name>\\?[a-zA-Z]+(?:_\{?\w+\}?)?)\s*\\in(?![a-zA-Z])\s*(?P<set>.+)", re.S)
_BRACKETS = re.compile(r"(?P<opening>[(\[\]])(?P<inner>.+)(?P<closing>[)\]\[])", re.S)
_MODULUS = re.compile(r"\|\s*(?P<name>\\?[a-zA-Z]+)\s*(?:(?P<sign>[+-])\s*(?P<shift>[^|]+))?\|")
_REALS = re.compile(r"\\mathbb\s*\{?\s*R\s*\}?|(?:\\text\{\s*)?(?:the set of )?all reals?(?: numbers?)?\s*\}?")
_POSITIVE = re.compile(r"\\mathbb\s*\{?\s*R\s*\}?\s*(?:\^\{?\s*\+\s*\}?|_\{?\s*(?:>\s*0|\+)\s*\}?)")
_ALL_BUT = re.compile(
    r"(?:\\mathbb\s*\{?\s*R\s*\}?\s*\\setminus\s*"
    r"|(?:\\text\{\s*)?all reals?(?: numbers?)? except(?: for)?\s*\}?\s*)(?P<points>.+)"
)
_OPEN, _CLOSED = {"<": ("(", ")"), ">": ("(", ")")}, ("[", "]")
_MIRRORED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}
_EVERYTHING = Interval("(", "-\\infty", "\\infty", ")")


def read(text: str) -> Region | None:
    """Return the region that a cleaned text describes; None when it is something else."""
    if not _MARK.search(text):
        return None
    name = ""
    members: list[Interval | str] = []
    for piece in latex.split_at(text, _JOINED):
        region = _piece(piece)
        if region is None or (name and region.name and name != region.name):
            return None
        name = name or region.name
        members += region.members
    return Region(name, tuple(members))


def plain(text: str) -> Region | None:
    """Return what brackets alone say, without any sign of a set of numbers: an interval, or points of a list."""
    items = latex.parts(text)
    pieces = [_bracketed(item) for item in items.items] if not items.opening else []
    if len(pieces) > 1 and all(pieces) and re.search(r"\\infty|[\[\]]", text):
        return Region("", tuple(member for piece in pieces if piece for member in piece.members))
    return _bracketed(text) or _listed(text)


def _piece(text: str) -> Region | None:
    text = text.strip()
    member = _MEMBER.fullmatch(text)
    if member and _NAME.fullmatch(member["name"]):
        inner = _piece(member["set"])
        return Region(member["name"], inner.members) if inner else None
    if _REALS.fullmatch(text):
        return Region("", (_EVERYTHING,))
    if _POSITIVE.fullmatch(text):
        return Region("", (Interval("(", "0", "\\infty", ")"),))
    without = _ALL_BUT.fullmatch(text)
    if without:
        return _without(latex.parts(without["points"].strip()).items)
    if text.strip() == "\\emptyset":
        return Region("", ())
    if text.startswith("\\{") and text.endswith("\\}"):
        condition = latex.clean(text)
        return _piece(condition) if condition != text and _SIGN.search(condition) else _listed(text)
    both = latex.split_at(text, _BOTH)
    if len(both) == 2 and all(_SIGN.search(part) for part in both):
        return _both(_piece(both[0]), _piece(both[1]))
    return _bracketed(text) or _inequality(text)


def _listed(text: str) -> Region | None:
    found = latex.parts(text)
    return Region("", found.items) if found.opening in ("", "\\{") and found.items else None


def _bracketed(text: str) -> Region | None:
    match = _BRACKETS.fullmatch(text)
    ends = latex.split(match["inner"], ",;") if match else []
    if match is None or len(ends) != 2 or latex.split(text, ",;") != [text] and match["opening"] != "]":
        return None
    if match["opening"] != "]" and match["closing"] == "[":
        return None
    opening = "(" if match["opening"] == "]" else match["opening"]
    closing = ")" if match["closing"] == "[" else match["closing"]
    return Region("", (Interval(opening, ends[0], ends[1], closing),))


def _without(points: tuple[str, ...]) -> Region | None:
    """The reals without one point; several would have to be put in order."""
    if len(points) != 1:
        return None
    return Region(
        "", (Interval("(", "-\\infty", points[0], ")"), Interval("(", points[0], "\\infty", ")"))
    )  # fmt: skip


def _inequality(text: str) -> Region | None:
    signs = [match[0] for match in _SIGN.finditer(text)]
    sides = [side.strip() for side in _SIGN.split(text)]
    if len(signs) == 2 and all(sides) and _NAME.fullmatch(sides[1]):
        if signs[0] in (">", "\\ge"):
            signs, sides = [_MIRRORED.get(sign, "") for sign in reversed(signs)], sides[::-1]
        if not all(sign in ("<", "\\le") for sign in signs):
            return None
        return Region(sides[1], (Interval(_end(signs[0])[0], sides[0], sides[2], _end(signs[1])[1]),))
    if len(signs) != 1 or not all(sides):
        return None
    (left, right), sign = sides, signs[0]
    modulus = _MODULUS.fullmatch(left)
    if modulus and sign in _MIRRORED:
        return _about(modulus, sign, right)
    if not _NAME.fullmatch(left) and _NAME.fullmatch(right) and not _has_name(left, right):
        left, right, sign = right, left, _MIRRORED.get(sign, sign)
    if not _NAME.fullmatch(left) or _NAME.fullmatch(right) and right != "\\infty" and right != "\\pi":
        return None
    if _has_name(right, left):
        return None
    if sign == "=":
        return Region(left, (right,))
    if sign == "\\ne":
        region = _without((right,))
        return Region(left, region.members) if region else None
    if sign in ("<", "\\le"):
        return Region(left, (Interval("(", "-\\infty", right, _end(sign)[1]),))
    return Region(left, (Interval(_end(sign)[0], right, "\\infty", ")"),))


def _has_name(text: str, name: str) -> bool:
    return re.search(rf"(?<![a-zA-Z\\]){re.escape(name)}(?![a-zA-Z])", text) is not None


def _end(sign: str) -> tuple[str, str]:
    return _OPEN.get(sign, _CLOSED)


def _about(modulus: re.Match[str], sign: str, radius: str) -> Region:
    """|x - a| < r and its kin."""
    shift = modulus["shift"]
    middle = "" if shift is None else f"({shift.strip()})" if modulus["sign"] == "-" else f"-({shift.strip()})"
    low = f"{middle}-({radius})"
    high = f"{middle}+({radius})" if middle else radius
    opening, closing = _end(sign)
    if sign in ("<", "\\le"):
        return Region(modulus["name"], (Interval(opening, low, high, closing),))
    return Region(
        modulus["name"], (Interval("(", "-\\infty", low, closing), Interval(opening, high, "\\infty", ")"))
    )  # fmt: skip


def _both(a: Region | None, b: Region | None) -> Region | None:
    """The intersection of a ray to the right with one to the left."""
    if a is None or b is None or a.name != b.name or len(a.members) != 1 or len(b.members) != 1:
        return None
    first, second = a.members[0], b.members[0]
    if not isinstance(first, Interval) or not isinstance(second, Interval):
        return None
    if first.high != "\\infty":
        first, second = second, first
    if first.high != "\\infty" or second.low != "-\\infty":
        return None
    return Region(a.name, (Interval(first.opening, first.low, second.high, second.closing),))


def same(found: Region, gold: Region, compare: Same) -> bool:
    """Return whether each member of one is a member of the other, both ways; the variables' names must not differ."""
    if found.name and gold.name and found.name != gold.name:
        return False

    def equal(a: Interval | str, b: Interval | str) -> bool:
        if isinstance(a, str) or isinstance(b, str):
            return isinstance(a, str) and isinstance(b, str) and compare(a, b)
        brackets = (a.opening, a.closing) == (b.opening, b.closing)
        return brackets and compare(a.low, b.low) and compare(a.high, b.high)

    return all(any(equal(a, b) for b in gold.members) for a in found.members) and all(
        any(equal(a, b) for a in found.members) for b in gold.members
    )
