"""How far the planner's predictions are from measurements that its constants have not seen."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from megatron_rl.config import load_config
from megatron_rl.errors import UserError
from megatron_rl.models.hardware import HARDWARE
from megatron_rl.plan import fit, published
from megatron_rl.plan.fit import Scored
from megatron_rl.plan.measured import measured_peaks, predicted_bytes
from megatron_rl.plan.published import Row, model_name

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"


@dataclass(frozen=True, slots=True)
class Score:
    """Relative errors of one kind of prediction, fractions."""

    what: str
    held_out: str  # how the rows were kept from the fit
    rows: int
    median: float
    worst: float

    def text(self) -> str:
        """Return the errors as a text to stand beside a prediction."""
        return f"{self.median:.0%}, worst {self.worst:.0%}"


@cache
def stored_scores() -> dict[str, Score]:
    """Return the scores that scripts/fit_planner.py wrote beside the constants, by kind: training, forward, step,
    memory, cpu_memory."""
    text = resources.files("megatron_rl.plan").joinpath("data/constants.json").read_text()
    return {kind: Score(**score) for kind, score in json.loads(text)["scores"].items()}


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
    """Return (run, relative error) of the project's own measured runs. Raises: UserError outside a source checkout."""
    if not QUICKSTART.is_file():
        raise UserError(f"the measured runs are of {QUICKSTART}, which is not there; score from a source checkout")
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
