"""Constants: what a tree is at a point, to any precision, and whether it is 0, exactly.

A constant is a Fraction where the tree is rational there, else a tree whose leaves are Fractions, pi, e and i. It is
evaluated with more and more digits until it is clearly not 0, or until it is smaller than any number but 0 that such an
expression can have. That bound is proven for algebraic numbers (roots of any depth, complex ones too); for pi, e,
logarithms and angles the same bound is taken with a wide margin, since none is known.

Source of the bound: Burnikel, Funke, Mehlhorn, Schirra, Schmitt, "A separation bound for real algebraic expressions".
"""

import math
from fractions import Fraction
from typing import Any

import mpmath

from megatron_rl.grading.grammar import Tree, children, holds

_MAX_BITS = 150_000  # of a rational number: 2013^4025 has 44,000
_MAX_SUMMED = 300
_MAX_SUMMED_TWICE = 20  # of a sum over sums
_MAX_ROOT = 5_000
_MAX_EXPONENT = 20_000  # of what is not rational
_MAX_PRECISION = 40_000  # bits
_MAX_TRANSCENDENTAL = 8_000
_MARGIN = 320  # bits beyond the bound, where a transcendental number occurs
Point = dict[str, Fraction]


class Undefined(ValueError):
    """There is no value: division by zero, a logarithm of zero, a bound of work that was passed."""


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
        if base < 0:
            return multiply([Fraction(-1), _rooted(-base, root)])
        top, bottom = _exact_root(base.numerator, root), _exact_root(base.denominator, root)
        if top is not None and bottom is not None:
            return Fraction(top, bottom)
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
        nearest = Fraction(int(mpmath.nint(near.real)))
    beside = sign(add([value, -nearest])) or 0
    return nearest + (min(beside, 0) if name == "floor" else max(beside, 0))


def numeric(value: Any, precision: int) -> Any:
    """Return a constant to `precision` bits, real or complex. Raises: Undefined."""
    with mpmath.workprec(precision):
        try:
            return +_evaluated(value)
        except (ZeroDivisionError, OverflowError, ValueError, TypeError) as error:
            raise Undefined(str(error)) from error


def _evaluated(value: Any) -> Any:
    if isinstance(value, Fraction):
        return mpmath.mpf(value.numerator) / value.denominator
    kind = value[0]
    if kind in ("pi", "e"):
        return +getattr(mpmath, kind)
    if kind == "i":
        return mpmath.mpc(0, 1)
    if kind == "pow":
        return _evaluated(value[1]) ** value[2]
    if kind == "root":
        base = _evaluated(value[1])
        if value[2] % 2 and not (isinstance(base, mpmath.mpc) and base.imag) and base.real < 0:
            return -mpmath.root(-base.real, value[2])  # the real root of a negative number, as schools have it
        return mpmath.root(base, value[2])
    parts = [_evaluated(part) for part in children(value)]
    if kind == "add":
        return mpmath.fsum(parts)
    if kind == "mul":
        return mpmath.fprod(parts)
    name = value[1]
    if name == "power":
        base, exponent = parts
        if abs(exponent) * max(1, abs(mpmath.log(base))) > 100_000:
            raise ValueError("a power too large")
        return base**exponent
    if name == "abs":
        return abs(parts[0])
    if any(abs(part) > 10**6 for part in parts) and name != "log":
        raise ValueError("an angle too large")
    return getattr(mpmath, name)(*parts)


def _bound(value: Any, roots: dict[Any, int]) -> tuple[float, float]:
    """log2 of the bounds u and l of the source; collects the roots, whose product of indices is the degree."""
    if isinstance(value, Fraction):
        return math.log2(abs(value.numerator) or 1), math.log2(value.denominator)
    kind = value[0]
    if kind in ("pi", "e"):
        roots[kind] = 1
        return 2.0, 0.0
    if kind == "i":
        roots[kind] = 2
        return 0.0, 0.0
    if kind == "pow":
        up, low = _bound(value[1], roots)
        n = value[2]
        return (up * n, low * n) if n > 0 else (low * -n, up * -n)
    if kind == "root":
        up, low = _bound(value[1], roots)
        roots[value] = value[2]
        return up / value[2], low / value[2]
    parts = [_bound(part, roots) for part in children(value)]
    if kind == "mul":
        return sum(p[0] for p in parts), sum(p[1] for p in parts)
    if kind == "add":
        low = sum(p[1] for p in parts)
        return max(p[0] + low - p[1] for p in parts) + math.log2(len(parts)), low
    roots["transcendental"] = 1
    size = abs(numeric(value, 64))
    if not size:
        return 1.0, 0.0
    exponent = float(mpmath.log(size, 2))
    # 1 - cos(x) is as small as x^2, and pi/2 - arctan(x) as 1/x
    argument = 4 * sum(up + low for up, low in parts)
    return max(1.0, exponent + 1), max(0.0, 1 - exponent) + argument


def _needed(value: Any) -> int:
    """Bits after the point at which a value that is not 0 must show. Raises: Undefined when they are too many."""
    roots: dict[Any, int] = {}
    up, low = _bound(value, roots)
    degree = math.prod(roots.values())
    transcendental = any(isinstance(key, str) and key != "i" for key in roots)
    bits = low + (degree - 1) * up + (_MARGIN + up if transcendental else 8)
    if not bits + up <= (_MAX_TRANSCENDENTAL if transcendental else _MAX_PRECISION):  # nan of infinities neither
        raise Undefined("more digits than are computed")
    return int(bits) + 1


def is_zero(value: Any) -> bool:
    """Return whether a constant is 0. Raises: Undefined."""
    if isinstance(value, Fraction):
        return not value
    if clear(value, at_most=400) is not None:
        return False
    needed = _needed(value)
    # twice the bits, because roots and inverse functions lose half of them near 0 and 1
    return bool(abs(numeric(value, 2 * needed + 128)) < mpmath.mpf(2) ** -needed)


def clear(value: Any, at_most: int = _MAX_PRECISION) -> Any:
    """The value where two precisions agree on it; None when none up to `at_most` bits do, as with 0."""
    precision = 100
    before = numeric(value, precision)
    while precision < at_most:
        precision *= 2
        after = numeric(value, precision)
        if after and abs(after - before) < abs(after) * 2.0**-20:
            return after
        before = after
    return None


def sign(value: Any) -> int | None:
    """-1, 0 or 1; None for what is not real."""
    if isinstance(value, Fraction):
        return (value > 0) - (value < 0)
    if is_zero(value):
        return 0
    near = clear(value)
    return None if isinstance(near, mpmath.mpc) and near.imag else 1 if near.real > 0 else -1
