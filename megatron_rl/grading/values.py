"""Decide whether two expressions are equal, exactly.

Rational numbers are computed as fractions. Other constants are compared through their difference: it is evaluated with
more and more digits until it is clearly not 0, or until it is smaller than any number but 0 that such an expression
can have. That bound is proven for algebraic numbers (roots of any depth, complex ones too); for pi, e, logarithms and
angles the same bound is taken with a wide margin, since none is known.
Expressions with symbols are compared at points that the symbols' names choose.

Source of the bound: Burnikel, Funke, Mehlhorn, Schirra, Schmitt, "A separation bound for real algebraic expressions".
"""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction
from itertools import count
from typing import Any

from megatron_rl.grading.expression import Tree, holds, symbols

_MAX_BITS = 150_000  # of a rational number: 2013^4025 has 44,000
_MAX_PRECISION = 40_000  # bits
_MARGIN = 320  # bits beyond the bound, where a transcendental number occurs
_MAX_SUMMED = 300
_MAX_ROOT = 5_000
_POINTS = 6  # at which two expressions must agree
_WHOLE = ("floor", "ceil", "factorial", "factorial2", "binomial", "gcd", "lcm", "range")
Point = dict[str, Fraction]


class Undefined(ValueError):
    """There is no value: division by zero, a logarithm of zero, a bound of work that was passed."""


def _check_size(bits: float) -> None:
    if bits > _MAX_BITS:
        raise Undefined("more digits than are computed")


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


# --- constants: a Fraction where it is rational, else a tree whose leaves are Fractions, pi, e and i --------------------


def folded(tree: Tree, point: Point) -> Any:
    """Return the constant that a tree is at a point. Raises: Undefined."""
    kind = tree[0]
    if kind == "num":
        return tree[1]
    if kind == "sym":
        if tree[1] not in point:
            raise Undefined(f"no value for {tree[1]}")
        return point[tree[1]]
    if kind in ("pi", "e", "i"):
        return tree
    if kind == "range":
        return _ranged(tree, point)
    parts = [folded(part, point) for part in tree[2 if kind == "fn" else 1 :]]
    if kind == "add":
        return _add(parts)
    if kind == "mul":
        return _multiply(parts)
    if kind == "div":
        return _multiply([parts[0], _to_the(parts[1], Fraction(-1))])
    if kind == "pow":
        return _power(*parts)
    return _applied(tree[1], parts)


def _add(parts: list[Any]) -> Any:
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


def _multiply(parts: list[Any]) -> Any:
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


def _to_the(base: Any, exponent: Fraction) -> Any:
    """A power with an exponent that is an integer."""
    n = exponent.numerator
    if isinstance(base, Fraction):
        if not base and n < 0:
            raise Undefined("division by zero")
        _check_size(_bits(base) * abs(n) if abs(base) != 1 else 0)
        return base**n
    if base == ("i",):
        return _multiply([base] * (n % 4))
    if n in (0, 1):
        return Fraction(1) if n == 0 else base
    if n < 0 and base[0] == "mul":
        return _multiply([_to_the(part, exponent) for part in base[1:]])
    return ("pow", base, n)


def _power(base: Any, exponent: Any) -> Any:
    if not isinstance(exponent, Fraction):
        if isinstance(base, Fraction) and not base:
            raise Undefined("a power of zero")
        return Fraction(1) if base == 1 else ("fn", "power", base, exponent)
    if exponent.denominator == 1:
        return _to_the(base, exponent)
    if base == ("e",):
        return ("fn", "power", base, exponent)
    root = exponent.denominator
    if root > _MAX_ROOT:
        raise Undefined("the root is too high")
    if isinstance(base, Fraction) and base < 0 and root % 2 == 0:
        return _multiply([("i",), _to_the(_rooted(-base, 2), Fraction(1))]) if exponent == Fraction(1, 2) else (
            ("fn", "power", base, exponent)
        )  # fmt: skip
    return _rooted(_to_the(base, Fraction(exponent.numerator)), root)


def _rooted(base: Any, root: int) -> Any:
    if isinstance(base, Fraction):
        sign = -1 if base < 0 else 1
        top, bottom = _exact_root(abs(base.numerator), root), _exact_root(base.denominator, root)
        if top is not None and bottom is not None:
            return Fraction(sign * top, bottom)
        if sign < 0:
            return _multiply([Fraction(-1), ("root", -base, root)])
    return ("root", base, root)


