"""Which part of a response is its answer."""

import re

from megatron_rl.grading import latex, units
from megatron_rl.grading.numerals import number

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*(?:(?=\{)|(?P<bare>[^\s{}\\$]+))")
_TAG = re.compile(r"<answer>(.*?)</answer>", re.S | re.I)
_HASHES = re.compile(r"####\s*(?P<answer>[^\n]+)")
_MENTION = r"answers?\s*(?:\*\*|__)?\s*(?:is|are|=|:)"
_MENTIONED = re.compile(_MENTION, re.I)
_SAID = re.compile(_MENTION + r"\s*(?:\*\*|__)?\s*:?\s*(?P<answer>(?:\*\*|\s)*\S.*)", re.I | re.S)
# the dollars of money enclose no formula: a closing one has no space before it and no digit behind it
_FORMULA = re.compile(
    r"\$\$(.+?)\$\$"
    r"|\$(?!\s)((?:[^$\n\\]|\\.)+?)(?<!\s)\$(?!\d)|\$[ ]((?:[^$\n\\]|\\.)+?)[ ]\$(?!\d)"
    r"|\\\((.+?)\\\)|\\\[(.+?)\\\]",
    re.S,
)
_PLAIN_NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s*/\s*\d+)?(?:\s*\\?%)?(?![\w])")
_CLAUSE = re.compile(
    r"[,;]?\s+(?:since|because|as|so|which|where|when|if|and not|not|but|given|after|out of|for)\b"
    r"|\.\s|\s\(|;\s|,\s+(?=[a-z]{3,})"
)
_BETWEEN_BOXES = re.compile(
    r"(?:[\s,;&$]|\\[,;:!\[\]()]|\\quad|\\qquad|\\text\s*\{|\}|\*\*|\band\b|\bor\b|[a-zA-Z]\s*=|\\\\)*", re.I
)
_WORD = re.compile(r"(?!(?:and|or)\b)\b[a-zA-Z]{3,}")
_MAX_LINE = 2000  # characters of an answer's line that are searched
_FEW_WORDS = re.compile(r"[^.\n]{0,40}")  # between boxes that are one answer


def answers(response: str, *, earlier_box: bool = False) -> list[str]:
    """Return the readings of a response's answer, the first being its answer by itself; none when there is none.

    Boxes that only commas, "and", "or" or line breaks part are one answer together. When words stand between, the last
    box is the answer, and a second reading takes them together: a gold of as many parts wants that.
    `earlier_box`: count the last closed box though a later one was cut.
    """
    boxes, together, is_cut = _boxes(response)
    if is_cut and boxes and not earlier_box:
        return []
    if not boxes:
        found = unboxed_answer(response)
        return [found] if found else []
    joined = ",".join(boxes)
    if together and len(set(boxes)) > 1:
        return [joined]
    return [boxes[-1], joined] if len(boxes) > 1 else boxes


def last_boxes(response: str) -> list[str]:
    """Return the contents of the last \\boxed and of those just before it, in order: they belong together when nothing
    but a few words without a full stop stands between them. Boxes that never close are passed over."""
    return _boxes(response)[0]


def _boxes(response: str) -> tuple[list[str], bool, bool]:
    """The last boxes; whether only separators part them; whether a box behind them never closes."""
    for part in (response.rpartition("</think>")[2], response):
        spans, is_cut = _box_spans(part)
        if spans:
            break
    first, together = len(spans) - 1, True
    while first > 0:
        between = part[spans[first - 1][1] : spans[first][0]]
        separated = len(between) <= 60 and _BETWEEN_BOXES.fullmatch(between) is not None
        if not separated and not _FEW_WORDS.fullmatch(between):
            break
        together &= separated
        first -= 1
    return [content for _, _, content in spans[max(first, 0) :]], together, is_cut


def _box_spans(text: str) -> tuple[list[tuple[int, int, str]], bool]:
    """(start, end, content) of the outermost closed boxes, of which the last 16 matter; whether the last is not one."""
    spans, position, is_cut = [], 0, False
    for match in list(_BOX.finditer(text))[-64:]:
        if match.start() < position:
            continue
        content, end = match["bare"], match.end()
        if content is None:
            end = latex.matching_brace(text, match.end()) + 1
            content = text[match.end() + 1 : end - 1] if end else ""
            position = max(position, end - 1)
        is_cut = end == 0
        if content.strip():
            spans.append((match.start(), end, content))
    return spans[-16:], is_cut


def unboxed_answer(response: str) -> str | None:
    """Return the answer of a response without a box, or None."""
    text = response.rpartition("</think>")[2].strip()
    tags = _TAG.findall(text)
    if tags:
        text = tags[-1].strip()
        if len(text) <= 400 and "\n" not in text and not _MENTIONED.search(text):
            return _core(text)
    cut = _BOX.search(text)
    if cut and not re.match(r"\s*\{\s*\}", text[cut.end() :]):
        return None
    hashes = _HASHES.findall(text)
    if hashes:
        return _core(hashes[-1])
    for mention in reversed([*_MENTIONED.finditer(text)][-8:]):
        said = _SAID.match(text, mention.start())
        if said:
            return _stated(said["answer"])
    if re.search(r"(?:\$\$|\\\])[\s.]*$", text):  # a displayed formula at the end spans lines
        formulas = _FORMULA.findall(text)
        return next(filter(None, formulas[-1]), None) if formulas else None
    lines = [line for line in text.split("\n") if line.strip(" \t*-_=#")]
    return _core(lines[-1]) if lines else None


def _stated(text: str) -> str | None:
    """What follows "the answer is": a formula, or the clause; with other words around, its first number."""
    text = text.lstrip("* \t\r\n:")
    formula = _FORMULA.match(text)
    if formula:
        clause = _CLAUSE.split(text[formula.end() :].split("\n")[0], maxsplit=1)[0]
        return _core(formula[0] + clause[:_MAX_LINE])
    line = text.split("\n")[0].strip()[:_MAX_LINE].replace("**", "").replace("__", "")
    if _FORMULA.search(line) and not re.match(r"[-\d]", line):
        return _core(line)
    clause = _CLAUSE.split(line, maxsplit=1)[0].strip()
    if not re.search(r"\d", clause):
        return clause or _core(line)
    cleaned = latex.clean(clause)
    if "\\" in clause or not _WORD.search(clause) or number(cleaned) or units.split_unit(cleaned)[1]:
        return clause
    return (_PLAIN_NUMBER.findall(clause) or [clause])[0]


def _core(line: str) -> str:
    """The formula of a line, or its last number when it has words around it, or all of it."""
    line = line.strip()[-_MAX_LINE:].replace("**", "").replace("__", "").strip()
    formulas = [next(filter(None, match.groups())) for match in _FORMULA.finditer(line)]
    if formulas:
        only_math = not _WORD.search(_FORMULA.sub("", line))
        return ",".join(formulas) if only_math and len(formulas) > 1 else formulas[-1]
    if len(line) <= 400:
        cleaned = latex.clean(line)
        if number(cleaned) or number(units.split_unit(cleaned)[0]):
            return line
    if "\\" in line or not re.search(r"[a-zA-Z]{2,}\s+\S", line):
        return line
    return (_PLAIN_NUMBER.findall(line) or [line])[-1]
