"""Mathematical answers as text: one spelling for what LaTeX writes in many ways, numbers, units, lists and brackets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_WRAPPERS = (
    re.compile(r"\$\$([^$]*)\$\$", re.S),
    re.compile(r"\$([^$]*)\$", re.S),
    re.compile(r"\\\((.*)\\\)", re.S),
    re.compile(r"\\\[(.*)\\\]", re.S),
    re.compile(r"\*\*([^*]*)\*\*", re.S),
    re.compile(r"`([^`]*)`", re.S),
)
_COMMANDS_AROUND = re.compile(r"\\(?:boxed|fbox|text|textbf|textit|textrm|mathrm|mathbf|mbox|displaystyle)\s*\{")
_UNICODE = str.maketrans(
    {
        "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "π": r"\pi ",
        "∞": r"\infty ", "√": r"\sqrt ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ",
        "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "°": r"^\circ ", "∅": r"\emptyset ", "²": "^2", "³": "^3",
        "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "θ": r"\theta ", "α": r"\alpha ",
        "（": "(", "）": ")", "，": ",", "。": ".", "％": "%", "：": ":", "\u00a0": " ", "\u2009": " ", "\u202f": " ",
        "€": "", "£": "", "¥": "",
        "\x0c": r"\f",  # \frac in a text whose backslash was read as an escape
    }
)  # fmt: skip
_REPLACEMENTS = tuple(
    (re.compile(pattern), by)
    for pattern, by in (
        (r"\\(?:left|right|[bB]ig+[lr]?|displaystyle|textstyle|limits|hfill|allowbreak)(?![a-zA-Z])\.?", ""),
        (r"\\(?:d|t|c)frac", r"\\frac"),
        (r"\\(?:lbrack)(?![a-zA-Z])", "["),
        (r"\\(?:rbrack)(?![a-zA-Z])", "]"),
        (r"\\(?:lbrace)(?![a-zA-Z])", r"\\{"),
        (r"\\(?:rbrace)(?![a-zA-Z])", r"\\}"),
        (r"(?<=\d)\\,(?=\d{3}(?!\d))", ""),  # a thin space between groups of three digits
        (r"(?<=\d)(?:\{,\}|,\\!|\\!,|\\,)\s*(?:\\!)?(?=\d{3}(?!\d))", ","),
        (r"\\!", ""),
        (r"\\(?:text)?color\s*\{[^{}]*\}", ""),
        (
            r"^\\\{\s*(\w+)\s*(?:\\mid|\||:)(?:\s*\1\s*\\in\s*\\mathbb\{?R\}?\s*,)?(.+)\\\}$",
            r"\2",
        ),  # a set by its condition
        (r"(?<!\\)\\(?:[,;:> ]|quad|qquad|enspace|thinspace)(?![a-zA-Z])|~", " "),
        (r"\\(?:\$|#|&)|\$", ""),
        (r"\\(?:operatorname|mathrm|mathbf|mathit|textbf|textit|textrm|textnormal|mbox)\s*\*?\s*\{", r"\\text{"),
        (r"\\(?:le|leq|leqslant|leqq)(?![a-zA-Z])|<=", r"\\le "),
        (r"\\(?:ge|geq|geqslant|geqq)(?![a-zA-Z])|>=", r"\\ge "),
        (r"\\(?:neq)(?![a-zA-Z])", r"\\ne "),
        (r"\\(?:approx|simeq|thickapprox)(?![a-zA-Z])|≈", r"\\approx "),
        (r"\\(?:varnothing)(?![a-zA-Z])", r"\\emptyset "),
        (r"(?<![\\a-zA-Z])(?:infinity|inf)(?![a-zA-Z])", r"\\infty "),
        (r"(?<![\\a-zA-Z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![\\a-zA-Z])sqrt(?![a-zA-Z])", r"\\sqrt"),
        (r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi "),
        (r"\*\*", "^"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
        (r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"),
        (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"),
        (r"\\%|%|(?<=\d)\s*(?:\\text\{\s*)?(?:per\s?cent|percent(?:age)?|pct)(?:\s*\})?", r"\\%"),
        (r"\\text\{\s*(?:,\s*)?(and|or)\s*\}", r" \1 "),
        (r"\s+", " "),
    )
)
_DEGREES = re.compile(
    r"\s*\^\s*(?:\{\s*\\(?:circ|degree)\s*\}|\\(?:circ|degree))|\\degree|(?<=[\d}])\s*(?:\\text\{\s*)?degrees?(?:\s*\})?"
)
_TRIGONOMETRIC = re.compile(r"\\?(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
_PAIRS = {"(": ")", "[": "]", "{": "}", "\\{": "\\}", "\\langle": "\\rangle"}


def clean(text: str) -> str:
    """The answer without wrapping (dollars, boxes, \\text, final stop), spacing and synonyms."""
    text = unwrap(_closed(text.translate(_UNICODE)))
    for pattern, by in _REPLACEMENTS:
        text = pattern.sub(by, text)
    if _TRIGONOMETRIC.search(text):
        text = re.sub(r"(\d+(?:\.\d+)?)" + _DEGREES.pattern, r"\\frac{\1\\pi}{180}", text)
    return unwrap(text)


def _closed(text: str) -> str:
    """With the closing braces that are missing at the end, as in some gold answers."""
    bare = re.sub(r"\\[\\{}]", "", text)
    return text + "}" * max(0, bare.count("{") - bare.count("}"))


def unwrap(text: str) -> str:
    """Without the delimiters, commands, braces and final stops that enclose the whole."""
    while True:
        before = text
        text = text.strip().rstrip(".,;: ").removesuffix("\\").strip()
        for pattern in _WRAPPERS:
            match = pattern.fullmatch(text)
            if match:
                text = match.group(1)
        command = _COMMANDS_AROUND.match(text)
        if command and matching_brace(text, command.end() - 1) == len(text) - 1:
            text = text[command.end() : -1]
        if text.startswith("{") and matching_brace(text, 0) == len(text) - 1:
            text = text[1:-1]
        if text == before:
            return text


def matching_brace(text: str, start: int) -> int:
    """Index of the brace that closes the one at `start`, or -1. Escaped braces count as text."""
    depth, i = 0, start
    while i < len(text):
        if text[i] == "\\":
            i += 2
            continue
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return i
        i += 1
    return -1


def has_degrees(text: str) -> bool:
    """Whether a cleaned text carries a degree sign."""
    return _DEGREES.search(text) is not None


def without_degrees(text: str) -> str:
    """The text without its degree signs."""
    return _DEGREES.sub("", text).strip()


# --- numbers ----------------------------------------------------------------------------------------------------------

_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+\.?\d*|\.\d+)"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)(?:(?P<whole>\d+)?\\frac\{{(?P<top>[+-]?{_UNSIGNED})\}}\{{(?P<bottom>[+-]?{_UNSIGNED})\}}"
    rf"|(?P<a>{_UNSIGNED})\.?/(?P<b>{_UNSIGNED})"
    rf"|(?P<plain>{_UNSIGNED})(?:[eE](?P<e>[+-]?\d{{1,4}})"
    r"|(?:\\times|\\cdot|\*|x)10\^\{?(?P<ten>[+-]?\d{1,4})\}?)?"
    r"|10\^\{?(?P<power>[+-]?\d{1,4})\}?)(?P<percent>\\%)?"
)
_REPEATING = re.compile(r"([+-]?)(\d*)\.(\d*)\\overline\{(\d+)\}")
_SPACED_MIXED = re.compile(r"([+-]?)(\d+)\s+(\d+)\s*/\s*(\d+)")
_MAX_NUMBER = 400  # characters; far beyond any answer, and within the digits that int() reads


@dataclass(frozen=True)
class Number:
    """A rational number and how it was written."""

    value: Fraction  # as written: 50 for 50%
    form: str  # "integer", "decimal" or "fraction"
    step: Fraction  # of the last written digit; 0 when it is exact
    digits: int  # significant digits as written
    percent: bool
    reduced: bool  # a fraction in lowest terms, not a mixed number


def number(text: str) -> Number | None:
    """The number that a cleaned text is, or None when it is something else."""
    if len(text) > _MAX_NUMBER:
        return None
    mixed = _SPACED_MIXED.fullmatch(text)
    if mixed and int(mixed[4]):
        value = int(mixed[2]) + Fraction(int(mixed[3]), int(mixed[4]))
        return Number(-value if mixed[1] == "-" else value, "fraction", Fraction(0), 0, False, False)
    repeating = _REPEATING.fullmatch(text)
    if repeating:
        sign, whole, start, period = repeating.groups()
        tail = Fraction(int(period), 10 ** len(period) - 1) + int(start or 0)
        value = int(whole or 0) + tail / 10 ** len(start)
        return Number(-value if sign == "-" else value, "fraction", Fraction(0), 0, False, False)
    if re.search(r",\s", text):
        return None  # a list, while a comma without space may separate thousands
    compact = text.replace(" ", "")
    if compact.startswith("(") and compact.endswith(")") and "(" not in compact[1:]:
        compact = compact[1:-1]
    match = _NUMBER.fullmatch(compact)
    if match is None:
        return None
    sign = -1 if match["sign"] == "-" else 1
    percent = match["percent"] is not None
    if match["top"] is not None or match["a"] is not None:
        top, bottom = _decimal(match["top"] or match["a"]), _decimal(match["bottom"] or match["b"])
        if not bottom:
            return None
        value = top / bottom
        reduced = match["whole"] is None and value.denominator == abs(bottom)
        return Number(sign * (value + int(match["whole"] or 0)), "fraction", Fraction(0), 0, percent, reduced)
    plain = match["plain"]
    exponent = int(match["e"] or match["ten"] or match["power"] or 0)
    written = (plain or "1").replace(",", "")
    decimals = len(written.partition(".")[2])
    value = sign * _decimal(written) * Fraction(10) ** exponent
    exact = plain is None or (decimals == 0 and exponent == 0)
    step = Fraction(0) if exact else Fraction(10) ** (exponent - decimals)
    digits = len(written.replace(".", "").lstrip("0"))
    form = "integer" if exact and value.denominator == 1 else "decimal"
    return Number(value, form, step, digits, percent, True)


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", "").rstrip(".") or "0") if text not in (".", "") else Fraction(0)


# --- structure --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """Items between brackets; without brackets both ends are empty."""

    opening: str
    items: tuple[str, ...]
    closing: str


def parts(text: str) -> Parts:
    """The items of a tuple, an interval, a set or a plain list; one item, without brackets, for all else."""
    opening = next((o for o in ("\\{", "\\langle", "(", "[") if text.startswith(o)), "")
    closing = next((c for c in ("\\}", "\\rangle", ")", "]") if text.endswith(c)), "")
    if opening and closing and _encloses(text, opening):
        inner = split(text[len(opening) : -len(closing)], ",;")
        is_set = opening == "\\{"
        if len(inner) > 1 or (is_set and closing == "\\}"):
            return Parts(opening, tuple(inner), closing)
    return Parts("", tuple(split(re.sub(r",?\s+(?:and|or)\s+", ",", text), ",;")), "")


_COLUMN = re.compile(r"\\begin\{([pb]?matrix)\}([^&]*)\\end\{\1\}", re.S)
_ENDS = {"<": ("(", ")"), "\\le": ("[", "]"), ">": (")", "("), "\\ge": ("]", "[")}
_BETWEEN = re.compile(
    r"(?P<low>[^<>]+?)\s*(?P<a><|\\le(?![a-z]))\s*[A-Za-z]\s*(?P<b><|\\le(?![a-z]))\s*(?P<high>[^<>]+)"
)
_BEYOND = re.compile(r"[A-Za-z]\s*(?P<sign><|>|\\le(?![a-z])|\\ge(?![a-z]))\s*(?P<bound>[^<>]+)")


def column_as_tuple(text: str) -> str:
    """A column vector in the notation of a tuple; other texts unchanged."""
    match = _COLUMN.fullmatch(text)
    return "(" + re.sub(r"\\\\", ",", match[2].strip().removesuffix("\\\\")) + ")" if match else text


def intervals(text: str) -> list[str] | None:
    """A cleaned union of inequalities in one letter, joined by "or", as intervals; None when it is something else."""
    found = []
    for piece in re.split(r"\s+or\s+|\\cup(?![a-z])|\\lor(?![a-z])", text):
        between, beyond = _BETWEEN.fullmatch(piece.strip()), _BEYOND.fullmatch(piece.strip())
        if between and "\\le" not in between["low"] + between["high"]:
            ends = _ENDS[between["a"]][0], _ENDS[between["b"]][1]
            found.append(f"{ends[0]}{between['low']},{between['high'].strip()}{ends[1]}")
        elif beyond and not re.search(r"\\[lg]e(?![a-z])", beyond["bound"]):
            bound, is_upper = beyond["bound"].strip(), beyond["sign"] in ("<", "\\le")
            end = _ENDS[beyond["sign"]][1]
            found.append(f"(-\\infty,{bound}{end}" if is_upper else f"{end}{bound},\\infty)")
        else:
            return None
    return found


def split(text: str, separators: str) -> list[str]:
    """The stripped pieces between separators outside all brackets."""
    pieces, start, depth, i = [], 0, 0, 0
    while i < len(text):
        step = 2 if text[i] == "\\" and i + 1 < len(text) else 1
        depth += _turn(text[i : i + step])
        if depth == 0 and text[i] in separators:
            pieces.append(text[start:i].strip())
            start = i + 1
        i += step
    return [piece for piece in (*pieces, text[start:].strip()) if piece]


def depth(text: str) -> int:
    """How deep brackets of all kinds nest."""
    deepest = level = 0
    for character in text:
        level += (character in "([{") - (character in ")]}")
        deepest = max(deepest, level)
    return deepest


def _turn(token: str) -> int:
    if token in ("(", "[", "{", "\\{"):
        return 1
    return -1 if token in (")", "]", "}", "\\}") else 0


def _encloses(text: str, opening: str) -> bool:
    """Whether the bracket at the start is closed by the text's last one."""
    if opening == "\\langle":
        return text.count("\\langle") == 1
    depth, i = 0, 0
    while i < len(text):
        step = 2 if text[i] == "\\" and i + 1 < len(text) else 1
        depth += _turn(text[i : i + step])
        i += step
        if depth == 0:
            return i == len(text)
    return False


