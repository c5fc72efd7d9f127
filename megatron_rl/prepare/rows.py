"""Rows of any of the formats, with the columns of any preset, as problems; and the clean file that they become."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_rl.data.records import INSTALL_PARQUET, Record, read_records
from megatron_rl.data.rows import Row, answer_text, column, to_row
from megatron_rl.errors import DataError
from megatron_rl.files import naming, write_atomically
from megatron_rl.grading.extraction import last_boxes
from megatron_rl.prepare.presets import Preset

_SOLUTION = "solution"  # the column whose text is a way to the answer; others hold the answer itself
_THOUSANDS = re.compile(r"[+-]?\$?\d{1,3}(?:,\d{3})+(?:\.\d+)?%?")


def read(name: str, preset: Preset, path: Path | None, *, download: bool) -> list[Row]:
    """Return all problems of a file, or of the preset's set on the Hugging Face hub when there is no path.

    A row whose solution has no \\boxed answer comes with an empty answer: it is no problem to train on, yet one to
    compare with.
    Raises: DataError for a file of another format, a row without problem or answer, a set neither local nor fetched.
    """
    records = _from_hub(name, preset, download) if path is None else read_records(path)
    rows = [_row(record, preset, where, f"{name}-{i}") for i, (where, record) in enumerate(records)]
    if not rows:
        raise DataError(f"{path or preset.hub}: holds no row")
    return rows


def _from_hub(name: str, preset: Preset, download: bool) -> Iterator[tuple[str, Record]]:
    give = f"give a file, as {name}=problems.jsonl"
    if not preset.hub:
        raise DataError(f"{name}: {give}{'; ' if preset.elsewhere else ''}{preset.elsewhere}")
    if not download:
        raise DataError(f"{name}: {give}, or --download to fetch {preset.hub} from the Hugging Face hub")
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{name}: --download needs datasets ({INSTALL_PARQUET}); or {give}") from error
    try:
        records = datasets.load_dataset(preset.hub, preset.config, split=preset.split)
    except Exception as error:  # datasets and the hub raise dozens of types, from sockets to pyarrow
        raise DataError(
            f"{name}: cannot load {preset.hub} from the hub ({type(error).__name__}: {error}). Without a network, "
            f"{give} fetched elsewhere (.jsonl, .json, .parquet), or copy HF_HOME from a machine that "
            "has loaded it and set HF_HUB_OFFLINE=1"
        ) from error
    yield from ((f"{preset.hub}, row {i}", record) for i, record in enumerate(records, start=1))


def _row(record: Record, preset: Preset, where: str, number: str) -> Row:
    for columns, what in ((preset.problem, "problem"), (preset.answer, "answer")):
        if column(record, columns, where) is None:
            raise DataError(
                f"{where}: no {what} in any of {', '.join(columns)}; it has {', '.join(record) or 'no field'}"
            )
    name, answer = number.rpartition("-")[0], _answer(record, preset.answer, where)
    row = to_row(record, answer, where, number, name, preset.problem)
    problem, suffix = row.problem, (preset.suffix or None) if row.suffix is None else row.suffix
    for before, after in (*preset.around, ("", preset.suffix), ("", preset.suffix.strip())):
        problem = problem.removeprefix(before).removesuffix(after)
    if not problem.strip():
        raise DataError(f"{where}: the problem is empty")
    return replace(
        row,
        problem=problem.strip(),
        source=preset.source or row.source,
        suffix=suffix,
        # a row's own system message is part of what it asks; the paper's own files repeat the preset's
        system=preset.system if row.system is None else row.system,
    )


def _answer(record: Record, columns: tuple[str, ...], where: str) -> str:
    """Return the final answer: of a text its last box, or GSM8K's behind ####; of a list all parts. Empty: neither."""
    name = next(name for name in columns if column(record, (name,), where) is not None)
    value: Any = column(record, (name,), where)
    if isinstance(value, list):
        return ",".join(answer_text(part, where, name).strip() for part in value)
    text = answer_text(value, where, name).strip()
    if isinstance(value, str | bytes):
        if boxes := last_boxes(text):
            return boxes[-1].strip()
        _, hashes, final = text.rpartition("####")
        if hashes and "\n" not in final.strip():  # how GSM8K ends a solution
            text = final.strip()
            text = text.replace(",", "") if _THOUSANDS.fullmatch(text) else text
        elif name == _SOLUTION:
            return ""
    if not text:
        raise DataError(f"{where}: the answer is empty")
    return text


def with_unique_ids(rows: Iterable[Row]) -> tuple[list[Row], int]:
    """Return the rows with ids of their own, as evaluation needs them, and how many were renamed: a further row of an
    id gets -2, -3 and so on behind it."""
    rows = list(rows)
    taken, copies, renamed = {row.id for row in rows}, dict[str, int](), 0
    kept = []
    for row in rows:
        copies[row.id] = copies.get(row.id, 0) + 1
        if copies[row.id] == 1:
            kept.append(row)
            continue
        while (name := f"{row.id}-{copies[row.id]}") in taken:
            copies[row.id] += 1
        taken.add(name)
        renamed += 1
        kept.append(replace(row, id=name))
    return kept, renamed


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write JSON lines that readers see whole or not at all. Raises: OSError; the former file is then unchanged."""
    with naming(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in rows))
