"""The files of Megatron-Core's `torch_dist` checkpoints, read and written tensor by tensor in one process.

There is no collective here, but torch keeps the format's types in `torch.distributed.checkpoint`. A folder holds
`.metadata` (which part of which tensor lies where), `*.distcp` (tensors as `torch.save` writes them, one after the
other), `common.pt` (plain data) and `metadata.json` (the name of the format). Megatron's own functions want a process
group and all tensors of a rank at once; torch's writer keeps a reference to the last tensor of every name.
"""

import collections
import io
import json
import math
import os
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo

from megatron_rl.errors import UserError

FILES = (".metadata", "metadata.json", "common.pt")
_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_BLOCK_BYTES = 64 * 2**20  # one stored piece: what a reader holds beside its result
_FILE_BYTES = 2 * 2**30


class TorchDistError(UserError):
    """A checkpoint folder is incomplete or damaged."""


class TorchDistReader:
    """Tensors of a checkpoint by key, one at a time."""

    def __init__(self, folder: Path) -> None:
        """Raises: TorchDistError when a file is missing, shorter than the metadata says, or not of this format."""
        self.folder = folder
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing:
            raise TorchDistError(f"{folder}: {', '.join(missing)} missing; this is no complete Megatron checkpoint")
        backend = json.loads((folder / "metadata.json").read_text()).get("sharded_backend")
        if backend != "torch_dist":
            raise TorchDistError(f"{folder}: sharded_backend is {backend!r}, expected 'torch_dist'")
        metadata = _read_metadata(folder / ".metadata")
        self.tensors: dict[str, dcp.TensorStorageMetadata] = {
            key: value
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, dcp.TensorStorageMetadata)
        }
        self._places: dict[dcp.MetadataIndex, _StorageInfo] = metadata.storage_data
        self._by_index: dict[tuple[str, int], dict[tuple[int, ...], list[dcp.ChunkStorageMetadata]]] = {}
        self._check_files()

    def read(self, key: str, index: tuple[int, ...] = (), rows: int | None = None) -> Tensor:
        """`tensor[index]` of the whole tensor stored under `key`, the first `rows` rows of it when given.

        Raises: TorchDistError when the checkpoint does not hold all of it.
        """
        stored = self.tensors[key]
        shape = list(stored.size[len(index) :])
        if rows is not None:
            shape[0] = rows
        result = torch.empty(shape, dtype=stored.properties.dtype)
        lead, covered = len(index), 0
        for chunk in self._chunks(key, lead).get(index, []):
            offsets, sizes = chunk.offsets[lead:], chunk.sizes[lead:]
            ends = [min(offset + size, length) for offset, size, length in zip(offsets, sizes, shape, strict=True)]
            lengths = [end - offset for offset, end in zip(offsets, ends, strict=True)]
            if any(length <= 0 for length in lengths):  # rows of a padded vocabulary
                continue
            piece = self._load(key, chunk).reshape(sizes)
            target = result[tuple(slice(offset, end) for offset, end in zip(offsets, ends, strict=True))]
            target.copy_(piece[tuple(slice(length) for length in lengths)])
            covered += math.prod(lengths)
        if covered != result.numel():
            raise TorchDistError(
                f"{self.folder}: {covered} of {result.numel()} elements of {key}{list(index)} are stored; save it again"
            )
        return result

    def _chunks(self, key: str, lead: int) -> dict[tuple[int, ...], list[dcp.ChunkStorageMetadata]]:
        if (key, lead) not in self._by_index:
            found = collections.defaultdict(list)
            for chunk in self.tensors[key].chunks:
                if any(size != 1 for size in chunk.sizes[:lead]):
                    raise TorchDistError(f"{self.folder}: a piece of {key} spans several layers or experts")
                found[tuple(chunk.offsets[:lead])].append(chunk)
            self._by_index[key, lead] = dict(found)
        return self._by_index[key, lead]

    def _load(self, key: str, chunk: dcp.ChunkStorageMetadata) -> Tensor:
        place = self._places[dcp.MetadataIndex(key, chunk.offsets)]
        if getattr(place, "transform_descriptors", None):
            raise TorchDistError(f"{self.folder}: {key} is stored with {place.transform_descriptors}: not supported")
        with (self.folder / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            data = io.BytesIO(file.read(place.length))
        try:
            return torch.load(data, map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise TorchDistError(f"{self.folder}: {key} in {place.relative_path} is damaged: {error}") from error

    def _check_files(self) -> None:
        needed: dict[str, int] = collections.defaultdict(int)
        for place in self._places.values():
            needed[place.relative_path] = max(needed[place.relative_path], place.offset + place.length)
        for name, size in sorted(needed.items()):
            path = self.folder / name
            if not path.is_file():
                raise TorchDistError(f"{path} is missing; the checkpoint is not complete")
            if path.stat().st_size < size:
                raise TorchDistError(
                    f"{path} is truncated: it has {path.stat().st_size:,} bytes, the metadata needs {size:,}"
                )


class TorchDistWriter:
    """Writes a checkpoint into an existing empty folder; it is readable after `finish` only."""

    def __init__(self, folder: Path, file_bytes: int = _FILE_BYTES) -> None:
        """file_bytes: a data file is closed once it is that long."""
        self.folder, self.file_bytes = folder, file_bytes
        self._metadata: dict[str, Any] = {}
        self._places: dict[dcp.MetadataIndex, _StorageInfo] = {}
        self._files = 0
        self._file: IO[bytes] | None = None
        self._nothing: _StorageInfo | None = None

    def add(self, keys: Iterable[str], tensor: Tensor, index: tuple[int, ...] = (), lead: tuple[int, ...] = ()) -> None:
        """Store `tensor`, once, under all `keys` as `whole[index]` of a `whole` of shape `[*lead, *tensor.shape]`."""
        shape = torch.Size((*lead, *tensor.shape))
        ones = (1,) * len(lead)
        for start, block in _blocks(tensor.detach()):
            place = self._save(block.reshape(*ones, *block.shape))
            offsets = torch.Size((*index, *([start] + [0] * (tensor.dim() - 1))[: tensor.dim()]))
            for key in keys:
                stored = self._metadata.setdefault(
                    key, dcp.TensorStorageMetadata(dcp.TensorProperties(dtype=tensor.dtype), shape, [])
                )
                if (stored.size, stored.properties.dtype) != (shape, tensor.dtype):
                    raise ValueError(f"{key}: {tensor.dtype} {tuple(shape)} after {stored}")
                stored.chunks.append(dcp.ChunkStorageMetadata(offsets, torch.Size((*ones, *block.shape))))
                self._places[dcp.MetadataIndex(key, offsets)] = place

    def add_nothing(self, key: str, index: tuple[int, ...] = (), lead: tuple[int, ...] = ()) -> None:
        """Store None under the name of an object that Megatron shards as `lead`: it asks for one a module."""
        if self._nothing is None:
            self._nothing = self._save([None])
        offset, shape = (".".join(map(str, part)) for part in (index or (0,), lead or (1,)))
        name = f"{key}/shard_{offset}_{shape}"
        self._metadata[name] = dcp.BytesStorageMetadata()
        self._places[dcp.MetadataIndex(name)] = self._nothing

    def finish(self) -> None:
        """Write what makes the folder a checkpoint."""
        self._close()
        metadata = dcp.Metadata(self._metadata, None, self._places, dcp.StorageMeta(), CURRENT_DCP_VERSION)
        for name, write in {
            "common.pt": lambda file: torch.save({}, file),
            ".metadata": lambda file: pickle.dump(metadata, file),
            "metadata.json": lambda file: file.write(json.dumps(_BACKEND).encode()),
        }.items():
            with (self.folder / name).open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())

    def _save(self, value: Any) -> _StorageInfo:
        if self._file is None:
            self._file = (self.folder / f"__0_{self._files}.distcp").open("wb")
            self._files += 1
        offset = self._file.tell()
        torch.save(value, self._file)
        place = _StorageInfo(Path(self._file.name).name, offset, self._file.tell() - offset)
        if self._file.tell() >= self.file_bytes:
            self._close()
        return place

    def _close(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None


def _blocks(tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of at most `_BLOCK_BYTES`, each with storage of its own: torch.save writes all of a storage."""
    if tensor.dim() == 0 or tensor.nbytes <= _BLOCK_BYTES:
        yield 0, tensor.clone(memory_format=torch.contiguous_format)
        return
    rows = max(1, _BLOCK_BYTES * tensor.shape[0] // tensor.nbytes)
    for start in range(0, tensor.shape[0], rows):
        yield start, tensor[start : start + rows].clone(memory_format=torch.contiguous_format)


class _MetadataUnpickler(pickle.Unpickler):
    """Only the format's own types: a pickle may name any function, and a checkpoint comes from anywhere."""

    def find_class(self, module: str, name: str) -> Any:
        is_type = module.startswith("torch.distributed.checkpoint.") and name.strip("_")[:1].isupper()
        is_value = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout)
        plain = {("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict")}
        if is_type or is_value or (module, name) in plain:
            return super().find_class(module, name)
        if module.startswith("megatron.") and name in ("MCoreMetadata", "MCoreSavePlan"):
            return type(name, (dcp.Metadata,), {})
        raise pickle.UnpicklingError(f"{module}.{name} is no part of the format")


def _read_metadata(path: Path) -> dcp.Metadata:
    with path.open("rb") as file:
        try:
            metadata = _MetadataUnpickler(file).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, ImportError) as error:
            raise TorchDistError(f"{path} cannot be read: {error}") from error
    if not isinstance(metadata, dcp.Metadata):
        raise TorchDistError(f"{path} holds a {type(metadata).__name__}, expected Metadata")
    return metadata
