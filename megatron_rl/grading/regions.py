"""Sets of real numbers: intervals, unions, inequalities in one letter, the reals without some points."""

import re
from dataclasses import dataclass

from megatron_rl.grading import latex
from megatron_rl.grading.latex import Same


@dataclass(frozen=True)
class Interval:
    """Two ends, and whether each belongs to it."""

    low: str
    high: str
    has_low: bool = False
    has_high: bool = False


@dataclass(frozen=True)
class Region:
    """Members, of which a text is a point; `name`: of the variable, "" when none is named."""

    members: tuple[Interval | str, ...]
    name: str = ""


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
UPSIDE_DOWN = {">": "<", "\\ge": "\\le"}
_MIRRORED = UPSIDE_DOWN | {"<": ">", "\\le": "\\ge"}


def read(text: str) -> Region | None:
    """Return the region that a cleaned text describes; None when it is something else."""
    return _union([_piece(piece) for piece in latex.split_at(text, _JOINED)]) if _MARK.search(text) else None


def plain(text: str) -> Region | None:
    """Return what brackets alone say, without any sign of a set of numbers: an interval, or points of a list."""
    items = latex.parts(text)
    union = None
    if not items.opening and len(items.items) > 1 and re.search(r"\\infty|[\[\]]", text):
        union = _union([_bracketed(item) for item in items.items])
    return union or _bracketed(text) or _listed(text)


def _union(pieces: list[Region | None]) -> Region | None:
    """The members of all; None when a piece is no region, or when two name different variables."""
    regions = [piece for piece in pieces if piece]
    names = {region.name for region in regions if region.name}
    if len(regions) < len(pieces) or len(names) > 1:
        return None
    return Region(tuple(member for region in regions for member in region.members), "".join(names))


def _piece(text: str) -> Region | None:
    text = text.strip()
    member = _MEMBER.fullmatch(text)
    if member:
        inner = _piece(member["set"])
        return Region(inner.members, member["name"]) if inner else None
    if _REALS.fullmatch(text):
        return Region((Interval("-\\infty", "\\infty"),))
    if _POSITIVE.fullmatch(text):
        return Region((Interval("0", "\\infty"),))
    without = _ALL_BUT.fullmatch(text)
    if without:
        points = latex.parts(without["points"].strip()).items
        return _without(points[0]) if len(points) == 1 else None  # several would have to be put in order
    if text == "\\emptyset":
        return Region(())
    if text.startswith("\\{") and text.endswith("\\}"):
        condition = latex.clean(text)
        return _piece(condition) if condition != text and _SIGN.search(condition) else _listed(text)
    both = latex.split_at(text, _BOTH)
    if len(both) == 2 and all(_SIGN.search(part) for part in both):
        return _both(_piece(both[0]), _piece(both[1]))
    return _bracketed(text) or _inequality(text)


def _listed(text: str) -> Region | None:
    points = latex.parts(text)
    return Region(points.items) if points.opening in ("", "\\{") and points.items else None


def _bracketed(text: str) -> Region | None:
    match = _BRACKETS.fullmatch(text)
    ends = latex.split(match["inner"], ",;") if match else []
    if match is None or len(ends) != 2 or latex.split(text, ",;") != [text] and match["opening"] != "]":
        return None
    if match["opening"] != "]" and match["closing"] == "[":
        return None
    return Region((Interval(ends[0], ends[1], match["opening"] == "[", match["closing"] == "]"),))


def _without(point: str, name: str = "") -> Region:
    """The reals without one point."""
    return Region((Interval("-\\infty", point), Interval(point, "\\infty")), name)


def _inequality(text: str) -> Region | None:
    signs = _SIGN.findall(text)
    sides = [side.strip() for side in _SIGN.split(text)]
    if len(signs) == 2 and all(sides) and _NAME.fullmatch(sides[1]):
        if signs[0] in UPSIDE_DOWN:
            signs, sides = [UPSIDE_DOWN.get(sign, "") for sign in reversed(signs)], sides[::-1]
        if not all(sign in ("<", "\\le") for sign in signs):
            return None
        return Region((Interval(sides[0], sides[2], signs[0] == "\\le", signs[1] == "\\le"),), sides[1])
    if len(signs) != 1 or not all(sides):
        return None
    (left, right), sign = sides, signs[0]
    modulus = _MODULUS.fullmatch(left)
    if modulus and sign in _MIRRORED:
        return _about(modulus, sign, right)
    if not _NAME.fullmatch(left) and _NAME.fullmatch(right) and not _has_name(left, right):
        left, right, sign = right, left, _MIRRORED.get(sign, sign)
    if not _NAME.fullmatch(left) or _NAME.fullmatch(right) and right not in ("\\infty", "\\pi"):
        return None
    if _has_name(right, left):
        return None
    if sign == "=":
        return Region((right,), left)
    if sign == "\\ne":
        return _without(right, left)
    if sign in UPSIDE_DOWN:
        return Region((Interval(right, "\\infty", has_low=sign == "\\ge"),), left)
    return Region((Interval("-\\infty", right, has_high=sign == "\\le"),), left)


def _has_name(text: str, name: str) -> bool:
    return re.search(rf"(?<![a-zA-Z\\]){re.escape(name)}(?![a-zA-Z])", text) is not None


def _about(modulus: re.Match[str], sign: str, radius: str) -> Region:
    """|x - a| < r and its kin."""
    shift = modulus["shift"]
    middle = "" if shift is None else f"({shift.strip()})" if modulus["sign"] == "-" else f"-({shift.strip()})"
    low = f"{middle}-({radius})"
    high = f"{middle}+({radius})" if middle else radius
    if sign in UPSIDE_DOWN:
        has_end = sign == "\\ge"
        outside = (Interval("-\\infty", low, has_high=has_end), Interval(high, "\\infty", has_low=has_end))
        return Region(outside, modulus["name"])
    return Region((Interval(low, high, sign == "\\le", sign == "\\le"),), modulus["name"])


def _both(a: Region | None, b: Region | None) -> Region | None:
    """The intersection of a ray to the right with one to the left."""
    if a is None or b is None or a.name != b.name:
        return None
    for first, second in ((a.members, b.members), (b.members, a.members)):
        match first, second:
            case (Interval(high="\\infty") as right,), (Interval(low="-\\infty") as left,):
                return Region((Interval(right.low, left.high, right.has_low, left.has_high),), a.name)
    return None


def same(found: Region, gold: Region, compare: Same) -> bool:
    """Return whether each member of one is a member of the other, both ways; the variables' names must not differ."""
    if found.name and gold.name and found.name != gold.name:
        return False

    def equal(a: Interval | str, b: Interval | str) -> bool:
        if isinstance(a, str) or isinstance(b, str):
            return isinstance(a, str) and isinstance(b, str) and compare(a, b)
        ends = (a.has_low, a.has_high) == (b.has_low, b.has_high)
        return ends and compare(a.low, b.low) and compare(a.high, b.high)

    return all(any(equal(a, b) for b in gold.members) for a in found.members) and all(
        any(equal(a, b) for a in found.members) for b in gold.members
    )