def _exact_root(value: int, root: int) -> int | None:
    if value < 2:
        return value
    if root == 2:
        found = math.isqrt(value)
        return found if found * found == value else None
    if value.bit_length() <= root:
        return None
    import mpmath

    with mpmath.workprec(value.bit_length() // root + 40):
        found = int(mpmath.nint(mpmath.root(mpmath.mpf(value), root)))
    return found if found**root == value else None


def _ranged(tree: Tree, point: Point) -> Any:
    _, name, variable, low, high, body = tree
    start, stop = folded(low, point), folded(high, point)
    whole = isinstance(start, Fraction) and isinstance(stop, Fraction) and start.denominator == stop.denominator == 1
    if not whole or stop - start > _MAX_SUMMED:
        raise Undefined("limits that are not computed")
    parts = [folded(body, point | {variable: Fraction(k)}) for k in range(int(start), int(stop) + 1)]
    return (_add if name == "sum" else _multiply)(parts)


def _applied(name: str, parts: list[Any]) -> Any:
    first = parts[0]
    if name == "abs":
        if isinstance(first, Fraction):
            return abs(first)
        sign = _sign(first)
        return ("fn", "abs", first) if sign is None else first if sign >= 0 else _multiply([Fraction(-1), first])
    if name in ("floor", "ceil"):
        return _whole(first, name)
    if name in ("max", "min", "gcd", "lcm"):
        return _of_several(name, parts)
    if name in ("factorial", "factorial2", "binomial"):
        if not all(isinstance(part, Fraction) for part in parts):
            raise Undefined(f"{name} of what is not rational")
        return _counted(name, parts)
    if name == "log":
        if first == ("e",) or first == 1:
            return Fraction(first == ("e",))
        if first == 0:
            raise Undefined("the logarithm of zero")
    if isinstance(first, Fraction) and not first and name in ("sin", "tan", "arcsin", "arctan", "sinh", "tanh"):
        return Fraction(0)
    return ("fn", name, *parts)


def _counted(name: str, parts: list[Fraction]) -> Fraction:
    if any(part.denominator != 1 for part in parts):
        raise Undefined(f"{name} of a fraction")
    n = int(parts[0])
    if n < 0 or n > 20_000:
        raise Undefined(f"{name} of {n}")
    if name == "binomial":
        k = int(parts[1])
        _check_size(float(min(n, max(k, 0) * 15)))
        return Fraction(math.comb(n, k) if k >= 0 else 0)
    _check_size(n * math.log2(n + 1))
    return Fraction(math.factorial(n) if name == "factorial" else math.prod(range(n, 0, -2)))


def _of_several(name: str, parts: list[Any]) -> Any:
    if name in ("gcd", "lcm"):
        if not all(isinstance(part, Fraction) and part.denominator == 1 for part in parts):
            raise Undefined(f"{name} of what is not an integer")
        return Fraction((math.gcd if name == "gcd" else math.lcm)(*(int(part) for part in parts)))
    best = parts[0]
    for part in parts[1:]:
        sign = _sign(_add([part, _multiply([Fraction(-1), best])]))
        if sign is None:
            raise Undefined(f"{name} of complex numbers")
        if (sign > 0) == (name == "max"):
            best = part
    return best


def _whole(value: Any, name: str) -> Fraction:
    if isinstance(value, Fraction):
        return Fraction(math.floor(value) if name == "floor" else math.ceil(value))
    import mpmath

    near = _numeric(value, 256)
    if isinstance(near, mpmath.mpc) and near.imag or abs(near) > 2**200:
        raise Undefined("rounding what is not real, or is too large")
    with mpmath.workprec(256):
        nearest = int(mpmath.nint(near.real))
        if abs(near.real - nearest) < mpmath.mpf(2) ** -40:
            sign = _sign(_add([value, Fraction(-nearest)]))
            shift = 0 if sign == 0 else (sign or 0)
            return Fraction(nearest + (min(shift, 0) if name == "floor" else max(shift, 0)))
        return Fraction(int(mpmath.floor(near.real) if name == "floor" else mpmath.ceil(near.real)))


def _sign(value: Any) -> int | None:
    """-1, 0 or 1; None for what is not real."""
    if isinstance(value, Fraction):
        return (value > 0) - (value < 0)
    if is_zero(value):
        return 0
    import mpmath

    near = _clear(value)
    return None if isinstance(near, mpmath.mpc) and near.imag else 1 if near.real > 0 else -1


# --- numbers to any precision ---------------------------------------------------------------------------------------------


def _numeric(value: Any, precision: int) -> Any:
    import mpmath

    with mpmath.workprec(precision):
        try:
            return +_evaluated(value, mpmath)
        except (ZeroDivisionError, OverflowError, ValueError, TypeError) as error:
            raise Undefined(str(error)) from error


def _evaluated(value: Any, mp: Any) -> Any:
    if isinstance(value, Fraction):
        return mp.mpf(value.numerator) / value.denominator
    kind = value[0]
    if kind == "pi":
        return +mp.pi
    if kind == "e":
        return +mp.e
    if kind == "i":
        return mp.mpc(0, 1)
    if kind == "pow":
        return _evaluated(value[1], mp) ** value[2]
    if kind == "root":
        base = _evaluated(value[1], mp)
        if value[2] % 2 and not (isinstance(base, mp.mpc) and base.imag) and base.real < 0:
            return -mp.root(-base.real, value[2])  # the real root of a negative number, as schools have it
        return mp.root(base, value[2])
    parts = [_evaluated(part, mp) for part in value[2 if kind == "fn" else 1 :]]
    if kind == "add":
        return mp.fsum(parts)
    if kind == "mul":
        return mp.fprod(parts)
    name = value[1]
    if name == "power":
        return _raised(*parts, mp)
    if name == "abs":
        return abs(parts[0])
    if any(abs(part) > 10**6 for part in parts) and name != "log":
        raise ValueError("an angle too large")
    return getattr(mp, _MPMATH.get(name, name))(*parts)


_MPMATH = {
    "log": "log", "arcsin": "asin", "arccos": "acos", "arctan": "atan", "arccot": "acot", "arcsec": "asec",
    "arccsc": "acsc",
}  # fmt: skip


def _raised(base: Any, exponent: Any, mp: Any) -> Any:
    if abs(exponent) * max(1, abs(mp.log(base))) > 100_000:
        raise ValueError("a power too large")
    return base**exponent


def _bound(value: Any, roots: dict[Any, int]) -> tuple[float, float]:
    """log2 of the bounds u and l of the source; collects the roots, whose product of indices is the degree."""
    if isinstance(value, Fraction):
        return math.log2(abs(value.numerator) or 1), math.log2(value.denominator)
    kind = value[0]
    if kind == "pi" or kind == "e":
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
    parts = [_bound(part, roots) for part in value[2 if kind == "fn" else 1 :]]
    if kind == "mul":
        return sum(p[0] for p in parts), sum(p[1] for p in parts)
    if kind == "add":
        low = sum(p[1] for p in parts)
        return max(p[0] + low - p[1] for p in parts) + math.log2(len(parts)), low
    roots["transcendental"] = 1
    size = abs(_numeric(value, 64))
    if not size:
        return 1.0, 0.0
    import mpmath

    exponent = float(mpmath.log(size, 2))
    return max(1.0, exponent + 1), max(0.0, 1 - exponent)


def _needed(value: Any) -> int:
    """Bits after the point at which a value that is not 0 must show. Raises: Undefined when they are too many."""
    roots: dict[Any, int] = {}
    up, low = _bound(value, roots)
    degree = math.prod(roots.values())
    transcendental = any(isinstance(key, str) and key != "i" for key in roots)
    bits = low + (degree - 1) * up + (_MARGIN + up if transcendental else 8)
    if bits + up > _MAX_PRECISION:
        raise Undefined("more digits than are computed")
    return int(bits) + 1


def is_zero(value: Any) -> bool:
    """Return whether a constant is 0. Raises: Undefined."""
    if isinstance(value, Fraction):
        return not value
    if _clear(value, at_most=400) is not None:
        return False
    needed = _needed(value)
    import mpmath

    # twice the bits, because roots and inverse functions lose half of them near 0 and 1
    return bool(abs(_numeric(value, 2 * needed + 128)) < mpmath.mpf(2) ** -needed)


def _clear(value: Any, at_most: int = _MAX_PRECISION) -> Any:
    """The value where two precisions agree on it; None when none up to `at_most` bits do, as with 0."""
    precision = 100
    before = _numeric(value, precision)
    while precision < at_most:
        precision *= 2
        after = _numeric(value, precision)
        if after and abs(after - before) < abs(after) * 2.0**-20:
            return after
        before = after
    return None


# --- expressions ----------------------------------------------------------------------------------------------------------


def same(a: Tree, b: Tree) -> bool:
    """Return whether two expressions are equal for all values of their symbols."""
    return _agree(a, b, lambda x, y, _: _equal(x, y))


def same_relation(a: Tree, b: Tree, *, positive: bool = False) -> bool:
    """Return whether a = 0 and b = 0 say the same, one being a multiple of the other; `positive`: a positive one, as
    in a < 0."""
    if not symbols(a) or symbols(a) != symbols(b):
        return False
    factors: list[tuple[Any, Any]] = []

    def proportional(x: Any, y: Any, _: Point) -> bool:
        if _is_zero_quietly(x) or _is_zero_quietly(y):
            return _is_zero_quietly(x) and _is_zero_quietly(y)
        factors.append((x, y))
        first = factors[0]
        if positive and _sign(_multiply([x, y])) != 1:
            return False
        return _equal(_multiply([x, first[1]]), _multiply([y, first[0]]))

    return _agree(a, b, proportional)


def _is_zero_quietly(value: Any) -> bool:
    return is_zero(value)


def _equal(x: Any, y: Any) -> bool:
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    return x == y or is_zero(_add([x, _multiply([Fraction(-1), y])]))


def _agree(a: Tree, b: Tree, compare: Any) -> bool:
    names = sorted(symbols(a) | symbols(b))
    imaginary = holds(a, "i") or holds(b, "i")
    if not names:
        try:
            return bool(compare(folded(a, {}), folded(b, {}), {}))
        except Undefined:
            return False
    used = 0
    for point in _points(names, whole=holds(a, *_WHOLE) or holds(b, *_WHOLE)):
        try:
            x, y = folded(a, point), folded(b, point)
            if not imaginary and not (_is_real(x) and _is_real(y)):
                continue
            if not compare(x, y, point):
                return False
        except Undefined:
            continue
        used += 1
        if used == _POINTS:
            return True
    return used >= 3


def _is_real(value: Any) -> bool:
    if isinstance(value, Fraction):
        return True
    near = _numeric(value, 100)
    return not getattr(near, "imag", 0) or abs(near.imag) < 1e-20 * abs(near)


def _points(names: list[str], *, whole: bool) -> Any:
    """Points that a policy cannot choose; positive ones, negative ones and ones between 0 and 1."""
    for i in range(24):
        drawn = {name: _drawn(name, i) for name in names}
        if whole or i % 4 == 3:
            yield {name: Fraction(2 + d % (5 + 2 * i)) for name, d in drawn.items()}
        elif i % 4 == 0:
            yield {name: Fraction(101 + d % 9000, 7 + d % 83) for name, d in drawn.items()}
        elif i % 4 == 1:
            yield {name: Fraction(1 + d % 400, 401 + d % 97) for name, d in drawn.items()}
        else:
            yield {name: Fraction(-1 - d % 5003, 11 + d % 71) for name, d in drawn.items()}


def _drawn(name: str, draw: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{draw} {name}".encode(errors="replace"), digest_size=6).digest(), "big")


def constant(tree: Tree) -> Fraction | None:
    """Return a real constant to 60 digits, for roundings alone; None for complex numbers and where symbols occur."""
    if symbols(tree):
        return None
    try:
        value = folded(tree, {})
        near = value if isinstance(value, Fraction) else _clear(value, at_most=2000)
    except Undefined:
        return None
    if isinstance(near, Fraction) or near is None:
        return near
    if getattr(near, "imag", 0):
        return None
    sign, mantissa, exponent, _ = near.real._mpf_
    return Fraction(int(mantissa)) * Fraction(2) ** exponent * (-1 if sign else 1)
