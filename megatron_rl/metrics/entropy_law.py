"""Fits: the reward-entropy law of the Entropy Mechanism with its intervals and alarm; and straight lines.

Steps of a run are no independent draws: residuals of neighbouring steps are alike. All standard errors are therefore
widened by sqrt((1 + rho) / (1 - rho)), rho the residuals' correlation at lag 1 (where positive), which is what
independent errors would give for n (1 - rho) / (1 + rho) points.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist
from typing import Any

import numpy as np

MIN_POINTS = 3  # two parameters pass through any two points, whatever the data
MIN_ONLINE = 20  # steps before a run's own law is reported
LEVEL = 0.95  # of all intervals and bands
ALARM_AFTER = 3  # steps in a row outside of the band, on one side; by chance 1 in 30,000

Interval = tuple[float, float]


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
    autocorrelation: float = 0.0  # of the residuals at lag 1, at least 0
    a_interval: Interval | None = None  # 95%; None without degrees of freedom
    b_interval: Interval | None = None

    def at(self, entropy: Sequence[float]) -> list[float]:
        """Return the law's reward at entropies in nats. Raises: ValueError when there is no fit."""
        if self.a is None or self.b is None:
            raise ValueError(f"there is no fitted law: {self.problem}")
        return [-self.a * math.exp(h) + self.b for h in entropy]

    @property
    def ceiling(self) -> float | None:
        """Return b - a: the reward that the law predicts when all entropy is spent (H = 0)."""
        return None if self.a is None or self.b is None else self.b - self.a

    @property
    def ceiling_interval(self) -> Interval | None:
        """Return the 95% interval of the ceiling, in reward units."""
        return None if self.ceiling is None else _around(self.ceiling, self._half_width(0.0, new=False))

    def band(self, entropy: float) -> Interval | None:
        """Return the interval of a new step's reward with 95% probability, if the law still holds. Raises: as `at`."""
        return _around(self.at([entropy])[0], self._half_width(entropy, new=True))

    def _half_width(self, entropy: float, *, new: bool) -> float | None:
        x = np.exp(np.array(self.entropy))
        spread = (math.exp(entropy) - x.mean()) ** 2 / np.square(x - x.mean()).sum()
        widening = _widening(self.autocorrelation)
        factor = _t_factor(len(x), self.autocorrelation)
        if factor is None or self.residual_std is None:
            return None
        # a new observation's own scatter is no average, so it is not widened
        return factor * self.residual_std * math.sqrt(float(new) + widening**2 * (1 / len(x) + spread))


@dataclass(slots=True)
class LawMonitor:
    """A run's law while it goes on: what was seen, as plain data that a checkpoint keeps."""

    entropy: list[float] = field(default_factory=list)
    reward: list[float] = field(default_factory=list)
    outside: int = 0  # steps in a row above the band, or minus those below it

    def observe(self, entropy: float, reward: float) -> dict[str, float]:
        """Add a step and report `law/*`: a, b, r2, the ceiling with its interval, all fitted to the steps so far; and
        how the step agreed with the law of the steps before it: `law/surprise`, the distance from the law in
        half-widths of the 95% band (beyond 1 is outside), and `law/alarm`, 1 from the third step in a row outside on
        one side. Empty before step 20 and while no law can be fitted.
        """
        before = fit_law(self.entropy, self.reward) if len(self.entropy) >= MIN_ONLINE else None
        if math.isfinite(entropy) and math.isfinite(reward):
            self.entropy.append(entropy)
            self.reward.append(reward)
        metrics = self._surprise(before, entropy, reward)
        now = fit_law(self.entropy, self.reward)
        if len(self.entropy) < MIN_ONLINE or now.a is None or now.b is None or now.ceiling is None:
            return metrics
        metrics |= {"law/a": now.a, "law/b": now.b, "law/ceiling": now.ceiling}
        if now.r2 is not None:
            metrics["law/r2"] = now.r2
        if now.ceiling_interval is not None:
            metrics |= dict(zip(("law/ceiling_low", "law/ceiling_high"), now.ceiling_interval, strict=True))
        return metrics

    def _surprise(self, law: LawFit | None, entropy: float, reward: float) -> dict[str, float]:
        band = law.band(entropy) if law is not None and law.a is not None and math.isfinite(entropy) else None
        if band is None or band[0] == band[1]:
            return {}
        surprise = (reward - sum(band) / 2) / ((band[1] - band[0]) / 2)
        if abs(surprise) <= 1:
            self.outside = 0
        else:
            side = int(math.copysign(1, surprise))
            self.outside = self.outside + side if self.outside * side > 0 else side
        return {"law/surprise": surprise, "law/alarm": float(abs(self.outside) >= ALARM_AFTER)}

    def state(self) -> dict[str, Any]:
        """Return what was seen, as plain data for a checkpoint."""
        return {"entropy": list(self.entropy), "reward": list(self.reward), "outside": self.outside}


def fit_line(x: Sequence[float], y: Sequence[float]) -> LineFit:
    """Fit a line by least squares over the finite pairs. Never raises on data: `problem` says what is missing."""
    pairs = np.array([(u, v) for u, v in zip(x, y, strict=True) if math.isfinite(u) and math.isfinite(v)]).reshape(
        -1, 2
    )
    xs, ys = pairs[:, 0], pairs[:, 1]
    nothing = LineFit(math.nan, math.nan, math.nan, (), len(pairs))
    if len(pairs) < MIN_POINTS:
        return replace(nothing, problem=f"{len(pairs)} points; a fit needs at least {MIN_POINTS}")
    spread = xs - xs.mean()
    if np.abs(spread).max() <= 1e-9 * max(np.abs(xs).max(), 1e-300):
        return replace(nothing, problem="all points have the same abscissa, so no slope is defined")
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
    rho = _autocorrelation(line.residuals)
    a, b = -line.slope, line.intercept
    x = np.exp(np.array(hs))
    scatter = float(np.square(x - x.mean()).sum())
    factor = _t_factor(len(x), rho)
    unit = None if factor is None else factor * residual_std * _widening(rho)
    fitted = a, b, r2, residual_std, hs, rs, line.residuals
    return LawFit(
        *fitted,
        autocorrelation=rho,
        a_interval=None if unit is None else _around(a, unit / math.sqrt(scatter)),
        b_interval=None if unit is None else _around(b, unit * math.sqrt(1 / len(x) + float(x.mean()) ** 2 / scatter)),
    )


def _autocorrelation(residuals: Sequence[float]) -> float:
    """Return the correlation at lag 1, in [0, 0.99]: negative ones would narrow the intervals on thin evidence."""
    values = np.array(residuals)
    squares = float(values @ values)
    return min(max(float(values[1:] @ values[:-1]) / squares, 0.0), 0.99) if squares > 0 else 0.0


def _widening(rho: float) -> float:
    return math.sqrt((1 + rho) / (1 - rho))


def _t_factor(num_points: int, rho: float) -> float | None:
    """Return Student's t quantile of the two-sided 95% interval at effective points - 2 degrees; None below 3 degrees.

    Expansion in 1 / degrees, off by less than 0.006 from 3 on. Source: Abramowitz and Stegun, 26.7.5.
    """
    degrees = num_points / _widening(rho) ** 2 - 2
    if degrees < 3:
        return None
    z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, start=1))


def _around(value: float, half_width: float | None) -> Interval | None:
    return None if half_width is None else (value - half_width, value + half_width)
