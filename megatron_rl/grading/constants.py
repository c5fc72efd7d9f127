"""What a tree is at a point: a Fraction where it is rational, else a tree of Fractions, pi, e and i."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import mpmath

from megatron_rl.grading.grammar import Tree, children, holds
from megatron_rl.grading.separation import Undefined, numeric, sign

_MAX_BITS = 150_000  # of a rational number: 2013^4025 has 44,000
_MAX_SUMMED = 300
_MAX_SUMMED_TWICE = 20  # of a sum over sums
_MAX_ROOT = 5_000
_MAX_EXPONENT = 20_000  # of what is not rational
Point = dict[str, Fraction]


def _check_size(bits: float) -> None:
    if bits > _MAX_BITS:
        raise Undefined("more digits than are computed")


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def folded(tree: Tree, point: Point) -> Any:
    """Return the constant that a tree is at a point. Raises: Undefined."""
    if isinstance(tree, Fraction):
        return tree
    kind = tree[0]
    if kind == "sym":
        if tree[1] not in point:
            raise Undefined(f"no value for {tree[1]}")
        return point[tree[1]]
    if kind in ("pi", "e", "i"):
        return tree
    if kind == "range":
        return _ranged(tree, point)
    parts = [folded(part, point) for part in children(tree)]
    if kind == "add":
        return add(parts)
    if kind == "mul":
        return multiply(parts)
    if kind == "div":
        return multiply([parts[0], _to_the(parts[1], -1)])
    if kind == "pow":
        return _power(*parts)
    return _applied(tree[1], parts)


def add(parts: list[Any]) -> Any:
    """Return the sum of constants. Raises: Undefined when it has too many digits."""
    rational, others = Fraction(0), []
    for part in parts:
        if isinstance(part, Fraction):
            rational += part
            _check_size(_bits(rational))
        else:
            others.append(part)
    if not others:
        return rational
    return ("add", rational, *others) if rational or len(others) > 1 else others[0]


def multiply(parts: list[Any]) -> Any:
    """Return the product of constants. Raises: Undefined when it has too many digits."""
    rational, others, turns = Fraction(1), [], 0
    flat = [p for part in parts for p in (part[1:] if isinstance(part, tuple) and part[0] == "mul" else (part,))]
    for part in flat:
        if isinstance(part, Fraction):
            rational *= part
            _check_size(_bits(rational))
        elif part == ("i",):
            turns += 1
        else:
            others.append(part)
    if turns % 4 >= 2:
        rational = -rational
    if turns % 2:
        others.append(("i",))
    if not rational or not others:
        return rational
    return ("mul", rational, *others) if rational != 1 or len(others) > 1 else others[0]


def _to_the(base: Any, n: int) -> Any:
    if isinstance(base, Fraction):
        if not base and n < 0:
            raise Undefined("division by zero")
        _check_size(_bits(base) * abs(n) if abs(base) != 1 else 0)
        return base**n
    if base == ("i",):
        return multiply([base] * (n % 4))
    if n in (0, 1):
        return Fraction(1) if n == 0 else base
    if abs(n) > _MAX_EXPONENT:
        raise Undefined("the exponent is too large")
    if n < 0 and base[0] == "mul":
        return multiply([_to_the(part, n) for part in base[1:]])
    return ("pow", base, n)


def _power(base: Any, exponent: Any) -> Any:
    if not isinstance(exponent, Fraction):
        if base == 0:
            raise Undefined("a power of zero")
        return Fraction(1) if base == 1 else ("fn", "power", base, exponent)
    if exponent.denominator == 1:
        return _to_the(base, exponent.numerator)
    if base == ("e",):
        return ("fn", "power", base, exponent)
    root = exponent.denominator
    if root > _MAX_ROOT:
        raise Undefined("the root is too high")
    if isinstance(base, Fraction) and base < 0 and root % 2 == 0:
        is_square_root = exponent == Fraction(1, 2)
        return multiply([("i",), _rooted(-base, 2)]) if is_square_root else ("fn", "power", base, exponent)
    return _rooted(_to_the(base, exponent.numerator), root)


def _rooted(base: Any, root: int) -> Any:
    if isinstance(base, Fraction):
        side = -1 if base < 0 else 1
        top, bottom = _exact_root(abs(base.numerator), root), _exact_root(base.denominator, root)
        if top is not None and bottom is not None:
            return Fraction(side * top, bottom)
        if side < 0:
            return multiply([Fraction(-1), ("root", -base, root)])
    return ("root", base, root)


def _exact_root(value: int, root: int) -> int | None:
    if value < 2:
        return value
    if root == 2:
        found = math.isqrt(value)
        return found if found * found == value else None
    if value.bit_length() <= root:
        return None
    with mpmath.workprec(value.bit_length() // root + 40):
        found = int(mpmath.nint(mpmath.root(mpmath.mpf(value), root)))
    return found if found**root == value else None


def _ranged(tree: Tree, point: Point) -> Any:
    _, name, variable, low, high, body = tree
    start, stop = folded(low, point), folded(high, point)
    whole = isinstance(start, Fraction) and isinstance(stop, Fraction) and start.denominator == stop.denominator == 1
    most = _MAX_SUMMED if not holds(body, "range") else _MAX_SUMMED_TWICE
    if not whole or stop - start > most or _nesting(body) > 1:
        raise Undefined("limits that are not computed")
    parts = [folded(body, point | {variable: Fraction(k)}) for k in range(int(start), int(stop) + 1)]
    return (add if name == "sum" else multiply)(parts)


def _nesting(tree: Tree) -> int:
    deepest = max(map(_nesting, children(tree)), default=0)
    return deepest + (isinstance(tree, tuple) and tree[0] == "range")


def _applied(name: str, parts: list[Any]) -> Any:
    first = parts[0]
    if name == "abs":
        direction = sign(first)
        if direction is None:
            return ("fn", "abs", first)
        return first if direction >= 0 else multiply([Fraction(-1), first])
    if name in ("floor", "ceil"):
        return _whole(first, name)
    if name in ("max", "min"):
        return _extreme(name, parts)
    if name in ("factorial", "factorial2", "binomial", "gcd", "lcm"):
        if not all(isinstance(part, Fraction) and part.denominator == 1 for part in parts):
            raise Undefined(f"{name} of what is not an integer")
        return Fraction(_of_integers(name, [int(part) for part in parts]))
    if name == "log":
        if first == 1:
            return Fraction(0)
        if first == ("e",):
            return Fraction(1)
        if first == 0:
            raise Undefined("the logarithm of zero")
    if first == 0 and name in ("sin", "tan", "asin", "atan"):
        return Fraction(0)
    return ("fn", name, *parts)


def _of_integers(name: str, numbers: list[int]) -> int:
    if name in ("gcd", "lcm"):
        return (math.gcd if name == "gcd" else math.lcm)(*numbers)
    n = numbers[0]
    if n < 0 or n > 20_000:
        raise Undefined(f"{name} of a number out of bounds")
    if name == "binomial":
        return math.comb(n, numbers[1]) if numbers[1] >= 0 else 0
    _check_size(n * math.log2(n + 1))
    return math.factorial(n) if name == "factorial" else math.prod(range(n, 0, -2))


def _extreme(name: str, parts: list[Any]) -> Any:
    best = parts[0]
    for part in parts[1:]:
        direction = sign(add([part, multiply([Fraction(-1), best])]))
        if direction is None:
            raise Undefined(f"{name} of complex numbers")
        if (direction > 0) == (name == "max"):
            best = part
    return best


def _whole(value: Any, name: str) -> Fraction:
    if isinstance(value, Fraction):
        return Fraction(math.floor(value) if name == "floor" else math.ceil(value))
    near = numeric(value, 256)
    if isinstance(near, mpmath.mpc) and near.imag or abs(near) > 2**200:
        raise Undefined("rounding what is not real, or is too large")
    with mpmath.workprec(256):
        nearest = int(mpmath.nint(near.real))
        if abs(near.real - nearest) < mpmath.mpf(2) ** -40:
            direction = sign(add([value, Fraction(-nearest)]))
            beside = direction or 0
            return Fraction(nearest + (min(beside, 0) if name == "floor" else max(beside, 0)))
        return Fraction(int(mpmath.floor(near.real) if name == "floor" else mpmath.ceil(near.real)))
