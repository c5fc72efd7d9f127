"""Numbers as they are written: the value, and what the spelling says about rounding."""

import re
from dataclasses import dataclass
from fractions import Fraction

_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+\.?\d*|\.\d+)"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)(?:(?P<whole>\d+)?\\frac\{{(?P<top>[+-]?{_UNSIGNED})\}}\{{(?P<bottom>[+-]?{_UNSIGNED})\}}"
    rf"|(?P<a>{_UNSIGNED})\.?/(?P<b>{_UNSIGNED})"
    rf"|(?P<plain>{_UNSIGNED})(?:[eE](?P<e>[+-]?\d{{1,4}})"
    r"|(?:\\times|\\cdot|\*|x)10\^\{?(?P<ten>[+-]?\d{1,4})\}?)?"
    r"|10\^\{?(?P<power>[+-]?\d{1,4})\}?)(?P<percent>\\%)?"
)
_REPEATING = re.compile(r"[+-]?\d*\.\d*\\overline\{\d+\}")
_SPACED_MIXED = re.compile(r"[+-]?(\d+)\s+(\d+)\s*/\s*(\d+)")
_SPACED_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?: \d{3})+(?!\d| \d)")
_MAX_NUMBER = 400  # characters; far beyond any answer, and within the digits that int() reads


@dataclass(frozen=True)
class Number:
    """A rational number and how it was written."""

    value: Fraction  # as written: 50 for 50%
    form: str = "fraction"  # or "integer" or "decimal"
    step: Fraction = Fraction(0)  # of the last written digit; 0 when it is exact
    digits: int = 0  # significant digits as written
    percent: bool = False
    reduced: bool = False  # a fraction in lowest terms, not a mixed number


def number(text: str) -> Number | None:
    """Return the number that a cleaned text is, or None when it is something else."""
    if len(text) > _MAX_NUMBER:
        return None
    sign = -1 if text.startswith("-") else 1
    mixed = _SPACED_MIXED.fullmatch(text)
    if mixed and int(mixed[3]):
        return Number(sign * (int(mixed[1]) + Fraction(int(mixed[2]), int(mixed[3]))))
    if _REPEATING.fullmatch(text):
        return Number(sign * repeating(text.lstrip("+-")))
    if re.search(r",\s", text):
        return None  # a list, while a comma without space may separate thousands
    compact = text.replace(" ", "")
    if compact.startswith("(") and compact.endswith(")") and "(" not in compact[1:] and "," not in compact:
        compact = compact[1:-1]
    match = _NUMBER.fullmatch(compact)
    if match is None or re.search(r"\d\s+\d", text) and not _SPACED_THOUSANDS.search(text):
        return None
    sign = -1 if match["sign"] == "-" else 1
    percent = match["percent"] is not None
    if match["top"] is not None or match["a"] is not None:
        top, bottom = _decimal(match["top"] or match["a"]), _decimal(match["bottom"] or match["b"])
        if not bottom:
            return None
        value = top / bottom
        reduced = match["whole"] is None and value.denominator == abs(bottom)
        return Number(sign * (value + int(match["whole"] or 0)), percent=percent, reduced=reduced)
    written = match["plain"] or "1"
    exponent = int(match["e"] or match["ten"] or match["power"] or 0)
    decimals = len(written.partition(".")[2])
    value = sign * _decimal(written) * Fraction(10) ** exponent
    exact = match["plain"] is None or (decimals == 0 and exponent == 0)
    step = Fraction(0) if exact else Fraction(10) ** (exponent - decimals)
    digits = len(re.sub("[.,]", "", written).lstrip("0"))
    form = "integer" if exact and value.denominator == 1 else "decimal"
    return Number(value, form, step, digits, percent, reduced=True)


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def repeating(text: str) -> Fraction:
    """Return the value of a decimal without sign whose period is under \\overline."""
    whole, start, period = re.split(r"\.|\\overline\s*\{", text.rstrip("}"))
    tail = Fraction(int(period), 10 ** len(period) - 1) + int(start or 0)
    return int(whole or 0) + tail / 10 ** len(start)


def close(found: Number, gold: Number, scale: Fraction, rounding_digits: int) -> bool:
    """Return whether found * scale is the gold number, or one is the other rounded.

    A found decimal of `rounding_digits` significant digits or more may round the gold; a gold decimal of two digits
    less may round what was found. With 0 digits nothing is rounded.
    """
    value = found.value * scale
    if value == gold.value:
        return True
    if not rounding_digits or (gold.form == "integer" and not gold.percent):
        return False
    step = found.step * abs(scale)
    if found.form == "decimal" and found.digits >= rounding_digits and (not gold.step or gold.step <= step):
        return abs(value - gold.value) <= step / 2
    if gold.form == "decimal" and gold.digits >= rounding_digits - 2 and step <= gold.step:
        return abs(value - gold.value) <= gold.step / 2
    return False
