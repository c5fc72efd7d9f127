"""JSON lines: valid JSON whatever the numbers, readable after a crash, cut back on resume."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from megatron_rl.errors import UserError


def to_line(row: dict[str, Any]) -> str:
    """One line of valid JSON with its newline.

    JSON has no NaN or infinity: such values become null and their keys are listed under "non_finite".
    """
    lost = [key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
    if lost:
        row = {**row, **dict.fromkeys(lost), "non_finite": lost}
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def read_rows(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows of a file, and notes about what was skipped: a last line that a killed writer left incomplete.

    Raises: FileNotFoundError; UserError on a broken line that is not the last, naming it.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    complete, tail = lines[:-1], lines[-1]
    rows, notes = [], []
    if tail:
        notes.append(f"{path.name}: the last line is incomplete (the writer was interrupted) and was skipped")
    for number, line in enumerate(complete, start=1):
        row = _parse(line)
        if row is not None:
            rows.append(row)
        elif number == len(complete) and not tail:
            notes.append(f"{path.name}: the last line is broken (the writer was interrupted) and was skipped")
        else:
            raise UserError(
                f"{path}, line {number}: expected a JSON object, got {line[:80]!r}; repair or remove the line"
            )
    return rows, notes


def cut_from_step(path: Path, start_step: int) -> int:
    """Drop the rows with step >= start_step and an incomplete last line, atomically; returns how many rows went.

    A file that does not exist is left so. Raises: UserError as `read_rows`.
    """
    if not path.exists():
        return 0
    rows, notes = read_rows(path)
    kept = [row for row in rows if row["step"] < start_step]
    if len(kept) == len(rows) and not notes:
        return 0
    # A crash in mid-write must leave the old file or the new one, never half of it.
    draft = path.with_suffix(path.suffix + ".tmp")
    with draft.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    return len(rows) - len(kept)


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None
