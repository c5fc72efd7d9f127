"""What follows an answer's number: units of the table below, money, scale words such as million, and things counted.

Nothing else is taken for a unit: what stands behind a number and is neither in the table nor a plain plural noun makes
the answer another one ("7 or 8", "12 factorial", "5 is wrong").
"""

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from megatron_rl.files import read_asset

Dimensions = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Unit:
    """Dimensions with their exponents, and the size in base units; `scale`: of thousand, dozen and the like.

    Without dimensions it is a thing counted: `name` is what was written, "units" for the unit that fits all.
    """

    dimensions: Dimensions = ()
    size: Fraction = Fraction(1)
    scale: Fraction = Fraction(1)
    name: str = ""


DEGREE = Unit((("degree", 1),))
_WORDS = read_asset(__file__, "units.yaml")
_ROWS = [
    (name, dimensions, Fraction(size))
    for dimensions, sizes in _WORDS["units"].items()
    for size, *names in map(str.split, sizes.split(","))
    for name in names
]
_UNITS = {
    prefix + name[1:]: (dimensions, size * Fraction(factor))
    for name, dimensions, size in _ROWS
    if name.startswith("*")
    for prefix, factor in _WORDS["prefixes"].items()
} | {name.lstrip("*"): (dimensions, size) for name, dimensions, size in _ROWS}  # dB is no tenth of a byte
_SCALES, _POWERS = _WORDS["scales"], _WORDS["powers"]
_NOTHING = ("", Fraction(1))  # the dimensions and size of what is only counted
_BARE_UNITS, _BEHIND, _IRREGULAR, _NO_NOUN = (
    frozenset(_WORDS[name].split()) for name in ("bare", "behind", "irregular", "no_noun")
)
_TOKEN = re.compile(r"[A-Za-zµ]+|\^\s*-?\s*\d+|/|[^\s.]")
_PLAIN = [(re.compile(pattern), by) for pattern, by in _WORDS["rewrites"]]


@lru_cache(maxsize=2048)
def parse(text: str) -> Unit | None:
    """Return the unit that a text is, in LaTeX or plain; None when it is none."""
    for pattern, by in _PLAIN:
        text = pattern.sub(by, text)
    tokens = _TOKEN.findall(text)
    scale = Fraction(math.prod(_SCALES.get(token.lower(), 1) for token in tokens))
    rest = [token for token in tokens if token.lower() not in _SCALES]
    if rest and scale != 1 and rest[0] == "of":
        rest = rest[1:]
    if not rest:
        return Unit(scale=scale) if scale != 1 else None
    return _measured(rest, scale) or (Unit(scale=scale, name=" ".join(rest).lower()) if _counted(rest) else None)


def _known(word: str) -> tuple[str, Fraction] | None:
    lower = word.lower()
    spellings = (word, lower, lower.removesuffix("s"))[: len(word)]  # one letter is itself, and two are no plural
    return next((_UNITS[spelling] for spelling in spellings if spelling in _UNITS), None)


def _measured(tokens: list[str], scale: Fraction) -> Unit | None:
    """The unit of what consists of known ones; "units" where only the unit that fits all occurs."""
    powers: dict[str, int] = {}
    size, sign, pending = Fraction(1), 1, 1
    last: tuple[str, Fraction] | None = None
    words = [token.lower() for token in tokens]
    for token, word, following in zip(tokens, words, [*words[1:], ""], strict=True):
        if token == "/":
            sign = -1
        elif token.startswith("^") and last:
            size *= _add(powers, last, sign * (int(token[1:].replace(" ", "")) - 1))
        elif word in _POWERS and word.endswith("d") and last:
            size *= _add(powers, last, sign * (_POWERS[word] - 1))
        elif word in _POWERS:
            pending = _POWERS[word]
        elif word in ("unit", "units"):
            last = _NOTHING
        elif last and (word in _BEHIND or word in ("and", "in") and following in _BEHIND):
            continue
        elif sign < 0 and word in ("a", "an", "the", "each"):
            continue
        elif known := _known(token):
            size *= _add(powers, known, sign * pending)
            last, pending = known, 1
        elif sign < 0 and word.isalpha() and word not in _NO_NOUN and len(word) > 2:
            size *= _add(powers, (f"one_{word.removesuffix('s')}", Fraction(1)), -pending)
            last, pending = _NOTHING, 1
        else:
            return None
    if not powers:
        return Unit(scale=scale, name="units") if "unit" in words or "units" in words else None
    return Unit(tuple(sorted((name, power) for name, power in powers.items() if power)), size, scale)