# --- units ------------------------------------------------------------------------------------------------------------

_UNITS: dict[str, tuple[str, Fraction]] = {
    name: (dimension, Fraction(factor))
    for dimension, table in {
        "length": {"mm": "1/1000", "cm": "1/100", "dm": "1/10", "m": "1", "km": "1000", "in": "0.0254",
                   "inch": "0.0254", "inches": "0.0254", "ft": "0.3048", "foot": "0.3048", "feet": "0.3048",
                   "yard": "0.9144", "yd": "0.9144", "mile": "1609.344", "mi": "1609.344", "meter": "1", "metre": "1",
                   "millimeter": "1/1000", "centimeter": "1/100", "centimetre": "1/100", "kilometer": "1000",
                   "kilometre": "1000"},
        "mass": {"mg": "1/1000", "g": "1", "kg": "1000", "gram": "1", "kilogram": "1000", "lb": "453.59237",
                 "pound": "453.59237", "ounce": "28.349523125", "oz": "28.349523125"},
        "time": {"s": "1", "sec": "1", "second": "1", "min": "60", "minute": "60", "h": "3600", "hr": "3600",
                 "hour": "3600", "day": "86400", "week": "604800"},
        "money": {"dollar": "1", "cent": "1/100"},
        "volume": {"ml": "1/1000", "l": "1", "liter": "1", "litre": "1", "milliliter": "1/1000"},
        "angle": {"degree": "1", "deg": "1"},
        "speed": {"m/s": "1", "km/h": "5/18", "kmh": "5/18", "kph": "5/18", "mph": "0.44704"},
    }.items()
    for name, factor in table.items()
}  # fmt: skip
_TEXT_UNIT = re.compile(r"\\text\{([^{}]*)\}\s*(?:\^\s*\{?\s*(-?\d)\s*\}?)?$")
_BARE_UNIT = re.compile(r"(?:(?<=[\d})])|(?<=\\pi))\s*([a-zA-Z]+(?:/[a-zA-Z]+)?)s?\s*(?:\^\s*\{?\s*(-?\d)\s*\}?)?$")
_BARE_WORDS = re.compile(r"(?<=[\d})%])\s+[a-zA-Z][a-z]+(?:[\s/-]+[a-zA-Z]+)*$")
_POWERS = {"square": 2, "squared": 2, "sq": 2, "cubic": 3, "cubed": 3, "cu": 3}


