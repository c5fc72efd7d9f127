"""Expressions: math-verify reads them, values at a point tell most different ones apart, and sympy decides the rest."""

from __future__ import annotations

import hashlib
import logging
from fractions import Fraction
from functools import lru_cache
from typing import Any

_DIFFERENT = 1e-3  # relative, and absolute: far above the roundings that math-verify forgives


@lru_cache(maxsize=1024)  # the samples of one prompt share their gold
def parsed(text: str) -> Any:
    """sympy's reading of a cleaned answer, or None."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off
    normalization = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all")
    target = LatexExtractionConfig(normalization_config=normalization, boxed_match_priority=0)
    found = parse(f"\\boxed{{{text}}}", [target], fallback_mode="no_fallback", parsing_timeout=None)
    return found[0] if found else None


def with_imaginary_unit(expression: Any) -> Any:
    """With i as the square root of -1, which the parser leaves a symbol, unless a sum or the like runs over it."""
    import sympy

    free = [symbol for symbol in getattr(expression, "free_symbols", ()) if symbol.name == "i"]
    if not free or (isinstance(expression, sympy.Basic) and expression.has(sympy.Sum, sympy.Product)):
        return expression
    try:
        return expression.xreplace(dict.fromkeys(free, sympy.I))
    except Exception:
        return expression  # an order of complex numbers, or what else has none


def constant(expression: Any) -> Fraction | None:
    """The value of a real constant to 30 digits; None for sets, matrices and expressions with symbols."""
    try:
        value = expression.evalf(30)
        return Fraction(str(value)) if value.is_Float or value.is_Rational else None
    except Exception:  # sympy raises whatever its functions do, and an answer can hold any of them
        return None


def same(found: Any, gold: Any) -> bool:
    """Whether two expressions are equal. Values decide first: sympy takes long to simplify what is not 0."""
    from math_verify import verify

    if _differ(found, gold):
        return False
    return bool(verify(gold, found, allow_set_relation_comp=True, timeout_seconds=None))


def _differ(found: Any, gold: Any) -> bool:
    a = _value(found)
    b = _value(gold) if a is not None else None
    if a is None or b is None:
        return False
    gap = abs(a - b)
    return bool(gap > _DIFFERENT and gap > _DIFFERENT * max(abs(a), abs(b)))


def _value(expression: Any) -> Any:
    """The complex value of a plain expression, with numbers between 1 and 2 for its symbols; None when it has none."""
    import sympy

    if not isinstance(expression, sympy.Expr) or expression.has(sympy.MatrixBase):
        return None
    hundredth = sympy.UnevaluatedExpr(sympy.Rational(1, 100))  # a percent sign
    if hundredth in expression.args:
        return None  # math-verify takes 50% for 50 and for a half
    try:
        expression = expression.xreplace({hundredth: sympy.Rational(1, 100)})
        points = {symbol: _point(symbol.name) for symbol in expression.free_symbols}
        value = expression.evalf(15, subs=points)
        return value if value.is_number and value.is_finite and not value.has(sympy.Function) else None
    except Exception:  # as above; without a value verify decides, so that nothing is refused or accepted by it
        return None


def _point(name: str) -> Any:
    """By the name alone, upper case or lower, as math-verify compares names."""
    import sympy

    digest = hashlib.sha256(name.casefold().encode(errors="replace")).digest()
    return sympy.Float(1 + int.from_bytes(digest[:4], "big") / 2**32)
