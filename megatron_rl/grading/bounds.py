"""How much work an answer may ask of the parser and of sympy. Both compute whatever a text says, and neither stops.

An answer beyond the bounds is refused before the work begins, unless the gold answer is as large.
"""

from __future__ import annotations

import math
import re
from typing import Any

from megatron_rl.grading import latex

# digits raised to powers of digits, or to five digits and more; factorials of five digits or of factorials: reading
# them would compute numbers that no memory holds
_EXPLOSIVE = re.compile(r"\d\s*\^\s*(?:\{?\s*\(?\s*\d+\s*\^\s*[{(]?\s*\d|\{?\s*\(?\s*\d{5,})|\d{5,}\)?\s*!|!\s*\)?\s*!")
_MAX_PARSED = 400  # characters
_MAX_DEPTH = 8  # of braces and brackets; the parser's time grows exponentially with it
_MAX_COLONS = 2  # the parser takes minutes over long ratios
_MAX_BARS = 8  # it pairs bars in every way
_MAX_OPERATORS = 4  # their reach is open to many readings
_OPERATOR = re.compile(r"\\(?:i+nt|oint|sum|prod|lim)(?![a-z])")

# the parser itself computes binomials and what is rounded down or up
_CHOOSE = re.compile(r"\\[dt]?binom\s*(?=\{)")
_LARGE = re.compile(r"!|\d[eE]\d|\d{5,}|\\infty|\^\s*\{?\s*\d{2,}|\d\s*\}?\s*\^\s*\{?\s*\d|\\[dt]?binom")
_ROUNDS = re.compile(r"\\l(?:floor|ceil)(?![a-z])")

_MAX_NODES = 300
_MAX_DIGITS = 20_000.0  # of the numbers together; 2013^{4025} is a gold answer
_MAX_TERMS = 500.0  # once multiplied out
_MAX_EXPONENT = 10_000.0
_MAX_ROOTED = 2_000.0  # digits under a root or in a logarithm, of which sympy seeks the prime factors
_MAX_ANGLE = 30.0  # digits of an angle
_MAX_MULTIPLE = 2.0  # digits of n in sin(n x) and (x + n)!, which sympy writes out, and in sinh(n)
_MAX_SUMMED = 200.0  # terms of a sum or product with numbers as limits
_UNDONE = ("Limit", "Derivative")  # left to the reader; sympy may try for ever, as with integrals but of polynomials
_WRITTEN_OUT = ("factorial", "factorial2", "gamma", "binomial", "RisingFactorial", "FallingFactorial", "subfactorial")

_HYPERBOLIC = ("sinh", "cosh", "tanh", "coth", "sech", "csch")


def readable(found: str, gold: str) -> bool:
    """Whether the parser is to read a cleaned answer."""
    return (
        len(found) <= max(_MAX_PARSED, 4 * len(gold))
        and not _EXPLOSIVE.search(found)
        and not _chooses_among_many(found)
        and not (_ROUNDS.search(found) and _OPERATOR.search(found) and not _OPERATOR.search(gold))
        and found.count(":") <= max(_MAX_COLONS, gold.count(":"))
        and found.count("|") <= max(_MAX_BARS, gold.count("|"))
        and len(_OPERATOR.findall(found)) <= max(_MAX_OPERATORS, len(_OPERATOR.findall(gold)))
        and latex.depth(found) <= max(_MAX_DEPTH, latex.depth(gold))
    )


def _chooses_among_many(text: str) -> bool:
    for match in _CHOOSE.finditer(text):
        upper = latex.matching_brace(text, match.end())
        lower = latex.matching_brace(text, upper + 1) if text[upper + 1 : upper + 2] == "{" else upper
        if upper < 0 or lower < 0 or _LARGE.search(text, match.end(), lower):
            return True
    return False


def workable(found: Any, gold: Any) -> bool:
    """Whether sympy is to compare two expressions as the parser gave them, which is before any evaluation."""
    try:
        nodes, digits, terms = _measure(found)
    except _TooMuch:
        return False
    try:
        gold_nodes, gold_digits, gold_terms = _measure(gold)
    except _TooMuch:
        return False  # such a gold is met by its own text
    return (
        nodes <= max(_MAX_NODES, 4 * gold_nodes)
        and digits <= max(_MAX_DIGITS, 2 * gold_digits)
        and terms <= max(_MAX_TERMS, 2 * gold_terms)
    )


class _TooMuch(Exception):
    pass


_Size = tuple[int, float, float]  # nodes; digits that the numbers may get; terms once multiplied out


