"""Fits: the reward-entropy law of the Entropy Mechanism, and straight lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_POINTS = 3  # two parameters pass through any two points, whatever the data


@dataclass(frozen=True, slots=True)
class LineFit:
    """y = slope * x + intercept by least squares. With `problem` set there is no fit and the numbers are NaN."""

    slope: float
    intercept: float
    correlation: float  # Pearson; NaN when y is constant
    residuals: tuple[float, ...]  # y - fit, at the finite points in their order
    num_points: int
    problem: str = ""


@dataclass(frozen=True, slots=True)
class LawFit:
    """R = -a e^H + b. With `problem` set there is no fit: it says why, and a and b are None."""

    a: float | None  # how much reward a unit of e^H costs: entropy traded for reward
    b: float | None  # -a + b is the ceiling the law predicts at H = 0
    r2: float | None  # explained fraction of the variance; None when the reward is constant
    residual_std: float | None  # reward units, n - 2 degrees of freedom
    entropy: tuple[float, ...]  # nats, the finite points that were fitted
    reward: tuple[float, ...]
    residuals: tuple[float, ...]  # reward - fit
    problem: str = ""

    def at(self, entropy: Sequence[float]) -> list[float]:
        """The law's reward at entropies in nats. Raises: ValueError when there is no fit."""
        if self.a is None or self.b is None:
            raise ValueError(f"there is no fitted law: {self.problem}")
        return [-self.a * math.exp(h) + self.b for h in entropy]


def fit_line(x: Sequence[float], y: Sequence[float]) -> LineFit:
    """Least squares over the pairs in which both are finite. Never raises on data: `problem` says what is missing."""
    pairs = np.array([(u, v) for u, v in zip(x, y, strict=True) if math.isfinite(u) and math.isfinite(v)]).reshape(
        -1, 2
    )
    xs, ys = pairs[:, 0], pairs[:, 1]
    nothing = LineFit(math.nan, math.nan, math.nan, (), len(pairs))
    if len(pairs) < MIN_POINTS:
        return _with_problem(nothing, f"{len(pairs)} points; a fit needs at least {MIN_POINTS}")
    spread = xs - xs.mean()
    if np.abs(spread).max() <= 1e-9 * max(np.abs(xs).max(), 1e-300):
        return _with_problem(nothing, "all points have the same abscissa, so no slope is defined")
    # the mean of equal numbers can differ from them in the last bit, and that is no variance to explain
    rise = np.zeros_like(ys) if np.ptp(ys) == 0 else ys - ys.mean()
    slope = float(spread @ rise / (spread @ spread))
    intercept = float(ys.mean() - slope * xs.mean())
    scale = math.sqrt(float(spread @ spread) * float(rise @ rise))
    correlation = float(spread @ rise) / scale if scale > 0 else math.nan
    return LineFit(slope, intercept, correlation, tuple((ys - slope * xs - intercept).tolist()), len(pairs))


def fit_law(entropy: Sequence[float], reward: Sequence[float]) -> LawFit:
    """Fit R = -a e^H + b, which is linear in e^H. `entropy` in nats, one pair per step; non-finite pairs are left out.

    Source: arXiv 2505.22617, equation 1 (R = -a exp(H) + b).
    """
    pairs = [(h, r) for h, r in zip(entropy, reward, strict=True) if math.isfinite(h) and math.isfinite(r)]
    hs, rs = tuple(h for h, _ in pairs), tuple(r for _, r in pairs)
    line = fit_line([math.exp(h) for h in hs], rs)
    if line.problem:
        same = "the entropy is constant, so a and b cannot be told apart"
        return LawFit(None, None, None, None, hs, rs, (), same if len(pairs) >= MIN_POINTS else line.problem)
    squares = float(np.sum(np.square(line.residuals)))
    total = float(np.sum(np.square(np.array(rs) - np.mean(rs))))
    r2 = None if math.isnan(line.correlation) else 1.0 - squares / total
    residual_std = math.sqrt(squares / (len(pairs) - 2))
    return LawFit(-line.slope, line.intercept, r2, residual_std, hs, rs, line.residuals)


def _with_problem(fit: LineFit, problem: str) -> LineFit:
    return LineFit(fit.slope, fit.intercept, fit.correlation, fit.residuals, fit.num_points, problem)
