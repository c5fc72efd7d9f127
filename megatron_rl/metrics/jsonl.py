"""JSON lines: valid JSON whatever the numbers, readable after a crash, cut back on resume."""

import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_rl.errors import UserError
from megatron_rl.files import naming


def to_line(row: dict[str, Any]) -> str:
    """Return one line of valid JSON with its newline.

    JSON has no NaN or infinity: such values become null and their keys are listed under "non_finite".
    """
    lost = [key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
    if lost:
        row = {**row, **dict.fromkeys(lost), "non_finite": lost}
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def without_non_finite(value: Any, digits: int | None = None) -> Any:
    """Return plain data with null for what JSON has no number for. `digits`: significant ones that a float keeps; whole
    ones then become integers."""
    if isinstance(value, float):
        if not math.isfinite(value) or digits is None:
            return value if math.isfinite(value) else None
        return int(value) if value.is_integer() else float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: without_non_finite(item, digits) for key, item in value.items()}
    return [without_non_finite(item, digits) for item in value] if isinstance(value, list) else value


def iter_rows(path: Path, notes: list[str], *, with_step: bool = False) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield each line of a file with its row, one at a time, so that a file of any size can be read.

    A last line that a killed writer left incomplete is left out, and `notes` gets a sentence about it. NaN and
    infinity, which are no JSON but which other writers produce, become null as in `to_line`.
    with_step: of a file whose rows all have a step.
    Raises: OSError; UserError naming the line, on a broken line that is not the last, or a row without its step.
    """
    broken: tuple[int, bytes] | None = None
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if broken is not None:
                break
            row = parse_row(line) if line.endswith(b"\n") else None
            if row is None:
                broken = (number, line)
            elif with_step and not _is_step(row.get("step")):
                raise UserError(f'{path}, line {number}: expected an integer "step"; is this a file of a run?')
            else:
                yield line, row
        else:
            if broken is not None:
                kind = "broken" if broken[1].endswith(b"\n") else "incomplete"
                notes.append(f"{path.name}: the last line is {kind} (the writer was interrupted) and was skipped")
            return
    text = broken[1].decode("utf-8", errors="replace").rstrip("\n")
    raise UserError(f"{path}, line {broken[0]}: expected a JSON object, got {text[:80]!r}; repair or remove the line")


def read_rows(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows of a file that fits into memory, and notes about what was skipped. Raises: as `iter_rows`."""
    notes: list[str] = []
    return [row for _, row in iter_rows(path, notes)], notes


def cut_from_step(path: Path, start_step: int) -> int:
    """Drop the rows with step >= start_step and an incomplete last line, atomically; return how many rows went.

    A file that does not exist is left so; lines that stay keep their bytes. Raises: as `iter_rows`.
    """
    if not path.exists():
        return 0
    notes: list[str] = []
    kept = kept_at_start = dropped = 0
    for line, row in iter_rows(path, notes, with_step=True):
        if row["step"] < start_step:
            kept += len(line)
            kept_at_start += 0 if dropped else len(line)
        else:
            dropped += 1
    if kept == kept_at_start:  # all that goes is at the end, as a run writes it: this needs no room on the disk
        if dropped or notes:
            os.truncate(path, kept)
        return dropped
    replace_lines(path, (line for line, row in iter_rows(path, notes) if row["step"] < start_step))
    return dropped


def amend_row(path: Path, step: int, more: dict[str, Any]) -> None:
    """Add `more` to the row of `step`, atomically. Raises: as `iter_rows`."""
    rows = iter_rows(path, [], with_step=True)
    replace_lines(path, (to_line(row | more).encode() if row["step"] == step else line for line, row in rows))


def replace_lines(path: Path, lines: Iterable[bytes]) -> None:
    """Write a file anew; a crash in mid-write leaves the old one or the new one, never half of it."""
    draft = path.with_suffix(path.suffix + ".tmp")
    with naming(path), draft.open("wb") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53


def parse_row(line: bytes) -> dict[str, Any] | None:
    """Return the row of a line, NaN and infinity as null; None where the line is no JSON object."""
    constants: list[str] = []
    try:
        row = json.loads(line.decode("utf-8", errors="replace"), parse_constant=constants.append)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    if constants:  # `append` returned None in their places
        row["non_finite"] = [key for key, value in row.items() if value is None]
    return row
