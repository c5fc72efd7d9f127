"""Rewards of the Slurm tests; they read the response alone, so that a run repeats bit for bit."""

from __future__ import annotations

import os
import time
from typing import Any

from tests.tiny import mostly_digits


def slow(response: str, answer: str) -> float:
    """A step then takes long enough for a signal to meet it."""
    time.sleep(0.1)
    return mostly_digits(response, answer)


def sabotage(response: str, answer: str) -> float:
    """Rank 1 fails in the step's packing, with a traceback, if it grades in its own process."""
    from megatron_rl import train

    def fail(*arguments: Any, **options: Any) -> Any:
        raise ArithmeticError("boom in packing")

    if os.environ["RANK"] == "1":
        train.pack = fail
    return mostly_digits(response, answer)
