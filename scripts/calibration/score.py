"""How far the planner's predictions are from measurements that its constants have not seen."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.config import load_config
from megatron_rl.models.hardware import HARDWARE

from . import fit, published
from .fit import Scored
from .measured import measured_peaks, predicted_bytes
from .published import Row, model_name

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"


@dataclass(frozen=True, slots=True)
class Score:
    """Relative errors of one kind of prediction, fractions."""

    what: str
    held_out: str  # how the rows were kept from the fit
    rows: int
    median: float
    worst: float


def all_errors() -> dict[str, tuple[str, str, list[tuple[str, float]]]]:
    """Return kind -> (what, how held out, [(row, relative error)]). Leaves out a model at a time, as a user's model is
    one that nobody fitted; rows of one model differ too little to tell."""
    training = [case.row for case in published.training_cases()]
    steps = [case.row for case in published.rl_cases()]
    return {
        "training": (
            "seconds of forward and backward",
            "constants fitted without the row's model",
            _named(fit.held_out(_training, training, model_name)),
        ),
        "training_stack": (
            "the same",
            "constants fitted without the row's stack",
            _named(fit.held_out(_training, training, lambda row: row["stack"])),
        ),
        "forward": (
            "old log-probabilities over update",
            "constants fitted without the row",
            _named(fit.held_out(fit.forward_scores, published.forward_rows(), lambda row: json.dumps(row))),
        ),
        "step": (
            "seconds of a whole RL step",
            "constants fitted without the row's model",
            _named(fit.held_out(_steps, steps, model_name, generation=True)),
        ),
        "memory": (
            "peak GPU memory of training",
            "no row was fitted",
            [(_name(c.row), c.predicted / c.published - 1) for c in published.memory_cases()],
        ),
        "cpu_memory": (
            "peak memory of a rank on a CPU",
            "rows that set no constant, seen while the formulas were written",
            cpu_memory_errors("score"),
        ),
    }


def cpu_memory_errors(use: str) -> list[tuple[str, float]]:
    """Return (run, relative error) of the project's own measured runs."""
    return [
        (peak.name, predicted_bytes(load_config(QUICKSTART, peak.overrides), HARDWARE["cpu"]) / peak.peak_bytes - 1)
        for peak in measured_peaks()
        if peak.use == use
    ]


def summarise(what: str, held_out: str, errors: list[tuple[str, float]]) -> Score:
    """Return the median and the worst of the absolute errors."""
    sizes = [abs(error) for _, error in errors]
    return Score(what, held_out, len(sizes), statistics.median(sizes), max(sizes))


def _training(rows: list[Row], constants: fit.Constants) -> list[Scored]:
    return fit.training_scores([case for case in published.training_cases() if case.row in rows], constants)


def _steps(rows: list[Row], constants: fit.Constants) -> list[Scored]:
    return fit.rl_scores([case for case in published.rl_cases() if case.row in rows], constants)


def _named(scored: list[Scored]) -> list[tuple[str, float]]:
    return [(_name(score.row), score.error) for score in scored]


def _name(row: Row) -> str:
    return f"{row['stack']} {row['model']} {row['gpus']} x {row['system']}, {row['seq'] or '-'} tokens"
