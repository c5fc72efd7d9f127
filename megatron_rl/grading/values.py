"""Decide whether two expressions are equal, exactly.

Rational numbers are computed as fractions; other constants are equal when their difference is 0, which
grading/constants.py decides. Expressions with symbols are compared at points that the symbols' names choose.
"""

import hashlib
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from megatron_rl.grading.constants import Undefined, add, clear, folded, is_zero, multiply, numeric, sign
from megatron_rl.grading.grammar import Tree, children, holds, symbols

_POINTS = 6  # at which two expressions must agree
_DRAWS = 24  # of points, some of which have no value
_WHOLE = ("floor", "ceil", "factorial", "factorial2", "binomial", "gcd", "lcm", "range")


def same(a: Tree, b: Tree) -> bool:
    """Return whether two expressions are equal for all values of their symbols."""
    return _agree(a, b, _equal)


def same_relation(a: Tree, b: Tree, *, positive: bool = False) -> bool:
    """Return whether a = 0 and b = 0 say the same, being multiples of each other; `positive`: positive, as in a < 0."""
    if not symbols(a) or symbols(a) != symbols(b):
        return False
    factors: list[tuple[Any, Any]] = []

    def proportional(x: Any, y: Any) -> bool:
        if is_zero(x) or is_zero(y):
            return is_zero(x) and is_zero(y)
        factors.append((x, y))
        first = factors[0]
        if positive and sign(multiply([x, y])) != 1:
            return False
        return _equal(multiply([x, first[1]]), multiply([y, first[0]]))

    return _agree(a, b, proportional)


def _equal(x: Any, y: Any) -> bool:
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    return x == y or is_zero(add([x, multiply([Fraction(-1), y])]))


def _agree(a: Tree, b: Tree, compare: Callable[[Any, Any], bool]) -> bool:
    """Whether the values compare well: of constants once, else at as many points as have one, at least three."""
    names = sorted(symbols(a) | symbols(b))
    whole = bool(names) and any(holds(tree, *_WHOLE) or _alternates(tree) for tree in (a, b))
    may_be_complex = not names or holds(a, "i") or holds(b, "i")
    least, draws = (3, _DRAWS) if names else (1, 1)
    used = 0
    for draw in range(draws):
        point = {name: _drawn(name, draw, whole=whole) for name in names}
        try:
            x, y = folded(a, point), folded(b, point)
            if not may_be_complex and not (_is_real(x) and _is_real(y)):
                continue
            if not compare(x, y):
                return False
        except (Undefined, ArithmeticError):
            continue
        used += 1
        if used == _POINTS:
            break
    return used >= least


def _alternates(tree: Tree) -> bool:
    """Whether a negative number is raised to a power with symbols, as (-1)^n."""
    if isinstance(tree, tuple) and tree[0] == "pow" and not symbols(tree[1]) and symbols(tree[2]):
        base = constant(tree[1])
        return base is not None and base < 0
    return any(map(_alternates, children(tree)))


def _is_real(value: Any) -> bool:
    if isinstance(value, Fraction):
        return True
    near = numeric(value, 100)
    return not getattr(near, "imag", 0) or abs(near.imag) < 1e-20 * abs(near)


def _drawn(name: str, draw: int, *, whole: bool) -> Fraction:
    """A number that a policy cannot choose: by turns above 1, between 0 and 1, negative, and whole."""
    number = int.from_bytes(hashlib.blake2b(f"{draw} {name}".encode(errors="replace"), digest_size=6).digest(), "big")
    match 3 if whole else draw % 4:
        case 0:
            return Fraction(101 + number % 9000, 7 + number % 83)
        case 1:
            return Fraction(1 + number % 400, 401 + number % 97)
        case 2:
            return Fraction(-1 - number % 5003, 11 + number % 71)
    return Fraction(2 + number % (5 + 2 * draw))


def constant(tree: Tree) -> Fraction | None:
    """Return a real constant to 60 digits, for roundings alone; None for complex numbers and where symbols occur."""
    try:
        value = folded(tree, {})
        near = value if isinstance(value, Fraction) else clear(value, at_most=2000)
    except (Undefined, ArithmeticError):
        return None
    if isinstance(near, Fraction) or near is None:
        return near
    if getattr(near, "imag", 0):
        return None
    sign, mantissa, exponent, _ = near.real._mpf_
    return Fraction(int(mantissa)) * Fraction(2) ** exponent * (-1 if sign else 1)
