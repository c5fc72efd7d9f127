"""Malformed model outputs by the thousand, the same for the same seed, to prove that no text stops the graders."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

GOLDS = (
    "42", "-3", r"\frac{1}{2}", "0.25", r"2\sqrt{5}", r"\left( 3, \frac{\pi}{2} \right)", r"(2,\infty)", "1,2,3",
    r"(-\infty,0)\cup[1,3)", r"\begin{pmatrix} -2 \\ 7 \end{pmatrix}", "x^2+2x+1", "y=2x+3", r"\text{Evelyn}", "(C)",
    r"120^\circ", r"50\%", r"\$32,\!348", "1.5e6", r"5\text{ cm}", r"3 \pm 2 \sqrt{2}", "2516_8", r"\{1,2\}", "6+9i",
)  # fmt: skip
_TOKENS = (
    "\\frac", "\\sqrt", "\\left(", "\\right)", "{", "}", "[", "]", "(", ")", "^", "_", "&", "\\\\", "\\", "$", "$$",
    "%", "\\%", "#", "~", ",", ";", ":", "=", "<", ">", "\\le", "+", "-", "*", "/", "!", "|", "'", "\"", "`",
    "\\pi", "\\infty", "\\text{", "\\boxed{", "\\begin{pmatrix}", "\\end{pmatrix}", "\\begin{cases}", "\\cup",
    "\\in", "\\pm", "\\circ", "^\\circ", "\\sum_{k=1}^{n}", "\\int_0^1", "\\lim_{x\\to0}", "\\binom{5}{2}",
    "\\overline{3}", "\\log", "\\sin", "e", "i", "x", "y", "n", "0", "1", "7", "10", "99", "1e400", "9^{9^9}",
    "10^{9999}", "(x+1)^{99}", "1000!", "0.000", "..", " and ", " or ", "\n", "\t", "\x00", "\f", "\x7f", "\ud800",
    "\u202e", "é", "数", "🙂", "answer is", "####",
)  # fmt: skip

_LEAVES = (
    "0", "1", "-2", "7", "12", "99", "1000", "9999", "123456789", "0.1", "1.5e300", "10^{9999}", "2^{1000}", "100!",
    "1000!", "x", "y", "n", "k", "e", "i", "\\pi", "\\infty", "\\frac{1}{3}", "\\sqrt{2}", "50\\%", "30^\\circ",
)  # fmt: skip
_FORMS = (
    "@+@", "@-@", "@@", "@ \\cdot @", "(@)(@)", "\\frac{@}{@}", "@/@", "(@)^{@}", "@^{@}", "@^2", "(@)^{99}",
    "\\sqrt{@}", "\\sqrt[@]{@}", "(@)!", "@!", "@!!", "\\binom{@}{@}", "\\sin(@)", "\\tan @", "\\arctan{@}",
    "\\cos^2 @", "\\log_{@}{@}", "\\ln(@)", "e^{@}", "|@|", "\\lfloor @ \\rfloor", "\\sum_{k=1}^{@} @",
    "\\prod_{k=0}^{@} @", "\\int_{0}^{@} @ dx", "\\lim_{x\\to @} @", "\\frac{d}{dx} @", "(@, @)", "[@, @)",
    "\\{@, @\\}", "@, @, @", "(@) \\cup (@)", "x = @", "@ < x < @", "x \\ge @", "@ = @",
    "\\begin{pmatrix} @ & @ \\\\ @ & @ \\end{pmatrix}", "\\begin{pmatrix} @ \\\\ @ \\end{pmatrix}^{@}", "\\gcd(@, @)",
    "@ \\bmod @", "@:@", "@ \\pm @", "\\overline{@}", "f(@)", "\\max(@, @)", "\\{x | @ < x\\}",
    "\\mathbb{R} \\setminus @",
)  # fmt: skip


def malformed(count: int, seed: int) -> Iterator[tuple[str, str, str]]:
    """`count` triples (kind, response, gold); the kinds are the keys of KINDS."""
    draw = random.Random(seed)
    for _ in range(count):
        gold, kind = draw.choice(GOLDS), draw.choice(tuple(KINDS))
        text = KINDS[kind](draw, gold)
        frame = draw.choice(("\\boxed{%s}", "\\boxed{%s", "So $%s$", "the answer is %s.", "%s", "%s}"))
        yield kind, frame.replace("%s", text), gold


def _soup(draw: random.Random, gold: str) -> str:
    return "".join(draw.choice(_TOKENS) for _ in range(draw.randint(0, 25)))


def _mutated(draw: random.Random, gold: str) -> str:
    text = list(gold)
    for _ in range(draw.randint(1, 6)):
        at = draw.randint(0, len(text))
        text[at : at + draw.randint(0, 2)] = draw.choice(("", draw.choice(_TOKENS), draw.choice(_TOKENS)))
    return "".join(text)


def _nested(draw: random.Random, gold: str) -> str:
    opening = draw.choice(
        ("{", "(", "\\frac{", "\\sqrt{", "\\left(", "\\boxed{", "x^{", "\\text{", "$", "[", "-", "1+(")
    )
    depth = draw.choice((3, 10, 50, 1000))
    return opening * depth + gold + "}" * draw.randint(0, depth)


def _repeated(draw: random.Random, gold: str) -> str:
    return (draw.choice(_TOKENS) + draw.choice((gold, ""))) * draw.choice((2, 20, 300, 5000))


def _characters(draw: random.Random, gold: str) -> str:
    return "".join(chr(draw.randint(0, draw.choice((127, 0x2FFF, 0x10FFFF)))) for _ in range(draw.randint(0, 60)))


def _expression(draw: random.Random, gold: str) -> str:
    """Well formed, so that it is read to the end, and made of what is dear to compute."""
    return _formula(draw, gold, draw.randint(1, 3))


def _formula(draw: random.Random, gold: str, depth: int) -> str:
    if depth == 0:
        return draw.choice(_LEAVES) if draw.random() < 0.9 else gold
    first, *others = draw.choice(_FORMS).split("@")
    return first + "".join(_formula(draw, gold, depth - 1) + piece for piece in others)


def _long(draw: random.Random, gold: str) -> str:
    """Thousands of characters of working, of which some look like answers."""
    pieces = (*_TOKENS, "Let $x=1$. ", "<think>", "</think>", "\\boxed{1} ", "so the answer is ", f"${gold}$ ", "word ")
    return "".join(draw.choice(pieces) for _ in range(draw.choice((200, 2000, 6000))))


KINDS: dict[str, Callable[[random.Random, str], str]] = {
    "soup": _soup,
    "mutated": _mutated,
    "nested": _nested,
    "repeated": _repeated,
    "characters": _characters,
    "expression": _expression,
    "long": _long,
}
