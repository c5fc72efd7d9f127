"""Safetensors files with the memory of one tensor: the file is checked against its header before anything is read.

The library maps whole files, and the pages of a mapping that were touched stay resident: over a model they add up.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.errors import ConfigError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()} | {torch.int8: "I8"}  # of an export, which no one reads back
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor and where it lies: `begin` counts bytes from the start of the file."""

    info: TensorInfo
    path: Path
    begin: int

    def read(self, start: int = 0, rows: int | None = None) -> Tensor:
        """The tensor, or `rows` of its rows from `start` on."""
        shape, stride = self.info.shape, 0
        if rows is not None:
            shape = (min(rows, shape[0] - start), *shape[1:])
            stride = math.prod(shape[1:]) * self.info.dtype.itemsize
        tensor = torch.empty(shape, dtype=self.info.dtype)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.begin + start * stride)
            target, filled = as_bytes(tensor), 0
            while filled < len(target):  # one call reads at most 2 GiB
                count = file.readinto(target[filled:])
                if not count:
                    raise ConfigError(f"{self.path}: ends inside a tensor; it changed while it was read")
                filled += count
        return tensor


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a model folder, by name. Nothing but headers is read.

    Raises: ConfigError naming a missing or truncated file, a header that is damaged, an index that does not agree with
    the files, and a tensor whose dtype is not a plain float.
    """
    index, single = folder / INDEX, folder / SINGLE
    if index.is_file() and single.is_file():
        raise ConfigError(f"{folder}: holds both {INDEX} and {SINGLE}; remove the one that is not the model")
    if single.is_file():
        return _header(single)
    if not index.is_file():
        others = sorted({path.suffix for path in folder.glob("*.*")} & {".bin", ".gguf", ".pt", ".pth"})
        hint = f" (it has {', '.join(others)} files: save the model as safetensors first)" if others else ""
        raise ConfigError(f"{folder}: no {SINGLE} and no {INDEX}{hint}; give a folder with safetensors weights")
    return _indexed(folder, index)


def _indexed(folder: Path, index: Path) -> dict[str, Stored]:
    try:
        weight_map: dict[str, str] = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{index}: not an index with a weight_map: {error!r}") from error
    foreign = sorted(file for file in set(weight_map.values()) if Path(file).name != file)
    if foreign:
        raise ConfigError(f"{index}: the file {foreign[0]!r} is not a plain name in this folder")
    missing = sorted(file for file in set(weight_map.values()) if not (folder / file).is_file())
    if missing:
        raise ConfigError(f"{index}: names {len(missing)} files that do not exist: {', '.join(missing[:3])}")
    found: dict[str, Stored] = {}
    for file in sorted(set(weight_map.values())):
        for name, stored in _header(folder / file).items():
            if weight_map.get(name) != file:
                raise ConfigError(
                    f"{index}: wrong index: {file} holds {name}, which the index puts into "
                    f"{weight_map.get(name, 'no file')}"
                )
            found[name] = stored
    absent = sorted(weight_map.keys() - found.keys())
    if absent:
        raise ConfigError(f"{index}: wrong index: {weight_map[absent[0]]} does not hold {absent[0]}")
    return found


def _header(path: Path) -> dict[str, Stored]:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise ConfigError(f"{path}: no safetensors file, or truncated within its header ({size:,} bytes)")
        try:
            entries: dict[str, Any] = json.loads(file.read(length))
        except ValueError as error:
            raise ConfigError(f"{path}: the header is damaged: {error}") from error
    entries.pop("__metadata__", None)
    promised = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if size != promised:
        what = "truncated" if size < promised else "longer than its header says"
        raise ConfigError(f"{path}: {what}: {size:,} bytes, the header promises {promised:,}; fetch the file again")
    found = {}
    for name, entry in entries.items():
        if entry["dtype"] not in _DTYPES:
            raise ConfigError(
                f"{path}: {name} has dtype {entry['dtype']}, expected one of {', '.join(_DTYPES)}; quantised models "
                "cannot be converted"
            )
        info = TensorInfo(tuple(entry["shape"]), _DTYPES[entry["dtype"]])
        begin, end = entry["data_offsets"]
        if end - begin != info.nbytes:
            raise ConfigError(f"{path}: {name} has {end - begin:,} bytes for the shape {info.shape}: damaged header")
        found[name] = Stored(info, path, 8 + length + begin)
    return found


def write_file(
    path: Path, tensors: dict[str, TensorInfo], read: Callable[[str], Tensor], advance: Callable[[int], None]
) -> None:
    """Write one safetensors file, asking `read` for one tensor after the other; `advance` hears of each one's bytes.

    Raises: ValueError when a tensor is not as announced.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in tensors.items():
        offsets = [offset, offset + info.nbytes]
        header[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": offsets}
        offset += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, info in tensors.items():
            tensor = read(name)
            if TensorInfo(tuple(tensor.shape), tensor.dtype) != info:
                raise ValueError(f"{name}: announced {info}, got {tensor.dtype} {tuple(tensor.shape)}")
            file.write(as_bytes(tensor.contiguous()))
            advance(info.nbytes)
        file.flush()
        os.fsync(file.fileno())


def shards(tensors: Iterable[tuple[str, TensorInfo]], max_bytes: int) -> Iterator[dict[str, TensorInfo]]:
    """Yield the tensors in order, cut where a file would exceed `max_bytes`; a larger tensor has a file of its own."""
    part: dict[str, TensorInfo] = {}
    used = 0
    for name, info in tensors:
        if part and used + info.nbytes > max_bytes:
            yield part
            part, used = {}, 0
        part[name] = info
        used += info.nbytes
    yield part


def write_model(
    folder: Path,
    parts: Iterable[dict[str, TensorInfo]],
    read: Callable[[str], Tensor],
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Write each part as a file, as `write_file` does, under the names that transformers gives to the files of a model;
    several have an index."""
    weight_map: dict[str, int] = {}  # tensor -> number of its file
    total = count = 0
    for count, part in enumerate(parts, start=1):
        write_file(folder / f"part-{count}", part, read, advance)
        weight_map |= dict.fromkeys(part, count)
        total += sum(info.nbytes for info in part.values())
    names = {i: f"model-{i:05d}-of-{count:05d}.safetensors" if count > 1 else SINGLE for i in range(1, count + 1)}
    for number, name in names.items():
        (folder / f"part-{number}").rename(folder / name)
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {name: names[i] for name, i in weight_map.items()}}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
