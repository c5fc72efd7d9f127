"""The answer of one part of the GPU test: its lines, each with a verdict and a figure, kept in a file as they come.

Imports nothing but the standard library: the parts are started by a Python that may lack what they need.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PASS, FAIL, SKIP = "PASS", "FAIL", "SKIP"


class Skip(Exception):
    """The whole part cannot run here; the text says why."""


@dataclass
class Line:
    """One thing that a part looked at."""

    name: str
    verdict: str
    text: str


@dataclass
class Answer:
    """What a part has said so far. The file has it at once, so that a part that crashes or hangs has told the rest."""

    path: Path
    lines: list[Line] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def check(self, name: str, is_right: bool, text: str) -> None:
        """Add a line that passes or fails."""
        self._add(Line(name, PASS if is_right else FAIL, text))

    def skip(self, name: str, reason: str) -> None:
        """Add a line for what could not be looked at."""
        self._add(Line(name, SKIP, reason))

    def figure(self, name: str, value: Any) -> None:
        """Keep a number, or a list or dict of them, for the file alone."""
        self.figures[name] = value
        self._write()

    def _add(self, line: Line) -> None:
        self.lines.append(line)
        print(f"  {line.verdict} {line.name}: {line.text}", flush=True)
        self._write()

    def _write(self) -> None:
        draft = self.path.with_suffix(".draft")
        draft.write_text(json.dumps({"lines": [asdict(line) for line in self.lines], "figures": self.figures}))
        draft.replace(self.path)


def verdict_of(lines: list[Line]) -> str:
    """Return FAIL if any line failed, SKIP if none was looked at, else PASS."""
    verdicts = {line.verdict for line in lines}
    return FAIL if FAIL in verdicts else PASS if PASS in verdicts else SKIP