def _add(powers: dict[str, int], unit: tuple[str, Fraction], times: int) -> Fraction:
    """Count the unit's dimensions so many times more; what the size grows by."""
    if abs(times) > 9:
        return Fraction(1)
    for part in unit[0].split():
        name, _, power = part.partition("^")
        powers[name] = powers.get(name, 0) + times * int(power or 1)
    return unit[1] ** times


def _counted(tokens: list[str]) -> bool:
    """Whether the words can be what is counted: a plural noun, with at most three words before or behind it."""
    words = [token.lower() for token in tokens]
    if len(words) > 4 or not all(re.fullmatch(r"[a-z]{3,}|a|in|per", word) for word in words):
        return False
    has_noun = any(word.endswith("s") and not word.endswith("ss") or word in _IRREGULAR for word in words)
    return words == ["times"] or has_noun and _NO_NOUN.isdisjoint(words)


_TEXT = r"\\text\s*\{(?:[^{}]|\{[^{}]*\})*\}"
_POWER = r"\s*\^\s*\{?\s*-?\s*\d\s*\}?"
_ITEM = rf"(?:{_TEXT}|\\mu(?![a-z])\s*(?:[a-zA-Z](?![a-zA-Z]))?|\\Omega(?![a-z]))(?:{_POWER})?"
_FRACTION = rf"\\frac\s*\{{\s*{_ITEM}(?:\s*{_ITEM})*\s*\}}\s*\{{\s*{_ITEM}(?:\s*{_ITEM})*\s*\}}"
_CELSIUS = r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)\s*(?:\\text\s*\{\s*[CF]\s*\}|[CF](?![a-zA-Z]))"
_SUFFIX = re.compile(
    rf"(?:\s|\\cdot(?![a-z])|/)*(?:{_CELSIUS}|{_FRACTION}|{_ITEM})(?:(?:\s|\\cdot(?![a-z])|\\times(?![a-z])|/)*"
    rf"(?:{_FRACTION}|{_ITEM}|1(?=/)))*\s*$"
)
_BARE = re.compile(
    r"(?:(?<=[\d})\]%])|(?<=\\pi)|(?<=\\pi\s))\s*(?P<unit>(?P<first>[a-zA-Zµ]+)\.?(?:\s*\^\s*\{?\s*-?\d\s*\}?)?"
    r"(?:(?:\s*/\s*|\s+|-|\s*\\cdot\s*)[a-zA-Z]+\.?(?:\s*\^\s*\{?\s*-?\d\s*\}?)?)*)$"
)


def split_unit(text: str, *, letters: bool = False) -> tuple[str, Unit | None]:
    """Return a cleaned text without the unit at its end, and the unit; the text as it is and None when it has none.

    `letters`: symbols such as m are units, not variables.
    """
    if "\\text" in text or "\\mu" in text or "\\Omega" in text or "\\circ" in text:
        match = _SUFFIX.search(text)
        if match and text[: match.start()].strip():
            unit = parse(match.group())
            return (text[: match.start()].strip(), unit) if unit else (text, None)
    match = _BARE.search(text) if text[-1:].isalpha() or text[-1:] in "}0123456789." else None
    if match and (letters or len(match["first"]) > 2 or match["first"] in _BARE_UNITS):
        value = text[: match.start()].strip()
        words = re.findall(r"[a-zA-Zµ]+", match["unit"].lower())
        unit = parse(match["unit"])
        if unit is None and value == "1" and len(words) == 1 and len(words[0]) > 2 and words[0] not in _NO_NOUN:
            unit = Unit(name=words[0])  # a single one of what is counted
        if unit and value:
            return value, unit
    return text, None


def ratio(found: Unit | None, gold: Unit | None) -> Fraction | None:
    """Return what to multiply the found number with, to have it in the gold's unit; None when they measure different
    things. A unit may be left out, and any unit may be added to a gold that has none."""
    scale = (found.scale if found else Fraction(1)) / (gold.scale if gold else Fraction(1))
    if found is None or gold is None or not (found.dimensions or found.name) or not (gold.dimensions or gold.name):
        return scale
    if "units" in (found.name, gold.name) or not found.dimensions and not gold.dimensions:
        return scale
    if {found.dimensions, gold.dimensions} == {DEGREE.dimensions, (("radian", 1),)}:
        return scale  # the values tell them apart
    return scale * found.size / gold.size if found.dimensions == gold.dimensions else None
