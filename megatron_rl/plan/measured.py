"""Measured peaks of this project's own CPU runs (data/measured_memory.csv) against the planner's prediction."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from functools import cache
from importlib import resources

from megatron_rl.config import Config
from megatron_rl.models.facts import read_hf_config
from megatron_rl.models.hardware import Hardware
from megatron_rl.plan.memory import memory_of
from megatron_rl.plan.shapes import layout_of, shape_of

COLUMNS = ("name", "use", "overrides", "peak_bytes")
# of the countdown task's tokenizer, which the quickstart's model config leaves to the task
COUNTDOWN_VOCAB = 21


@dataclass(frozen=True, slots=True)
class MeasuredPeak:
    """A run of configs/quickstart.yaml with overrides; `use`: process, fit or score."""

    name: str
    use: str
    overrides: list[str]
    peak_bytes: int


@cache
def measured_peaks() -> tuple[MeasuredPeak, ...]:
    """Read the data file."""
    text = resources.files("megatron_rl.plan").joinpath("data/measured_memory.csv").read_text()
    return tuple(
        MeasuredPeak(row["name"], row["use"], json.loads(row["overrides"]), int(row["peak_bytes"]))
        for row in csv.DictReader(text.splitlines())
    )


def predicted_bytes(config: Config, hardware: Hardware) -> float:
    """Return the predicted peak of the fullest rank, bytes."""
    shape = shape_of(read_hf_config(config.model), COUNTDOWN_VOCAB)
    return memory_of(config, shape, layout_of(config), hardware).peak
