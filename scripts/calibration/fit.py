"""Fits the constants of megatron_rl/plan/seconds.py to published.csv, and predicts its rows, held out or not.

Three fits, each to what its rows can tell: training rows give matrix, attention, elementwise and tp_link, linearly;
then verl's ratio of old log-probabilities to update gives forward; then whole RL steps give decode and token_seconds.
Each minimises the sum of |predicted / published - 1|, which a few rows with costs that the formulas do not know cannot
drag along.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np

from megatron_rl.models.hardware import HARDWARE
from megatron_rl.plan.seconds import Constants, generation_seconds, pass_seconds, pass_work
from megatron_rl.plan.shapes import Spread, bubble

from . import published
from .published import RLCase, Row, TrainingCase

_NEUTRAL = Constants(
    matrix=1.0, attention=1.0, elementwise=1.0, tp_link=1.0, forward=1.0, decode=1.0, token_seconds=0.0
)


@dataclass(frozen=True, slots=True)
class Scored:
    """One published row: what it says and what the formulas say, in one unit."""

    row: Row
    published: float
    predicted: float

    @property
    def error(self) -> float:
        """Return the relative error, signed."""
        return self.predicted / self.published - 1.0


def fit(rows: Sequence[Row], *, generation: bool = True) -> Constants:
    """Return the constants that fit these rows alone, those of generation only when asked for. A kind of row that is
    missing leaves its constants neutral."""
    chosen = {id(row) for row in rows}
    training = [case for case in published.training_cases() if id(case.row) in chosen]
    constants = _NEUTRAL
    if training:
        shares = np.array([_shares(case) for case in training])
        matrix, attention, elementwise, tp_link = _least_deviations(shares)
        constants = replace(constants, matrix=matrix, attention=attention, elementwise=elementwise, tp_link=tp_link)
    ratios = [row for row in published.forward_rows() if id(row) in chosen]
    if ratios:
        constants = replace(
            constants, forward=statistics.median(1 / (1 + s.error) for s in forward_scores(ratios, constants))
        )
    steps = [case for case in published.rl_cases() if id(case.row) in chosen]
    if steps and generation:
        constants = min(_generation_grid(constants), key=lambda candidate: _rl_deviation(steps, candidate))
    return constants


def training_scores(cases: Sequence[TrainingCase], constants: Constants) -> list[Scored]:
    """Return the seconds of each case, published and predicted."""
    weights = np.array([constants.matrix, constants.attention, constants.elementwise, constants.tp_link])
    return [Scored(case.row, case.seconds, float(_shares(case) @ weights) * case.seconds) for case in cases]


def forward_scores(rows: Sequence[Row], constants: Constants) -> list[Scored]:
    """Return each row's seconds of old log-probabilities over those of the update; layers recomputed, as verl does by
    default."""
    scored = []
    for row in rows:
        shape, layout = published.shape(row), Spread(recompute="full")
        one: dict[str, Any] = {"tokens": 1.0, "context": published.RATIO_CONTEXT, "micro_batches": 1}
        forward, update = (
            pass_seconds(shape, layout, HARDWARE["h100"], constants, backward=backward, **one)
            for backward in (False, True)
        )
        scored.append(Scored(row, float(row["old_logp_s"]) / float(row["update_s"]), forward / update))
    return scored


def rl_scores(cases: Sequence[RLCase], constants: Constants) -> list[Scored]:
    """Return the seconds of whole steps: generation, two forward passes (old and reference log-probabilities),
    update."""
    return [Scored(case.row, case.seconds, rl_seconds(case, constants)) for case in cases]


def rl_seconds(case: RLCase, constants: Constants) -> float:
    """Return the predicted seconds of one published step."""
    generation = generation_seconds(case.shape, case.hardware, constants, case.generation)
    forward, update = (
        pass_seconds(
            case.shape,
            case.layout,
            case.hardware,
            constants,
            tokens=case.tokens,
            context=case.context,
            micro_batches=case.micro_batches,
            backward=backward,
        )
        for backward in (False, True)
    )
    return generation + 2 * forward + update


def held_out(
    score: Callable[[list[Row], Constants], list[Scored]],
    rows: Sequence[Row],
    key: Callable[[Row], str],
    *,
    generation: bool = False,
) -> list[Scored]:
    """Return each row as predicted by constants that were fitted without any row of the same key."""
    scored = []
    for value in sorted({key(row) for row in rows}):
        constants = fit([row for row in published.rows() if key(row) != value], generation=generation)
        scored += score([row for row in rows if key(row) == value], constants)
    return scored


def _shares(case: TrainingCase) -> np.ndarray:
    """Return the seconds at the peaks over the published seconds, by kind of work."""

    def work(recompute: str) -> np.ndarray:
        layout = replace(case.layout, recompute=recompute)
        return np.array(astuple(pass_work(case.shape, layout, case.hardware, case.tokens, case.context, backward=True)))

    once, again = work("none"), work("full")
    seconds = once + case.recomputed * (again - once)
    return seconds * (1.0 + bubble(case.layout, case.micro_batches)) / case.seconds


def _least_deviations(shares: np.ndarray) -> list[float]:
    """Return the non-negative x that minimises sum |shares x - 1|: an optimum lies where some columns are 0 and as many
    rows as the others fit exactly, so that trying all such points finds it."""
    rows, columns = shares.shape
    best, least = np.zeros(columns), float("inf")
    for count in range(1, columns + 1):
        exact = np.array(list(itertools.combinations(range(rows), count)))
        for used in itertools.combinations(range(columns), count):
            corners = shares[exact][:, :, used]
            corners = corners[np.abs(np.linalg.det(corners)) > 1e-12]
            points = np.zeros((len(corners), columns))
            points[:, used] = np.linalg.solve(corners, np.ones((len(corners), count, 1)))[:, :, 0]
            points = points[(points >= 0).all(1)]
            deviations = np.abs(points @ shares.T - 1.0).sum(1)
            if len(points) and deviations.min() < least:
                best, least = points[deviations.argmin()], float(deviations.min())
    return [float(value) for value in best]


def _rl_deviation(cases: Sequence[RLCase], constants: Constants) -> float:
    return sum(abs(scored.error) for scored in rl_scores(cases, constants))


def _generation_grid(constants: Constants) -> list[Constants]:
    """Return constants with decode from 1 to 3 in steps of 0.1, token_seconds from 0 to 15 ms in steps of 1 ms."""
    return [
        replace(constants, decode=1.0 + 0.1 * decode, token_seconds=1e-3 * step)
        for decode in range(21)
        for step in range(16)
    ]
