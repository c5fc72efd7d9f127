"""The tokens of an expression, the names it knows, and the trees that reading it makes."""

import re
from fractions import Fraction
from typing import Any

Tree = Any  # a Fraction, or a tuple: its kind, the name of a function or symbol, and the trees below

_MAX_TOKENS = 1500
_MAX_DIGITS = 4000  # of a number; Python reads no more
TRIGONOMETRIC = {"sin", "cos", "tan", "cot", "sec", "csc"}
_INVERSES = {"arcsin", "arccos", "arctan", "asin", "acos", "atan"}
_HYPERBOLIC = {"sinh", "cosh", "tanh"}
PREFIX = TRIGONOMETRIC | _INVERSES | _HYPERBOLIC | {"log", "ln", "lg", "exp"}
OF_SEVERAL = {"max", "min", "gcd", "lcm"}
_PLAIN_NAMES = sorted(
    PREFIX | OF_SEVERAL | {"sqrt", "cbrt", "floor", "ceil", "pi", "binom", "abs"}, key=len, reverse=True
)
_TOKEN = re.compile(
    r"\s+"
    r"|(?P<repeating>\d*\.\d*\\overline\s*\{\d+\})"
    r"|(?P<number>\d+(?:\.\d*)?|\.\d+)"
    r"|(?P<scientific>(?<=[\d.])[eE][+-]?\d{1,5}(?![\d.a-zA-Z(^]))"
    rf"|(?P<name>(?<![a-zA-Z\\])(?:{'|'.join(_PLAIN_NAMES)})(?![a-zA-Z])"
    r"|(?<![a-zA-Z\\])(?:sin|cos|tan|ln|log|exp)(?=[a-z](?![a-zA-Z])))"
    r"|(?P<text>\\text\s*\{[^{}]*\})"
    r"|(?P<command>\\[a-zA-Z]+\*?|\\.)"
    r"|(?P<letter>[^\W\d_])"
    r"|(?P<mark>.)",
    re.S,
)


class Unreadable(ValueError):
    """The text is no expression of this grammar."""


class Tokens:
    """A text's tokens and a position in them."""

    def __init__(self, text: str) -> None:
        """Raises: Unreadable when they are too many."""
        matches = _TOKEN.finditer(text)
        self._tokens = [(match.lastgroup, match.group()) for match in matches if match.lastgroup]
        if len(self._tokens) > _MAX_TOKENS or any(len(text) > _MAX_DIGITS for _, text in self._tokens):
            raise Unreadable("too long")
        self._plain = "*" in text and "\\" not in text and "{" not in text  # as in code: a power takes all its digits
        self._next = 0

    def _peek(self, ahead: int = 0) -> str:
        position = self._next + ahead
        return self._tokens[position][1] if 0 <= position < len(self._tokens) else ""

    def _kind(self, ahead: int = 0) -> str:
        position = self._next + ahead
        return self._tokens[position][0] if 0 <= position < len(self._tokens) else ""

    def _take(self, *texts: str) -> bool:
        taken = self._peek() in texts
        self._next += taken
        return taken

    def _expect(self, text: str) -> None:
        if not self._take(text):
            raise Unreadable(f"expected {text!r}")

    def _marks(self) -> str:
        """A subscript, primes, or both."""
        marks = ""
        while True:
            if self._take("'"):
                marks += "'"
            elif self._peek() == "^" and self._peek(1) in ("\\prime", "*"):
                marks += "'" if self._peek(1) == "\\prime" else "*"
                self._next += 2
            elif self._peek() == "^" and self._peek(1) == "{" and self._peek(2) == "\\prime":
                self._next += 2
                while self._take("\\prime"):
                    marks += "'"
                self._expect("}")
            elif self._take("_"):
                marks += "_" + self._raw()
            else:
                return marks

    def _raw(self) -> str:
        """The characters of a group or of one token, which name something."""
        if not self._take("{"):
            self._next += 1
            return _bare(self._peek(-1))
        text, depth = "", 1
        while token := self._peek():
            self._next += 1
            depth += (token == "{") - (token == "}")
            if depth == 0:
                return text
            text += _bare(token)
        raise Unreadable("a brace is not closed")


def _bare(token: str) -> str:
    return token[token.index("{") + 1 : -1].strip() if token.startswith("\\text") else token


def function(name: str, inner: Tree, subscript: Tree | None) -> Tree:
    """Return the tree of a named function; `subscript`: the base of a logarithm."""
    if name == "exp":
        return ("pow", ("e",), inner)
    if name in ("ln", "log", "lg"):
        base = Fraction(10) if name == "lg" else subscript
        return ("fn", "log", inner) if base is None else ("div", ("fn", "log", inner), ("fn", "log", base))
    if name in _HYPERBOLIC:
        up, down = ("pow", ("e",), inner), ("pow", ("e",), negative(inner))
        minus, plus = ("add", up, negative(down)), ("add", up, down)
        return ("div", plus if name == "cosh" else minus, plus if name == "tanh" else Fraction(2))
    return ("fn", name.replace("arc", "a"), inner)


def negative(tree: Tree) -> Tree:
    """Return the tree times -1."""
    return ("mul", Fraction(-1), tree)


def children(tree: Tree) -> list[Tree]:
    """Return the trees right below a node."""
    return [part for part in tree[1:] if not isinstance(part, str)] if isinstance(tree, tuple) else []


def symbols(tree: Tree) -> frozenset[str]:
    """Return the names of the free symbols."""
    if isinstance(tree, Fraction):
        return frozenset()
    if tree[0] == "sym":
        return frozenset((tree[1],))
    if tree[0] == "range":
        return (symbols(tree[5]) - {tree[2]}) | symbols(tree[3]) | symbols(tree[4])
    return frozenset().union(*map(symbols, children(tree)))


def holds(tree: Tree, *kinds: str) -> bool:
    """Return whether a node or a function of one of these kinds occurs."""
    if isinstance(tree, Fraction):
        return False
    is_one = tree[0] in kinds or tree[0] == "fn" and tree[1] in kinds
    return is_one or any(holds(part, *kinds) for part in children(tree))
