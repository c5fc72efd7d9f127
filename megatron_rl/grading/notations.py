"""Answers that are no expressions: letters of choices, words, times of day, ratios, bases, remainders.

Each function returns a verdict, or None when the gold answer is not in its notation.
"""

import re

from megatron_rl.grading import latex
from megatron_rl.grading.latex import Same

_CHOICE = re.compile(r"\(?\s*([A-Z])\s*\)?")
_CHOICE_WITH_TEXT = re.compile(r"(?:\\text\{\s*)?\(?\s*([A-Z])\s*[).:]\s*\}?\s*(?P<rest>[^\s}+*/^=<>-].*)", re.S)
_ANOTHER_CHOICE = re.compile(
    r"(?<![A-Za-z\\])[A-Z]\s*[).:]|(?<![A-Za-z\\])\([A-Z]\)|(?:,|/|\b(?:or|and)|&)\s*\(?[A-Z]\)?(?![A-Za-z])"
)


def choice(found: str, gold: str) -> bool | None:
    """The letter of a choice, with or without the text of that choice and of no other."""
    letter = _CHOICE.fullmatch(gold)
    given = letter and (_CHOICE.fullmatch(found) or _CHOICE_WITH_TEXT.fullmatch(found))
    if not letter or not given:
        return None
    return given[1] == letter[1] and not _ANOTHER_CHOICE.search(given.groupdict().get("rest", ""))


_WORDS = re.compile(r"[^\W\d_]{2,}(?:[\s-]+[^\W\d_]+)*")
_SHORT_WORDS = set(
    "yes no odd all any dne one two six ten nan and or not on off up down red sum max min non "
    "mon tue wed thu fri sat sun".split()
)
_NUMBER_WORDS = {word: str(value) for value, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve".split())}  # fmt: skip
_LEADING = re.compile(r"^(?:a|an|the|there\s+(?:is|are|exists?))\s+")


def _is_words(text: str) -> bool:
    """Whether a cleaned text is a word or several, rather than a product of symbols."""
    if not _WORDS.fullmatch(text):
        return False
    if " " in text or "-" in text or text.casefold() in _SHORT_WORDS:
        return True
    return len(text) > 3 and re.search("[aeiouyAEIOUY]", text) is not None or not text.isascii()


def words(found: str, gold: str) -> bool | None:
    """Words by their letters, whatever their case; a number may be spelt out."""
    for word, digits in ((found.casefold(), gold), (gold.casefold(), found)):
        if word in _NUMBER_WORDS and digits.isdigit():
            return _NUMBER_WORDS[word] == digits
    if _is_words(gold) or gold == "\\emptyset" and _is_words(found):
        return _folded(found) == _folded(gold)
    return None


def _folded(text: str) -> str:
    text = "no solution" if text.strip() == "\\emptyset" else re.sub(r"\s+", " ", re.sub(r"\\text\s*\{|\}", " ", text))
    text = _LEADING.sub("", text.strip().casefold())
    return re.sub(r"\bsolutions\b|\breal solutions?\b", "solution", text).replace("empty set", "no solution")


_TIME = re.compile(
    r"(?P<hour>\d{1,2})(?:\s*:\s*(?P<minute>\d\d)(?:\s*:\s*(?P<second>\d\d))?)?\s*(?P<half>(?:\\text\s*\{)?\s*[aApP]\.?\s*[mM]\.?\s*\}?)?"
)


def time(found: str, gold: str) -> bool | None:
    """A time of day: hours and minutes exactly; a.m. or p.m. may be left out, never exchanged."""
    a, b = _TIME.fullmatch(found), _TIME.fullmatch(gold)
    if b is None or (b["minute"] is None and b["half"] is None):
        return None
    if a is None or (a["minute"] is None and a["half"] is None):
        return None if a is None and b["half"] is None else False
    first, second = _half(a), _half(b)
    exact, other = (a, b) if first else (b, a)
    hour = int(exact["hour"])
    hours = {hour}
    if first != second:  # one may say 3 p.m., the other 15:00
        hours.add(hour % 12 + (12 if "p" in (first, second) else 0))
    minutes = (a["minute"] or "00", a["second"] or "00") == (b["minute"] or "00", b["second"] or "00")
    return minutes and int(other["hour"]) in hours and not (first and second and first != second)


def _half(match: re.Match[str]) -> str:
    return re.sub(r"\\text|[^ap]", "", (match["half"] or "").casefold())[:1]


def ratio(found: str, gold: str, same: Same) -> bool | None:
    """a : b, in any multiple; of two parts also as a quotient."""
    b = latex.split(gold, ":")
    a = latex.split(found, ":")
    if max(len(a), len(b)) < 2 or "|" in found + gold or "\\{" in found + gold:
        return None
    if len(a) != len(b):
        whole, parts = (found, b) if len(a) == 1 else (gold, a)
        is_quotient = len(parts) == 2 and ("/" in whole or "\\frac" in whole)
        return is_quotient and same(whole.strip(), f"({parts[0]})/({parts[1]})")
    return all(same(f"({x})({b[0]})", f"({y})({a[0]})") for x, y in zip(a[1:], b[1:], strict=True))


_BASE_WORDS = {word: base for word, base in _NUMBER_WORDS.items() if int(base) > 1} | {"sixteen": "16"}
_BASE = re.compile(
    r"(?P<sign>-?)[({]*(?:text\{)?(?P<digits>[0-9A-F][0-9A-F,]*)\}?[)}]*(?:_\{?(?:text\{|\(|\{)*(?P<base>-?\d+|[a-z]+)[)}]*)?"
)


def base(found: str, gold: str) -> bool | None:
    """Digits with a base: the same digits, where the found answer may leave out the base that the gold names."""
    if "_" not in found + gold:
        return None
    a, b = (_BASE.fullmatch(re.sub(r"\s|\\", "", text)) for text in (found, gold))
    if a is None or b is None:
        return None
    bases = [_BASE_WORDS.get(m["base"] or "", m["base"] or "") for m in (a, b)]
    digits = [m["sign"] + m["digits"].replace(",", "") for m in (a, b)]
    if not all(re.fullmatch(r"-?\d+", text) for text in bases if text):
        return None
    if not bases[1] and bases[0] not in ("", "10"):
        return False
    if bases[0] == "10" and bases[1] not in ("", "10"):
        return _value(digits[0], 10) == _value(digits[1], int(bases[1]))
    return digits[0] == digits[1] and (not bases[0] or not bases[1] or bases[0] == bases[1])


def _value(digits: str, base: int) -> int | None:
    try:
        return int(digits, base)
    except ValueError:
        return None


_MODULUS = re.compile(
    r"\s*(?:\\pmod\s*\{?(?P<p>[^{}]+)\}?|\(?\s*(?:\\text\s*\{)?\s*\(?\s*\\?b?mod\s*\}?\s*\{?(?P<b>[^{}()]+)\}?\s*\)?\s*\}?)$"
)


def without_modulus(text: str) -> tuple[str, str]:
    """Return a text without the modulus behind it and without the unknown of its congruence, and the modulus or ""."""
    if "mod" not in text:
        return text, ""
    match = _MODULUS.search(text)
    if match is None or not text[: match.start()].strip():
        return text, ""
    value = re.split(r"\\equiv(?![a-z])", text[: match.start()])[-1].strip()
    return value, (match["p"] or match["b"]).strip()