def _measure(expression: Any) -> _Size:
    """Upper bounds, from the leaves up. Raises: _TooMuch."""
    import sympy

    if not isinstance(expression, sympy.Basic):
        entries = list(expression) if isinstance(expression, sympy.MatrixBase) else []
        return _together([_measure(entry) for entry in entries])
    if expression.is_Number:
        return 1, _digits(expression), 1.0
    if expression.is_NumberSymbol:
        return 1, 0.5, 1.0
    name, arguments = type(expression).__name__, expression.args
    if name in _UNDONE:
        raise _TooMuch
    if name == "Integral" and not _elementary(expression):
        raise _TooMuch
    if name in ("Sum", "Product"):
        return _summed(expression)
    if isinstance(expression, sympy.Pow):
        return _power(*arguments)
    if isinstance(expression, sympy.exp):
        return _power(sympy.E, *arguments)
    sizes = [_measure(argument) for argument in arguments]
    nodes, digits, terms = _together(sizes)
    if isinstance(expression, sympy.Add) and _rational(expression):
        terms = 1.0
    elif isinstance(expression, sympy.Mul):
        terms = math.prod(size[2] for size in sizes)
    elif name in _WRITTEN_OUT:
        digits, terms = _factorial(expression, digits), 1.0
    elif isinstance(expression, sympy.Function):
        limit = _MAX_MULTIPLE if expression.free_symbols or name in _HYPERBOLIC else _MAX_ANGLE
        if isinstance(expression, sympy.log):
            limit = _MAX_ROOTED
        if digits > limit and not isinstance(expression, sympy.floor | sympy.ceiling | sympy.Abs):
            raise _TooMuch
        terms = 1.0
    return _checked(nodes, digits, terms)


def _together(sizes: list[_Size]) -> _Size:
    # denominators multiply, so digits add up in sums too
    return _checked(1 + sum(size[0] for size in sizes), sum(s[1] for s in sizes), max(1.0, sum(s[2] for s in sizes)))


def _elementary(integral: Any) -> bool:
    """Whether it is of a polynomial between numbers or letters: others are summed up point by point, or never."""
    import sympy

    ends = [end for limits in integral.limits for end in limits[1:]]
    plain = all(end.is_Number and _digits(end) < _MAX_MULTIPLE or end.is_Symbol and end.name != "i" for end in ends)
    return plain and integral.function.is_polynomial(*integral.variables) and not integral.function.has(sympy.Function)


def _rational(expression: Any) -> bool:
    """Whether it is one number, however it is written."""
    import sympy

    whole = all(number.is_Integer for power in expression.atoms(sympy.Pow) for number in power.exp.atoms(sympy.Number))
    return whole and not expression.has(sympy.Symbol, sympy.NumberSymbol, sympy.Function, sympy.I)


def _checked(nodes: int, digits: float, terms: float) -> _Size:
    # far above the bounds in `workable`, so that no later step overflows
    if nodes > 100_000 or digits > 1e6 or terms > 1e6:
        raise _TooMuch
    return nodes, digits, terms


def _digits(number: Any) -> float:
    if number.is_Rational:
        bits = max(abs(number.p).bit_length(), number.q.bit_length()) - 1
        return bits * math.log10(2)
    return abs(float(number._mpf_[2] + number._mpf_[3])) * math.log10(2) if number.is_Float else 0.0


def _largest(expression: Any, digits: float) -> float:
    """What the value of a constant is below. Raises: _TooMuch."""
    if expression.is_Number and expression.is_finite:
        return abs(float(expression))
    if digits >= math.log10(_MAX_EXPONENT):
        raise _TooMuch
    return 10.0 ** (digits + 1)


def _power(base: Any, exponent: Any) -> _Size:
    import sympy

    nodes, digits, terms = _measure(base)
    up_nodes, up_digits, up_terms = _measure(exponent)
    nodes += up_nodes + 1
    if exponent.free_symbols:
        if any(power.exp.has(sympy.Pow) for power in exponent.atoms(sympy.Pow)):
            raise _TooMuch  # a tower of four
        return _checked(nodes, digits * max(1.0, up_digits) + up_digits, terms * up_terms)
    if exponent.is_Rational and exponent.q > 1 and digits > _MAX_ROOTED:
        raise _TooMuch
    times = _largest(exponent, up_digits)
    if times > _MAX_EXPONENT:
        raise _TooMuch
    if terms > 1 and times > 1:
        n, t = int(min(times, _MAX_EXPONENT)), int(terms)
        terms = float(min(math.comb(n + t - 1, t - 1), 10**7))
    return _checked(nodes, digits * max(1.0, times), terms)


def _factorial(expression: Any, digits: float) -> float:
    """Digits of a factorial or binomial of arguments with `digits`. Raises: _TooMuch."""
    if expression.free_symbols:
        if digits > _MAX_MULTIPLE:
            raise _TooMuch
        return digits
    largest = max(_largest(argument, _measure(argument)[1]) for argument in expression.args)
    if largest > _MAX_EXPONENT:
        raise _TooMuch
    return largest * (math.log10(2) if type(expression).__name__ == "binomial" else math.log10(largest + 1))


def _summed(expression: Any) -> _Size:
    nodes, digits, terms = _measure(expression.function)
    for _, *limits in expression.limits:
        if len(limits) != 2 or not all(limit.is_Integer for limit in limits):
            raise _TooMuch
        count = abs(float(limits[1]) - float(limits[0])) + 1
        if count > _MAX_SUMMED:
            raise _TooMuch
        digits, terms = (digits + max(_digits(limit) for limit in limits)) * count, terms * count
    return _checked(nodes, digits, terms)
