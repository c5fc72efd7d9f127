"""Read files of problems as records, one by one: JSON lines, a JSON list, or Parquet."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_rl.errors import DataError

ACCEPTED = (
    "accepted are UTF-8 JSON lines with `problem` and `answer`, a .json list of such objects, and Parquet, each also "
    "with verl's columns (`prompt` and `reward_model.ground_truth`)"
)
INSTALL_PARQUET = "install it with: pip install 'datasets>=5.0,<6' 'pyarrow>=21'"

Record = dict[str, Any]


def read_records(path: str | Path) -> Iterator[tuple[str, Record]]:
    """Yield (where, record) of each row in order; `where` is the file with the line or row, counted from 1.

    The content tells Parquet from JSON, whatever the name; a .json file may hold a list. Blank lines are passed over.
    Raises: DataError for a file that is missing or not of these formats, and for a byte that is not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}; {ACCEPTED}")
    try:
        with path.open("rb") as file:
            start = file.read(4)
        if start == b"PAR1":
            yield from _read_parquet(path)
        elif path.suffix == ".parquet":
            raise DataError(f"{path}: not a Parquet file, which begins with PAR1; {ACCEPTED}")
        else:
            data = path.read_bytes() if path.suffix == ".json" else b""
            if data.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
                yield from _read_list(path, data)
            else:
                yield from _read_lines(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _read_lines(path: Path) -> Iterator[tuple[str, Record]]:
    with path.open("rb") as file:
        # a lone \r ends a line too; JSON texts cannot hold one
        lines = (line for ended_by_newline in file for line in ended_by_newline.splitlines())
        for number, line in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            text = decode(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, where)
            if text.strip():
                yield where, _object(_parse(text, where), where)


def _read_list(path: Path, data: bytes) -> Iterator[tuple[str, Record]]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: {_not_utf8(error)}") from error
    for number, value in enumerate(_parse(text, str(path)), start=1):
        where = f"{path}, row {number}"
        yield where, _object(value, where)


def decode(data: bytes, where: str) -> str:
    """Return the text of UTF-8 bytes. Raises: DataError that begins with `where`."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: {_not_utf8(error)}") from error


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"byte 0x{error.object[error.start]:02x} is not UTF-8 ({error.reason}); save the file as UTF-8; {ACCEPTED}"


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of over 4,300 digits is a plain ValueError
        raise DataError(f"{where}: not JSON ({error}); {ACCEPTED}") from error


def _object(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{where}: got {type(value).__name__}, expected an object; {ACCEPTED}")
    return value


def _read_parquet(path: Path) -> Iterator[tuple[str, Record]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{path}: Parquet needs pyarrow; {INSTALL_PARQUET}") from error
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for record in _records_of(batch, path, number):
                number += 1
                yield f"{path}, row {number}", record
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a Parquet file that pyarrow can read: {error}") from error


def _records_of(batch: Any, path: Path, first: int) -> list[Record]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        for row in range(batch.num_rows):  # again, to find it
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                try:
                    column[row].as_py()
                except UnicodeDecodeError as error:
                    raise DataError(f"{path}, row {first + row + 1}: `{name}`: {_not_utf8(error)}") from error
        raise
