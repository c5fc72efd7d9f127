"""What follows an answer's number: units of the table below, money, scale words such as million, and things counted.

Nothing else is taken for a unit: what stands behind a number and is neither in the table nor a plain plural noun makes
the answer another one ("7 or 8", "12 factorial", "5 is wrong").
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

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
# base units: metre, gram, second, ampere, dollar, byte; names as written, plurals by rule
_WORDS: dict[str, tuple[str, str]] = {
    name: (dimensions, size)
    for dimensions, table in {
        "length": {"meter": "1", "metre": "1", "centimeter": "0.01", "centimetre": "0.01", "millimeter": "0.001",
                   "millimetre": "0.001", "kilometer": "1000", "kilometre": "1000", "inch": "0.0254",
                   "inches": "0.0254",
                   "foot": "0.3048", "feet": "0.3048", "yard": "0.9144", "mile": "1609.344", "micron": "1e-6",
                   "decimeter": "0.1", "nanometer": "1e-9", "micrometer": "1e-6", "angstrom": "1e-10"},
        "mass": {"gram": "1", "kilogram": "1000", "milligram": "0.001", "pound": "453.59237", "ounce": "28.349523125",
                 "ton": "907184.74", "tonne": "1000000", "kilo": "1000"},
        "time": {"second": "1", "minute": "60", "hour": "3600", "day": "86400", "week": "604800", "year": "31557600",
                 "month": "2629800", "millisecond": "0.001", "microsecond": "1e-6", "nanosecond": "1e-9"},
        "dollar": {"dollar": "1", "cent": "0.01", "buck": "1", "penny": "0.01", "pennies": "0.01", "nickel": "0.05",
                   "dime": "0.1", "quarter": "0.25", "usd": "1"},
        "euro": {"euro": "1", "eur": "1"}, "sterling": {"sterling": "1", "gbp": "1"}, "yen": {"yen": "1"},
        "rupee": {"rupee": "1"}, "yuan": {"yuan": "1"}, "peso": {"peso": "1"},
        "length^3": {"liter": "0.001", "litre": "0.001", "milliliter": "1e-6", "millilitre": "1e-6",
                     "gallon": "0.003785411784", "quart": "0.000946352946", "pint": "0.000473176473"},
        "length^2": {"acre": "4046.8564224", "hectare": "10000"},
        "length time^-1": {"mph": "0.44704", "kph": "5/18", "knot": "463/900"},
        "degree": {"degree": "1", "deg": "1"}, "radian": {"radian": "1", "rad": "1"},
        "kelvin": {"kelvin": "1"}, "celsius": {"celsius": "1"}, "fahrenheit": {"fahrenheit": "1"},
        "mass length time^-2": {"newton": "1000", "dyne": "0.01"},
        "mass length^2 time^-2": {"joule": "1000", "erg": "0.0001", "calorie": "4184",
                                  "electronvolt": "1.602176634e-16"},
        "mass length^2 time^-3": {"watt": "1000", "kilowatt": "1000000", "megawatt": "1e9", "horsepower": "745699.87"},
        "mass length^-1 time^-2": {"pascal": "1000", "bar": "1e8", "atm": "101325000", "atmosphere": "101325000"},
        "time^-1": {"hertz": "1", "kilohertz": "1000", "megahertz": "1e6", "rpm": "1/60"},
        "current": {"ampere": "1", "amp": "1", "milliampere": "0.001"},
        "current time": {"coulomb": "1"},
        "mass length^2 time^-3 current^-1": {"volt": "1000"},
        "mass length^2 time^-3 current^-2": {"ohm": "1000"},
        "mole": {"mole": "1", "mol": "1"}, "byte": {"byte": "1", "bit": "1/8", "kilobyte": "1000", "megabyte": "1e6",
                                                    "gigabyte": "1e9"},
        "decibel": {"decibel": "1"},
    }.items()
    for name, size in table.items()
}  # fmt: skip
_SYMBOLS: dict[str, tuple[str, str]] = {
    "in": _WORDS["inch"], "ft": _WORDS["foot"], "yd": _WORDS["yard"], "mi": _WORDS["mile"], "lb": _WORDS["pound"],
    "oz": _WORDS["ounce"], "sec": _WORDS["second"], "min": _WORDS["minute"], "h": _WORDS["hour"], "hr": _WORDS["hour"],
    "yr": _WORDS["year"], "cc": ("length^3", "1e-6"), "gal": _WORDS["gallon"], "degC": _WORDS["celsius"],
    "degF": _WORDS["fahrenheit"], "kmh": _WORDS["kph"], "cal": ("mass length^2 time^-2", "4.184"),
    "dB": _WORDS["decibel"], "kcal": _WORDS["calorie"], "kWh": ("mass length^2 time^-2", "3.6e9"),
    "ms": _WORDS["millisecond"], "kmph": _WORDS["kph"],
}  # fmt: skip
_PREFIXED = {  # with the prefixes of the international system
    "m": ("length", "1"), "g": ("mass", "1"), "s": ("time", "1"), "A": ("current", "1"), "K": ("kelvin", "1"),
    "N": ("mass length time^-2", "1000"), "J": ("mass length^2 time^-2", "1000"),
    "W": ("mass length^2 time^-3", "1000"), "Pa": ("mass length^-1 time^-2", "1000"), "Hz": ("time^-1", "1"),
    "V": ("mass length^2 time^-3 current^-1", "1000"), "C": ("current time", "1"),
    "F": ("mass^-1 length^-2 time^4 current^2", "0.001"), "T": ("mass time^-2 current^-1", "1000"),
    "H": ("mass length^2 time^-2 current^-2", "1000"), "L": ("length^3", "0.001"), "l": ("length^3", "0.001"),
    "eV": ("mass length^2 time^-2", "1.602176634e-16"), "mol": ("mole", "1"), "B": ("byte", "1"),
    "ohm": ("mass length^2 time^-3 current^-2", "1000"), "pc": ("length", "3.0856775814913673e16"),
}  # fmt: skip
_PREFIXES = {"": "1", "n": "1e-9", "µ": "1e-6", "m": "0.001", "c": "0.01", "d": "0.1", "k": "1000", "K": "1000",
             "M": "1e6", "G": "1e9", "T": "1e12", "p": "1e-12"}  # fmt: skip
_PREFIXED_SYMBOLS = {
    prefix + symbol: (dimensions, str(Fraction(size) * Fraction(factor)))
    for symbol, (dimensions, size) in _PREFIXED.items()
    for prefix, factor in _PREFIXES.items()
}
_SYMBOLS = _PREFIXED_SYMBOLS | _SYMBOLS
# that a bare text may end in without being a product of symbols
_KNOWN_BARE = {"cm", "km", "kg", "mm", "ft", "hr", "hrs", "lb", "lbs", "oz", "yd", "mph", "kph", "min", "mins", "sec",
               "secs", "in", "mi"}  # fmt: skip
_SCALES = {
    "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "quadrillion": 10**15,
    "dozen": 12, "score": 20, "gross": 144,
}  # fmt: skip
_POWERS = {"square": 2, "squared": 2, "sq": 2, "cubic": 3, "cubed": 3, "cu": 3}
_BEHIND = {"long", "tall", "wide", "high", "deep", "away", "old", "each", "total", "apart", "ago", "later", "exactly",
           "only", "altogether", "left", "remaining", "more", "sterling"}  # fmt: skip
_IRREGULAR = {"people", "children", "men", "women", "mice", "geese", "sheep", "fish", "dice", "teeth", "vertices",
              "matrices", "indices", "axes", "unit", "pairs", "integer", "solution", "way"}  # fmt: skip
# what makes another answer of the number before it
_NO_NOUN = set(
    "or and plus minus times is are was not no but than less more fewer if when choose factorial over of by to "
    "from modulo mod squared cubed power root percent half halves third thirds fourths fifths sixths sevenths "
    "eighths ninths tenths quarters hundredths thousandths hundreds thousands millions billions dozens "
    "scores divided multiplied degrees as maybe perhaps wrong impossible possibly approximately between either "
    "neither nor except without with which because since radians one two three four five six seven eight nine ten "
    "eleven twelve first second zeros digits zeroes bases twice thrice double triple negative positive false true "
    "otherwise versus vs yes".split()
)
_TOKEN = re.compile(r"[A-Za-zµ]+|\^\s*-?\s*\d+|/|[^\s.]")


@lru_cache(maxsize=2048)
def parse(text: str) -> Unit | None:
    """Return the unit that a text is, in LaTeX or plain; None when it is none."""
    tokens = _TOKEN.findall(_plain(text))
    scale = Fraction(math.prod(_SCALES.get(token.lower(), 1) for token in tokens))
    rest = [token for token in tokens if token.lower() not in _SCALES]
    if rest and scale != 1 and rest[0] == "of":
        rest = rest[1:]
    if not rest:
        return Unit(scale=scale) if scale != 1 else None
    measured = _measured(rest)
    if measured:
        return Unit(measured[0], measured[1], scale, measured[2])
    return Unit(scale=scale, name=" ".join(rest).lower()) if _counted(rest) else None


def _plain(text: str) -> str:
    for pattern, by in _PLAIN:
        text = pattern.sub(by, text)
    return text


_PLAIN = tuple(
    (re.compile(pattern), by)
    for pattern, by in (
        (r"\^\s*\{?\s*\\circ\s*\}?\s*(?:\\text)?\s*\{?\s*([CF])\b\}?", r" deg\1 "),
        (r"degrees?\s+(celsius|fahrenheit)", r"\1"),
        (r"\\text", " "),
        (r"\\(?:cdot|times|,)", " "),
        (r"\\mu\s*\{?\s*", "µ"),
        (r"(?:(?<=[kMmµ])\}?\s*)?\\Omega", "ohm "),
        (r"\\%", " percent "),
        (r"\\frac\s*\{((?:[^{}]|\{[^{}]*\})*)\}\s*\{((?:[^{}]|\{[^{}]*\})*)\}", r"\1 / \2"),
        (r"µ\s+", "µ"),
        (r"a\.\s*m\.|p\.\s*m\.", "@"),
        (r"[()]", " "),
        (r"[{}]|\bper\b(?=\s)", lambda match: "/" if match[0] == "per" else " "),
        (r"-(?=[a-zA-Z])", " "),
    )
)


def _known(word: str) -> tuple[str, str] | None:
    lower = word.lower()
    for name, table in ((word, _SYMBOLS), (lower, _WORDS), (lower.removesuffix("s"), _WORDS)):
        if name in table:
            return table[name]
    if len(word) > 1:
        return _SYMBOLS.get(lower) or (_SYMBOLS.get(lower.removesuffix("s")) if len(word) > 2 else None)
    return None


def _measured(tokens: list[str]) -> tuple[Dimensions, Fraction, str] | None:
    """Dimensions and size of what consists of known units; the name "units" for the unit that fits all."""
    powers: dict[str, int] = {}
    size, sign, pending, last = Fraction(1), 1, 1, None
    generic = False
    for position, token in enumerate(tokens):
        lower = token.lower()
        if token == "/":
            sign = -1
        elif token.startswith("^") and last:
            exponent = int(token[1:].replace(" ", ""))
            size *= _add(powers, last, sign * (exponent - 1))
        elif lower in _POWERS:
            if lower.endswith("d") and last:
                size *= _add(powers, last, sign * (_POWERS[lower] - 1))
            else:
                pending = _POWERS[lower]
        elif lower in ("unit", "units"):
            generic, last = True, ("", "1")
        elif last and lower in _BEHIND:
            continue
        elif last and lower in ("and", "in") and tokens[position + 1 :] and tokens[position + 1].lower() in _BEHIND:
            continue
        elif sign < 0 and (lower in ("a", "an", "the", "each") or not _known(token)) and lower.isalpha():
            if lower not in ("a", "an", "the", "each"):
                if lower in _NO_NOUN or len(lower) < 3:
                    return None
                size *= _add(powers, (f"one {lower.removesuffix('s')}", "1"), -pending)
                last, pending = ("", "1"), 1
        else:
            known = _known(token)
            if known is None:
                return None
            size *= _add(powers, known, sign * pending)
            last, pending = known, 1
    if generic and not powers:
        return (), Fraction(1), "units"
    dimensions = tuple(sorted((name, power) for name, power in powers.items() if power))
    return (dimensions, size, "") if last and last[0] and dimensions or powers else None


def _add(powers: dict[str, int], unit: tuple[str, str], times: int) -> Fraction:
    if times == 0 or abs(times) > 9:
        return Fraction(1)
    names = unit[0] if not unit[0].startswith("one ") else unit[0].replace(" ", "_")
    for part in names.split():
        name, _, power = part.partition("^")
        powers[name] = powers.get(name, 0) + times * int(power or 1)
    return Fraction(unit[1]) ** times


def _counted(tokens: list[str]) -> bool:
    """Whether the words can be what is counted: a plural noun, with at most three words before or behind it."""
    words = [token.lower() for token in tokens]
    if len(words) > 4 or not all(re.fullmatch(r"[a-z]{3,}", word) for word in words if word not in ("a", "in", "per")):
        return False
    if words == ["times"]:
        return True
    if any(word in _NO_NOUN for word in words):
        return False
    return any(word.endswith("s") and not word.endswith("ss") or word in _IRREGULAR for word in words)


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
    if match:
        words = re.findall(r"[a-zA-Zµ]+", match["unit"])
        if (
            letters
            or (len(match["first"]) > 2 or match["first"] in _KNOWN_BARE)
            and all(len(word) > 2 or word in _KNOWN_BARE or i for i, word in enumerate(words))
        ):
            unit = parse(match["unit"]) or _one_of(text[: match.start()], words)
            if unit and text[: match.start()].strip():
                return text[: match.start()].strip(), unit
    return text, None


def _one_of(value: str, words: list[str]) -> Unit | None:
    """What a single one is counted of."""
    is_noun = len(words) == 1 and len(words[0]) > 2 and words[0].lower() not in _NO_NOUN
    return (
        Unit(name=words[0].lower())
        if value.strip() == "1" and is_noun and _SCALES.get(words[0].lower()) is None
        else None
    )


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
