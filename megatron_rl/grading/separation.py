"""Constants to any precision, and whether one is 0, exactly.

A constant is a Fraction, or a tree whose leaves are Fractions, pi, e and i (grading/constants.py makes them). It is
evaluated with more and more digits until it is clearly not 0, or until it is smaller than any number but 0 that such an
expression can have. That bound is proven for algebraic numbers (roots of any depth, complex ones too); for pi, e,
logarithms and angles the same bound is taken with a wide margin, since none is known.

Source of the bound: Burnikel, Funke, Mehlhorn, Schirra, Schmitt, "A separation bound for real algebraic expressions".
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import mpmath

from megatron_rl.grading.grammar import children

_MAX_PRECISION = 40_000  # bits
_MAX_TRANSCENDENTAL = 8_000
_MARGIN = 320  # bits beyond the bound, where a transcendental number occurs


class Undefined(ValueError):
    """There is no value: division by zero, a logarithm of zero, a bound of work that was passed."""


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