@dataclass(frozen=True)
class Unit:
    """What follows an answer: a known unit has a dimension and a size in that dimension's base unit."""

    dimension: str = ""
    size: Fraction = Fraction(1)


def split_unit(text: str, *, words: bool = False, letters: bool = False) -> tuple[str, Unit | None]:
    """The cleaned text without its trailing unit, and the unit.

    `words`: any words after a number are a unit too; `letters`: single letters such as m are units, not variables.
    """
    match = _TEXT_UNIT.search(text)
    if match and text[: match.start()].strip():
        return text[: match.start()].strip(), _unit(match[1], match[2])
    match = _BARE_UNIT.search(text)
    if match:
        unit = _unit(match[1], match[2])
        if unit.dimension and (letters or len(match[1]) > 1):
            return text[: match.start()].strip(), unit
    match = _BARE_WORDS.search(text) if words else None
    if match:
        return text[: match.start()].strip(), _unit(match[0], None)
    return text, None


def _unit(text: str, power: str | None) -> Unit:
    words = [word for word in re.split(r"[\s.]+", text.strip()) if word]
    exponent = int(power or 1)
    for word in words:
        exponent = _POWERS.get(word.lower(), exponent)
    names = [word for word in words if word.lower() not in _POWERS]
    if len(names) != 1:
        return Unit()
    name = names[0] if names[0] in _UNITS else names[0].lower()
    known = _UNITS.get(name) or _UNITS.get(name.removesuffix("s"))
    if known is None:
        return Unit()
    return Unit(f"{known[0]}^{exponent}", known[1] ** exponent)
