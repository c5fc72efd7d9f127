"""The law's intervals, its alarm while a run goes on, and its test on the run's own later part."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from megatron_rl.metrics.entropy_law import MIN_ONLINE, LawMonitor, fit_law

A, B = 0.2, 0.6


def run_of(
    steps: int, seed: int, noise: float = 0.02, rho: float = 0.0, bend: Callable[[int], float] = lambda _: 0.0
) -> tuple[list[float], list[float]]:
    """Entropies that fall from 0.7 to 0.2 nats and rewards by the law, with noise of the given lag-1 correlation."""
    draw, error, rewards = np.random.default_rng(seed), 0.0, []
    entropies = np.linspace(0.7, 0.2, steps).tolist()
    for step, entropy in enumerate(entropies):
        fresh = draw.normal()
        error = fresh if step == 0 else rho * error + math.sqrt(1 - rho**2) * fresh
        rewards.append(B - A * math.exp(entropy) + noise * error + bend(step))
    return entropies, rewards


def test_intervals_against_the_textbook() -> None:
    """Least squares on e^H by numpy's own covariance, t quantile 2.228 for 10 degrees, no correlation of neighbours."""
    h = [math.log(x) for x in range(1, 13)]
    r = [1.0, 0.9, 0.85, 0.6, 0.75, 0.4, 0.55, 0.2, 0.35, 0.05, 0.1, -0.2]
    fit = fit_law(h, r)
    assert fit.autocorrelation == 0.0 and fit.a is not None and fit.b is not None
    x = np.arange(1.0, 13.0)
    (slope, intercept), cov = np.polyfit(x, r, 1, cov=True)
    assert (-fit.a, fit.b) == pytest.approx((slope, intercept))
    t = 2.2281
    for interval, centre, variance in (
        (fit.a_interval, -slope, cov[0, 0]),
        (fit.b_interval, intercept, cov[1, 1]),
        (fit.ceiling_interval, intercept + slope, cov[0, 0] + cov[1, 1] + 2 * cov[0, 1]),
    ):
        assert interval == pytest.approx((centre - t * variance**0.5, centre + t * variance**0.5), rel=1e-4)
    assert fit.residual_std is not None
    spread = fit.residual_std**2 + cov[0, 0] * 9 + cov[1, 1] + 2 * 3 * cov[0, 1]  # a new point at e^H = 3
    band = fit.band(math.log(3.0))
    assert band == pytest.approx(
        (intercept + 3 * slope - t * spread**0.5, intercept + 3 * slope + t * spread**0.5), rel=1e-4
    )


@pytest.mark.parametrize("rho", [0.0, 0.6])
def test_intervals_cover_the_truth_as_often_as_they_say(rho: float) -> None:
    """95% of 300 runs within sampling error; neighbours that are alike would take a naive interval down to 70%."""
    hits = []
    for seed in range(300):
        interval = fit_law(*run_of(120, seed, rho=rho)).ceiling_interval
        assert interval is not None
        hits.append(interval[0] <= B - A <= interval[1])
    assert 0.90 <= np.mean(hits) <= 0.99


def test_without_degrees_of_freedom_there_is_no_interval() -> None:
    fit = fit_law([0.1, 0.5, 0.9, 0.7], [0.5, 0.4, 0.2, 0.35])
    assert fit.a is not None and fit.a_interval is None and fit.ceiling_interval is None and fit.band(0.3) is None
    flat = fit_law([0.5] * 30, [0.1] * 30)
    assert flat.ceiling is None and flat.ceiling_interval is None
    assert LawMonitor().observe(math.nan, 0.5) == {}


def watch(entropies: list[float], rewards: list[float]) -> list[dict[str, float]]:
    monitor = LawMonitor()
    return [monitor.observe(h, r) for h, r in zip(entropies, rewards, strict=True)]


def test_the_alarm_keeps_quiet_on_the_law_and_sounds_when_it_breaks() -> None:
    quiet = [max(row.get("law/alarm", 0.0) for row in watch(*run_of(120, seed))) for seed in range(20)]
    assert sum(quiet) <= 1
    rows = watch(*run_of(120, 3, bend=lambda step: -0.15 if step >= 80 else 0.0))
    alarms = [step for step, row in enumerate(rows) if row.get("law/alarm")]
    assert alarms[0] == 82  # the third step after the break
    assert all(row["law/surprise"] < -1 for row in rows[80:83])
    assert "law/a" not in rows[MIN_ONLINE - 2] and rows[MIN_ONLINE - 1]["law/a"] == pytest.approx(A, abs=0.1)
    last = rows[79]
    assert last["law/ceiling_low"] < last["law/ceiling"] == last["law/b"] - last["law/a"] < last["law/ceiling_high"]


def test_three_steps_on_one_side_make_an_alarm() -> None:
    bends = {40: 0.3, 41: 0.3, 42: -0.3, 43: -0.3, 44: -0.3, 45: -0.3}
    rows = watch(*run_of(46, 3, bend=lambda step: bends.get(step, 0.0)))
    assert [int(row["law/surprise"] > 0) for row in rows[40:]] == [1, 1, 0, 0, 0, 0]
    assert [row["law/alarm"] for row in rows[40:]] == [0, 0, 0, 0, 1, 1]


def test_a_monitor_from_its_state_goes_on_the_same() -> None:
    entropies, rewards = run_of(60, 5, bend=lambda step: 0.2 if step in (38, 39, 40, 41) else 0.0)
    whole = watch(entropies, rewards)
    first = LawMonitor()
    rows = [first.observe(h, r) for h, r in zip(entropies[:40], rewards[:40], strict=True)]
    second = LawMonitor(**first.state())
    rows += [second.observe(h, r) for h, r in zip(entropies[40:], rewards[40:], strict=True)]
    assert rows == whole and whole[40]["law/alarm"] == 1.0  # two of the three steps were before the stop
