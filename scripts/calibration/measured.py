"""Measured peaks of this project's own CPU runs (measured_memory.csv) against the planner's prediction."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from megatron_rl.config import Config
from megatron_rl.models.facts import read_hf_config
from megatron_rl.models.hardware import Hardware
from megatron_rl.plan.memory import memory_of
from megatron_rl.plan.shapes import COUNTDOWN_VOCAB, layout_of, shape_of

COLUMNS = ("name", "use", "overrides", "peak_bytes")
DATA = Path(__file__).resolve().with_name("measured_memory.csv")


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
    return tuple(
        MeasuredPeak(row["name"], row["use"], json.loads(row["overrides"]), int(row["peak_bytes"]))
        for row in csv.DictReader(DATA.read_text().splitlines())
    )


def predicted_bytes(config: Config, hardware: Hardware) -> float:
    """Return the predicted peak of the fullest rank, bytes."""
    shape = shape_of(read_hf_config(config.model), COUNTDOWN_VOCAB)
    return memory_of(config, shape, layout_of(config), hardware).peak
