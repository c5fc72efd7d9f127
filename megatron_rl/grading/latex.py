"""Mathematical answers as text: one spelling for what LaTeX writes in many ways, lists and brackets."""

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_rl.files import read_asset

Same = Callable[[str, str], bool]  # whether a text, as an answer, is the same as a gold one

MAX_CLEANED = 5_000  # characters; a longer text is compared as it stands
_MAX_LAYERS = 50  # of delimiters around an answer
_WRAPPED = re.compile(
    r"\$\$([^$]*)\$\$|\$([^$]*)\$|\\\((.*)\\\)|\\\[(.*)\\\]|\*\*([^*]*)\*\*"
    r"|`([^`]*)`|``(.*)(?:''|\")|\"([^\"]*)\"|'([^']*)'",
    re.S,
)
_COMMANDS_AROUND = re.compile(
    r"\\(?:boxed|fbox|text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathsf|mathtt|mbox|boldsymbol|bm|displaystyle|ensuremath"
    r"|underline|emph)\s*\{"
)
SPELLINGS = read_asset(__file__, "latex.yaml")
_FRACTIONS = "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
_WIDE = "（）［］，；％：＝＜＞＋－．０１２３４５６７８９\u00a0\u2009\u202f\u3000"
_UNICODE = str.maketrans(
    SPELLINGS["signs"]
    | {sign: r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", sign).split("⁄")) for sign in _FRACTIONS}
    | {wide: unicodedata.normalize("NFKC", wide) for wide in _WIDE}
)
_UNITS_OF_MONEY = {"$": "dollars", "€": "euros", "£": "pounds sterling", "¥": "yen"}
_REWRITES = [(re.compile(pattern), by) for pattern, by in SPELLINGS["rewrites"]]
_DEGREES = re.compile(
    r"\s*\^\s*(?:\{\s*\\(?:circ|degree)\s*\}|\\(?:circ|degree))|\\text\{\s*\^\s*\\circ\s*\}|\\(?:text)?degree(?![a-z])"
    r"|(?<=[\d}])\s*(?:\\text\{\s*)?(?:degrees?|deg)(?![a-z])(?!\s+[CcFf])(?:\s*\})?"
)
_TRIGONOMETRIC = re.compile(r"\\?(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
_PLAIN_NUMBER = re.compile(r"-?\d{1,15}(?:\.\d{1,15})?")
_SET_BY_CONDITION = re.compile(
    r"\\\{\s*(?P<name>\\?[a-zA-Z]+)\s*(?:\\in\s*(?:\\mathbb\s*\{?\s*R\s*\}?|R)\s*)?(?:\||:|;)\s*(?P<condition>.+)\\\}"
)
_MONEY = re.compile(
    r"(?:\\text\s*\{\s*\\?([$€£¥])\s*\}|\\([$])|([$€£¥]))\s*(?=[\d.])(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d*\.?\d+)"
)
_DOLLAR = re.compile(r"(?<!\\)\$")
_ESCAPED_TWICE = re.compile(
    r"\\\\(?=(?:[dt]?frac|sqrt|circ|pi|text|left|right|cdot|times|infty|[dt]?binom|%|\$)(?![a-z]))"
)
_ROOT_SIGN = re.compile(r"([√∛∜])\s*(\d+(?:\.\d+)?|\([^()]*\)|\{[^{}]*\}|[a-zA-Z]|\\[a-zA-Z]+\s?)")


def clean(text: str) -> str:
    """Return an answer without wrapping (dollars, boxes, \\text, final stop), spacing and synonyms."""
    text = text.strip()
    if _PLAIN_NUMBER.fullmatch(text) or len(text) > MAX_CLEANED:
        return text
    text = _in_ascii(text)
    if "\\\\" in text and "\\begin" not in text:
        text = _ESCAPED_TWICE.sub(r"\\", text)
    bare = re.sub(r"\\[\\{}]", "", text)
    text += "}" * max(0, bare.count("{") - bare.count("}"))  # some gold answers lack their last braces
    text = unwrap(text.replace("...", r"\ldots "))
    for pattern, by in _REWRITES:
        text = pattern.sub(by, text)
    if len(_DOLLAR.findall(text)) % 2 == 0:
        text = _DOLLAR.sub("", text)  # pairs of delimiters; one alone is money
    text = _MONEY.sub(lambda match: f"{match[4]}\\text{{ {_UNITS_OF_MONEY[match[1] or match[2] or match[3]]} }}", text)
    text = re.sub(r"\\(?:\$|#|&)|[$€£¥]", "", text)
    text = unwrap(text)
    text = _without_alignment(text) if "\\begin" in text else text
    condition = _SET_BY_CONDITION.fullmatch(text)
    return unwrap(condition["condition"].removeprefix(condition["name"] + r"\in\mathbb{R},")) if condition else text


def _without_alignment(text: str) -> str:
    """An aligned chain as one line, and a system as a list; other environments unchanged."""
    match = _ALIGNED.fullmatch(text)
    if match is None or match["name"] in ("array", "cases") and "&" in match["body"]:
        return text
    rows = [row.replace("&", "").strip() for row in match["body"].split(r"\\") if row.strip()]
    if match["name"] == "array" and len(rows) > 1:
        return text
    chained = all(row.startswith("=") for row in rows[1:])
    return unwrap((" " if chained else ",").join(row.rstrip(",") for row in rows))


def _in_ascii(text: str) -> str:
    """With LaTeX for the signs that have any, and without invisible characters."""
    if text.isascii() and text.isprintable():
        return text
    text = re.sub(rf"(?<=\d)([{_FRACTIONS}])", r" \1", text)
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+", lambda match: "^{" + unicodedata.normalize("NFKC", match[0]) + "}", text)
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉]+", lambda match: "_{" + unicodedata.normalize("NFKC", match[0]) + "}", text)
    text = _ROOT_SIGN.sub(lambda match: rf"\sqrt{_ROOT_INDEX[match[1]]}{{{match[2].strip('(){}')}}}", text)
    text = text.translate(_UNICODE)
    return "".join(c for c in text if c in "\n\t " or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co"))


_ALIGNED = re.compile(
    r"\\begin\{(?P<name>aligned|align\*?|gathered|split|equation\*?|cases|array)\}(?:\{[lcr|\s]*\})?(?P<body>.*)"
    r"\\end\{(?P=name)\}",
    re.S,
)
_ROOT_INDEX = {"√": "", "∛": "[3]", "∜": "[4]"}


def unwrap(text: str) -> str:
    """Return a text without the delimiters, commands, braces and final stops around the whole, at most 50 deep."""
    for _ in range(_MAX_LAYERS):
        before = text
        text = text.strip().rstrip(".,;: ").removesuffix("\\").strip()
        wrapped = _WRAPPED.fullmatch(text)
        if wrapped:
            text = next(inner for inner in wrapped.groups() if inner is not None)
        command = _COMMANDS_AROUND.match(text)
        if command and matching_brace(text, command.end() - 1) == len(text) - 1:
            text = text[command.end() : -1]
        if text.startswith("{") and matching_brace(text, 0) == len(text) - 1:
            text = text[1:-1]
        if text == before:
            break
    return text


_BRACE = re.compile(r"\\.|[{}]", re.S)


def matching_brace(text: str, start: int) -> int:
    """Return the index of the brace that closes the one at `start`, or -1. Escaped braces count as text."""
    depth = 0
    for match in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return -1


def has_degrees(text: str) -> bool:
    """Return whether a cleaned text carries a degree sign outside the argument of a trigonometric function."""
    return _DEGREES.search(text) is not None and not _TRIGONOMETRIC.search(text)


def without_degrees(text: str) -> str:
    """Return a cleaned text without its degree signs."""
    return _DEGREES.sub("", text).strip()


def compact(text: str) -> str:
    """Return a text without spaces, braces that only group one character, and \\text: for comparing as it stands."""
    return re.sub(r"\{(\w)\}", r"\1", re.sub(r"\s+", "", text).replace("\\text{", "{"))


_CHARACTER = re.compile(r"\\.|.", re.S)
_OPENING, _CLOSING = {"(", "[", "{", "\\{"}, {")", "]", "}", "\\}"}


@dataclass(frozen=True)
class Parts:
    """Items between brackets; without brackets both ends are empty."""

    opening: str
    items: tuple[str, ...]
    closing: str


def parts(text: str) -> Parts:
    """Return the items of a tuple, an interval, a set or a plain list; for all else one item without brackets."""
    opening = next((o for o in ("\\{", "\\langle", "(", "[") if text.startswith(o)), "")
    closing = next((c for c in ("\\}", "\\rangle", ")", "]") if text.endswith(c)), "")
    if opening and closing and _encloses(text, opening):
        inner = split(text[len(opening) : -len(closing)], ",;")
        if len(inner) > 1 or (opening, closing) == ("\\{", "\\}"):
            return Parts(opening, tuple(inner), closing)
    if " and " in text or " or " in text:
        text = re.sub(r",?\s+(?:and|or)\s+", ",", text)
    return Parts("", tuple(split(text, ",;")), "")


def split(text: str, separators: str) -> list[str]:
    """Return the stripped pieces between separators outside all brackets."""
    pieces, start = [], 0
    for position, token, depth in _tokens(text):
        if depth == 0 and token in separators:
            pieces.append(text[start:position].strip())
            start = position + 1
    return [piece for piece in (*pieces, text[start:].strip()) if piece]


def split_at(text: str, pattern: re.Pattern[str]) -> list[str]:
    """Return the stripped pieces between matches of a pattern outside all brackets."""
    pieces, start = [], 0
    for match in pattern.finditer(text):
        before = list(_tokens(text[: match.start()]))
        if not before or before[-1][2] == 0:
            pieces.append(text[start : match.start()].strip())
            start = match.end()
    return [*pieces, text[start:].strip()]


def _tokens(text: str) -> Iterator[tuple[int, str, int]]:
    """The place of each character or escaped character, itself, and how many brackets are open behind it."""
    depth = 0
    for match in _CHARACTER.finditer(text):
        token = match[0]
        depth += (token in _OPENING) - (token in _CLOSING)
        yield match.start(), token, depth


def _encloses(text: str, opening: str) -> bool:
    """Whether the bracket at the start is closed by the text's last one."""
    if opening == "\\langle":
        return text.count("\\langle") == 1
    closed = next((position + len(token) for position, token, depth in _tokens(text) if depth == 0), 0)
    return closed == len(text)
