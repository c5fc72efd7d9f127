"""Rows of any of the formats as problems."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_rl.errors import UserError
from megatron_rl.grading.math_answer import last_boxes
from megatron_rl.prepare.presets import Preset

_SUFFIXES = (".jsonl", ".json", ".parquet")


class PrepareError(ValueError, UserError):
    """A problem set cannot be read or prepared as asked."""


@dataclass(frozen=True, slots=True)
class Row:
    """One problem as it stands in a prepared file. `suffix` and `system` belong to the prompt, not to the problem."""

    id: str
    problem: str
    answer: str
    source: str
    suffix: str = ""
    system: str | None = None

    @property
    def prompt(self) -> str:
        """What the user's message says."""
        return self.problem + self.suffix

    def to_json(self) -> dict[str, Any]:
        """Without the fields that are empty."""
        return {name: value for name, value in asdict(self).items() if value not in ("", None)}


def read(name: str, preset: Preset, path: Path | None, *, download: bool) -> list[Row]:
    """All problems of a file, or of the preset's set on the Hugging Face hub when there is no path.

    Raises: PrepareError for a file of another format, a row without problem or answer, or a set that is neither local
        nor to be downloaded.
    """
    if path is None:
        records, where = _from_hub(name, preset, download), preset.hub
    else:
        records, where = _from_file(path), str(path)
    rows = [_row(record, preset, f"{where}, row {i + 1}", f"{name}-{i}") for i, record in enumerate(records)]
    if not rows:
        raise PrepareError(f"{where}: holds no row")
    return rows


def _from_file(path: Path) -> Iterator[Mapping[str, Any]]:
    if not path.is_file():
        raise PrepareError(f"{path}: no such file; give {', '.join(_SUFFIXES)}, or a preset's name with --download")
    if path.suffix == ".parquet":
        yield from _from_parquet(path)
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _record(_parse(line, f"{path}, line {number}"), f"{path}, line {number}")
    elif path.suffix == ".json":
        records = _parse(path.read_text(encoding="utf-8"), str(path))
        if not isinstance(records, list):
            raise PrepareError(f"{path}: expected a list of objects, got {type(records).__name__}")
        for i, record in enumerate(records):
            yield _record(record, f"{path}, row {i + 1}")
    else:
        raise PrepareError(f"{path}: expected a name that ends in {', '.join(_SUFFIXES)}")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise PrepareError(f"{where}: not JSON ({error})") from error


def _record(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise PrepareError(f"{where}: expected an object, got {type(value).__name__}")
    return value


def _from_parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise PrepareError(
            f"{path}: Parquet needs pyarrow; install it with: pip install 'megatron-rl[data]'"
        ) from error
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise PrepareError(f"{path}: not a Parquet file that pyarrow can read: {error}") from error


def _from_hub(name: str, preset: Preset, download: bool) -> Iterator[Mapping[str, Any]]:
    give = f"give a file, as {name}=problems.jsonl"
    if not preset.hub:
        raise PrepareError(f"{name}: {give}{'; ' if preset.elsewhere else ''}{preset.elsewhere}")
    if not download:
        raise PrepareError(f"{name}: {give}, or --download to fetch {preset.hub} from the Hugging Face hub")
    try:
        import datasets
    except ImportError as error:
        raise PrepareError(f"{name}: --download needs datasets (pip install 'megatron-rl[data]'); or {give}") from error
    try:
        yield from datasets.load_dataset(preset.hub, preset.config, split=preset.split)
    except Exception as error:  # datasets and the hub raise dozens of types, from sockets to pyarrow
        raise PrepareError(
            f"{name}: cannot load {preset.hub} from the hub ({type(error).__name__}: {error}). Without a network, "
            f"{give} fetched elsewhere ({', '.join(_SUFFIXES)}), or copy HF_HOME from a machine that "
            "has loaded it and set HF_HUB_OFFLINE=1"
        ) from error


def _row(record: Mapping[str, Any], preset: Preset, where: str, number: str) -> Row:
    problem = _problem(_first(record, preset.problem, where, "problem"))
    found = _first(record, preset.answer, where, "answer")
    answer = _answer(found, where)
    for prefix, suffix in (*preset.around, ("", preset.suffix), ("", preset.suffix.strip())):
        problem = problem.removeprefix(prefix).removesuffix(suffix)
    if not problem.strip() or not answer:
        raise PrepareError(f"{where}: the {'answer' if problem.strip() else 'problem'} is empty")
    extra = record.get("extra_info")
    own = record.get("id", extra.get("index") if isinstance(extra, dict) else None)
    source = preset.source or str(record.get("source") or record.get("data_source") or number.rpartition("-")[0])
    # a prepared file keeps the prompt that its rows bring
    suffix = preset.suffix or str(record.get("suffix") or "")
    return Row(
        number if own is None else str(own),
        problem.strip(),
        answer,
        source,
        suffix,
        preset.system or record.get("system"),
    )


def _first(record: Mapping[str, Any], names: tuple[str, ...], where: str, what: str) -> Any:
    for name in names:
        value: Any = record
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            return value
    raise PrepareError(f"{where}: no {what} in any of {', '.join(names)}; it has {', '.join(record) or 'no field'}")


def _problem(value: Any) -> str:
    if isinstance(value, list):  # chat messages
        users = [m["content"] for m in value if isinstance(m, Mapping) and m.get("role") == "user"]
        return str(users[-1]) if users else ""
    return str(value)


def _answer(value: Any, where: str) -> str:
    """The final answer: of GSM8K after ####, of a worked solution in its last box, of a list all parts."""
    if isinstance(value, list):
        return ",".join(str(part).strip() for part in value)
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)  # what a verifier such as countdown reads
    text = str(value).strip()
    if "####" in text:
        return text.rpartition("####")[2].strip().replace(",", "")
    if "\\boxed" in text and len(text) > 200:
        boxes = last_boxes(text)
        if not boxes:
            raise PrepareError(f"{where}: the solution has no \\boxed answer")
        return boxes[-1].strip()
    return text


def write(path: Path, rows: list[Row]) -> None:
    """Write JSON lines that readers see whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
