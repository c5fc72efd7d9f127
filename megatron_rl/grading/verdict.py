"""One answer graded: by whom, what came of it, and what went wrong."""

import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

_MAX_ERROR = 2000  # characters; the text travels to every rank with its rollout


@dataclass(frozen=True, slots=True)
class Verifier:
    """A function of the registry or of the user, with its options as plain data."""

    function: str
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Verdict:
    """One value per verifier, all 0 when the grading failed or did not finish."""

    values: tuple[float, ...]
    error: str = ""  # a function raised or returned no finite number: its fault, to be mended
    unfinished: str = ""  # "deadline" or "crash": the answer's fault, as a rule


class Grader(Protocol):
    """Grades answers beside other work."""

    def submit(self, response: str, answer: str) -> Future[Verdict]:
        """Begin to grade; the future raises RewardError when no grading is possible at all."""

    def close(self) -> None:
        """End what is under way."""


class InProcess:
    """Grades at once, in this process and without a deadline."""

    def __init__(self, functions: Sequence[Callable[[str, str], float]]) -> None:
        """`functions`: the first one's value is the score."""
        self._functions = functions

    def submit(self, response: str, answer: str) -> Future[Verdict]:
        """A future that is done."""
        done: Future[Verdict] = Future()
        done.set_result(judge(self._functions, response, answer))
        return done

    def close(self) -> None:
        """Nothing is under way."""


def judge(functions: Sequence[Callable[[str, str], float]], response: str, answer: str) -> Verdict:
    """The functions' values. One that raises, or returns anything but a finite number, fails the answer as a whole."""
    values: list[float] = []
    error = ""
    for function in functions:
        try:
            value: Any = function(response, answer)
            value = value.item() if hasattr(value, "item") else value  # a scalar of numpy or torch
            if hasattr(value, "__float__") and math.isfinite(value):  # raises for 10**400
                values.append(float(value))
            else:
                error = f"the reward function returned {value!r} ({type(value).__name__}), expected a finite number"
        except Exception:
            error = traceback.format_exc()
        if error:
            return Verdict((0.0,) * len(functions), error=error[-_MAX_ERROR:])  # the end says most
    return Verdict(tuple(values))
