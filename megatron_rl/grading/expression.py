"""Read an expression, in LaTeX or as typed, into a tree. What the grammar does not know is not read at all.

Upper and lower case are different symbols; a subscript, a prime or an accent belongs to its symbol.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

from megatron_rl.grading import grammar
from megatron_rl.grading.grammar import OF_SEVERAL, PREFIX, Tokens, Tree, Unreadable, children, holds, negative
from megatron_rl.grading.latex import SPELLINGS
from megatron_rl.grading.numerals import repeating

_MAX_DEPTH = 40  # of sums in brackets
_MAX_TREE = 100
_MAX_EXPONENT = 20_000  # of ten, as in 1e5
_DEGREE = ("\\circ", "\\degree")
_GREEK, _ACCENTS, _STOPS = (frozenset(SPELLINGS[name].split()) for name in ("greek", "accents", "stops"))
_FUNCTION_LETTERS = set("fghuvyFGHUPQ\\")
_CLOSING = {"(": ")", "[": "]", "{": "}", "\\{": "\\}"}


@lru_cache(maxsize=4096)  # the samples of one prompt share their gold
def read(text: str) -> Tree:
    """Return the tree of a cleaned text. Raises: Unreadable."""
    try:
        tree = _Reader(text).all()
    except RecursionError as error:
        raise Unreadable("too deep") from error
    deepest, level = 0, [tree]
    while level:
        deepest += 1
        level = [part for node in level for part in children(node)]
    if deepest > _MAX_TREE:
        raise Unreadable("too deep")
    return tree


def _joined(kind: str, parts: list[Tree]) -> Tree:
    return parts[0] if len(parts) == 1 else (kind, *parts)


class _Reader(Tokens):
    """Each method reads what its name says and moves on."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._angle = 0  # inside a trigonometric function, where degrees are converted
        self._bars = 0  # inside |...|, where a bar closes
        self._readers: dict[str, Callable[[str], Tree]] = {
            "number": self._number,
            "repeating": repeating,
            "name": self._named,
            "letter": self._symbol,
            "text": self._of_text,
        }

    def all(self) -> Tree:
        """Return the tree of the whole text."""
        tree = self._sum()
        if self._next < len(self._tokens):
            raise Unreadable(f"{self._peek()!r} is not understood")
        return tree

    def _sum(self) -> Tree:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise Unreadable("too deep")
        terms = [self._signed(self._product)]
        while self._peek() in ("+", "-"):
            terms.append(self._signed(self._product))
        self._depth -= 1
        return _joined("add", terms)

    def _signed(self, read_unsigned: Callable[[], Tree]) -> Tree:
        if self._take("-"):
            return negative(read_unsigned())
        self._take("+")
        return read_unsigned()

    def _product(self) -> Tree:
        factors = [self._power()]
        while True:
            if self._take("*", "\\cdot", "\\times", "\\ast"):
                factors.append(self._signed(self._power))
            elif self._take("/", "\\div"):
                factors = [("div", _joined("mul", factors), self._signed(self._power))]
            elif self._starts_factor():
                if self._kind() == self._kind(-1) == "number" and isinstance(factors[-1], Fraction):
                    raise Unreadable("two numbers side by side")
                factors.append(self._power())
            else:
                return _joined("mul", factors)

    def _starts_factor(self) -> bool:
        kind, text = self._kind(), self._peek()
        if kind == "command":
            return text not in _STOPS
        return kind in self._readers or text in ("(", "[", "{") or text == "|" and not self._bars

    def _power(self) -> Tree:
        base = self._postfix(self._atom())
        while self._take("^"):
            if self._peek(1 if self._peek() == "{" else 0) in _DEGREE:
                base = self._degrees(base)
            else:
                base = self._postfix(("pow", base, self._exponent(base)))
        return base

    def _postfix(self, base: Tree) -> Tree:
        while True:
            if self._take("!"):
                base = ("fn", "factorial2" if self._take("!") else "factorial", base)
            elif self._take("\\%", "%"):
                base = ("div", base, Fraction(100))
            elif self._peek() == "\\degree":
                base = self._degrees(base)
            else:
                return base

    def _degrees(self, base: Tree) -> Tree:
        braced = self._take("{")
        self._next += 1
        if braced:
            self._expect("}")
        for part in (60, 3600):  # 30^\circ 15' 20''
            if self._kind() == "number" and self._peek(1) == "'":
                base = ("add", base, Fraction(self._peek()) / part)
                self._next += 2
                while self._take("'"):
                    pass
        return ("mul", base, ("div", ("pi",), Fraction(180))) if self._angle else base

    def _exponent(self, base: Tree) -> Tree:
        if self._take("-"):
            return negative(self._exponent(base))
        self._take("+")
        if self._take("{"):
            angle, self._angle = self._angle, 0
            inner = self._sum()
            self._angle = angle
            self._expect("}")
            return inner
        if self._starts_with_digit() and not self._plain and not isinstance(base, Fraction):
            return self._first_digit()
        exponent = self._atom()
        if self._take("^"):
            return ("pow", exponent, self._exponent(exponent))
        return exponent

    def _atom(self) -> Tree:
        kind, text = self._kind(), self._peek()
        self._next += 1
        if kind in self._readers:
            return self._readers[kind](text)
        if text in _CLOSING:
            return self._group(text)
        if kind == "command":
            return self._command(text)
        if text == "|":
            self._bars += 1
            inner = self._sum()
            self._bars -= 1
            self._expect("|")
            return ("fn", "abs", inner)
        raise Unreadable(f"{text!r} is not understood" if text else "it ends too early")

    def _group(self, opening: str) -> Tree:
        bars, self._bars = self._bars, 0
        inner = self._sum()
        self._bars = bars
        if opening == "(" and self._peek() == ",":
            raise Unreadable("a tuple")
        self._expect(_CLOSING[opening])
        return inner

    def _number(self, text: str) -> Tree:
        value = Fraction(text.rstrip(".") or "0")
        if self._kind() == "scientific":
            exponent = int(self._peek()[1:])
            self._next += 1
            if abs(exponent) > _MAX_EXPONENT:
                raise Unreadable("the exponent is too large")
            return value * Fraction(10) ** exponent
        is_mixed = text.isdigit() and self._peek() == "\\frac" and self._is_plain_fraction()
        if is_mixed and self._kind(-2) != "number" and self._peek(-2) not in ("^", "\\cdot", "\\times", "*", "/"):
            self._next += 1
            top, bottom = self._argument(), self._argument()
            return ("add", value, ("div", top, bottom))
        return value

    def _is_plain_fraction(self) -> bool:
        texts = [self._peek(ahead) for ahead in range(1, 7)]
        braced = texts[0] == texts[3] == "{" and texts[2] == texts[5] == "}"
        return texts[1].isdigit() and texts[4].isdigit() if braced else texts[0].isdigit()

    def _argument(self) -> Tree:
        """What a command is applied to: a group in braces, or one token."""
        if self._take("{"):
            return self._group("{")
        return self._first_digit() if self._starts_with_digit() else self._atom()

    def _starts_with_digit(self) -> bool:
        return self._kind() == "number" and len(self._peek()) > 1 and self._peek()[0].isdigit()

    def _first_digit(self) -> Tree:
        """The first digit of a number alone, as TeX takes it; the others stay."""
        digits = self._peek()
        self._tokens[self._next] = ("number", digits[1:])
        return Fraction(digits[0])

    def _symbol(self, name: str) -> Tree:
        name = name + self._marks()
        if name in ("e", "i"):
            return (name,)
        if self._peek() == "(" and self._peek(2) == ")":
            # f(0) and u(t) are values of functions; a product would be written 0f and ut
            if self._kind(1) == "number" or self._kind(1) == "letter" and name[0] in _FUNCTION_LETTERS:
                argument = self._peek(1)
                self._next += 3
                return ("sym", f"{name}({argument})")
        return ("sym", name)

    def _of_text(self, text: str) -> Tree:
        content = text[text.index("{") + 1 : -1].strip()
        if len(content) == 1 and content.isalpha():
            return self._symbol(content)
        if content in PREFIX or content in OF_SEVERAL:
            return self._named(content)
        if re.search(r"[\d+*/^=()-]", content) and not re.search(r"[A-Za-z]{2,}", content):
            return read(content)
        if re.fullmatch(r"[A-Za-z]{2,}", content) and self._peek() == "_":
            return ("sym", content + self._marks())
        raise Unreadable(f"words: {content!r}")

    def _command(self, command: str) -> Tree:
        name = command[1:]
        if name == "pi":
            return ("pi",) if self._peek() != "_" else ("sym", "pi" + self._marks())
        if name in _GREEK:
            return self._symbol("\\" + name)
        if name == "frac":
            return self._derivative() or ("div", self._argument(), self._argument())
        if name in ("binom", "choose"):
            return ("fn", "binomial", self._argument(), self._argument())
        if name == "sqrt":
            return self._root()
        if name in PREFIX or name in OF_SEVERAL:
            return self._named(name)
        if name in ("lfloor", "lceil"):
            inner = self._sum()
            self._expect("\\rfloor" if name == "lfloor" else "\\rceil")
            return ("fn", "floor" if name == "lfloor" else "ceil", inner)
        if name in ("sum", "prod"):
            return self._range(name)
        if name in _ACCENTS:
            return self._symbol(f"\\{name}{{{self._raw()}}}")
        if name in ("boldsymbol", "bm", "underline", "ensuremath"):
            return self._argument()
        raise Unreadable(f"{command} is not understood")

    def _derivative(self) -> Tree | None:
        """dy/dx as one name, which d y / (d x) is not; None when the fraction is something else."""
        if self._peek() != "{" or self._peek(1) not in ("d", "\\partial"):
            return None
        start, texts = self._next, [self._raw(), self._raw() if self._peek() == "{" else ""]
        match = re.fullmatch(r"(d|\\partial)(\^\w)?(\\?[A-Za-z].*)?", texts[0])
        if match and re.fullmatch(r"(?:d|\\partial)\\?[A-Za-z]\w*(\^\w)?", texts[1]):
            return ("sym", f"{texts[0]}/{texts[1]}")
        self._next = start
        return None

    def _root(self) -> Tree:
        index: Tree = Fraction(2)
        if self._take("["):
            index = self._sum()
            self._expect("]")
        inner = self._atom() if self._peek() == "(" else self._argument()
        return ("pow", inner, ("div", Fraction(1), index))

    def _named(self, name: str) -> Tree:
        if name == "pi":
            return ("pi",)
        if name in ("sqrt", "cbrt"):
            return ("pow", self._atom(), Fraction(1, 2 if name == "sqrt" else 3))
        if name in ("floor", "ceil", "abs"):
            return ("fn", name, self._atom())
        if name in OF_SEVERAL or name == "binom":
            return self._of_several(name)
        subscript, exponent = None, None
        while self._peek() in ("_", "^"):
            if self._take("^"):
                exponent = self._exponent(("sym", name))
            elif name == "log" and self._take("_"):
                subscript = self._argument()
            else:
                raise Unreadable("a subscript")
        is_angle = name in grammar.TRIGONOMETRIC
        self._angle += is_angle
        inner = self._applied_to(is_angle)
        self._angle -= is_angle
        if is_angle and exponent == negative(Fraction(1)):
            return ("fn", "a" + name, inner)
        value = grammar.function(name, inner, subscript)
        return value if exponent is None else ("pow", value, exponent)

    def _applied_to(self, is_angle: bool) -> Tree:
        """A group, or the product that follows without one."""
        if self._peek() in ("(", "[", "{"):
            group = self._atom()
            return ("pow", group, self._exponent(group)) if self._take("^") else self._postfix(group)
        if self._take("-"):
            return negative(self._applied_to(is_angle))
        value = self._power()
        while self._starts_factor() and self._kind() != "name" and self._peek()[1:] not in PREFIX:
            if self._peek() in ("(", "["):
                break
            value = ("mul", value, self._power())
        if is_angle and self._peek() == "/" and self._kind(1) == "number" and holds(value, "pi"):
            self._next += 1
            value = ("div", value, self._atom())
        return value

    def _of_several(self, name: str) -> Tree:
        opening = self._peek()
        if self._kind() == "letter":
            return ("sym", f"{name} {self._raw()}")
        if opening not in ("(", "\\{", "{"):
            raise Unreadable(f"{name} of what?")
        self._next += 1
        arguments = [self._sum()]
        while self._take(","):
            arguments.append(self._sum())
        self._expect(_CLOSING[opening])
        if name == "binom" and len(arguments) != 2:
            raise Unreadable("a binomial of other than two")
        return ("fn", "binomial" if name == "binom" else name, *arguments)

    def _range(self, name: str) -> Tree:
        low = high = variable = None
        for _ in range(2):
            if self._take("_"):
                self._expect("{")
                variable = self._peek()
                self._next += 1
                self._expect("=")
                low = self._sum()
                self._expect("}")
            elif self._take("^"):
                high = self._exponent(("sym", name))
        if low is None or high is None:
            raise Unreadable(f"the limits of a {name}")
        return ("range", name, variable, low, high, self._product())
