"""Write the policy in Hugging Face format, its weights as a bounded stream."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from megatron_rl.convert.disk import fsync_tree, remove, unused
from megatron_rl.convert.model_files import Described, policy_files, write_files
from megatron_rl.convert.safetensors_io import TensorInfo, file_names, write_file, write_index
from megatron_rl.errors import UserError
from megatron_rl.files import free_bytes
from megatron_rl.parallel.groups import Groups

SHARD_BYTES = 4 * 2**30


class Exported(Described, Protocol):
    """The policy as far as writing its weights goes."""

    @property
    def groups(self) -> Groups:
        """Return this rank's place among the processes."""

    def hf_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the full (hf_name, tensor) pairs on every rank. A collective."""


def save_hf(policy: Exported, tokenizer: Any, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the model with its tokenizer to `folder`, replacing what is there once all is written. A collective.

    Rank 0 writes what the weight stream brings and holds one file of at most `shard_bytes` at a time (one tensor at
    least).
    Raises: UserError, on every rank, when writing fails; `folder` is then as before.
    """
    problem: str | None = None
    stream = policy.hf_weights()
    if policy.groups.rank == 0:
        for what in ("draft", "old"):  # of an export that was killed
            for leftover in folder.parent.glob(f".{glob.escape(folder.name)}.{what}*"):
                remove(leftover)
        draft = unused(folder.with_name(f".{folder.name}.draft"))
        try:
            write_files(draft, policy_files(policy, tokenizer))
            write_shards(draft, stream, shard_bytes)
            _replace(draft, folder)
        except (OSError, ValueError) as error:
            problem = f"cannot write the model to {folder}: {error}; {free_bytes(folder):,} bytes are free there"
            remove(draft)
    for _ in stream:  # a collective: every rank exhausts it, rank 0 also after a failure
        pass
    problem = policy.groups.all_ranks.gather_objects(problem)[0]
    if problem is not None:
        raise UserError(problem)


def write_shards(folder: Path, stream: Iterable[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Write (name, tensor) pairs as model.safetensors, or as several files of at most `shard_bytes` with an index.

    Raises: OSError.
    """
    parts: list[dict[str, TensorInfo]] = []  # of the files so far
    pending: dict[str, Tensor] = {}

    def write() -> None:
        part = {name: _info(tensor) for name, tensor in pending.items()}
        write_file(folder / f"part-{len(parts)}", part, pending.__getitem__, lambda count: None)
        parts.append(part)
        pending.clear()

    for name, tensor in stream:
        if pending and sum(map(_nbytes, pending.values())) + _nbytes(tensor) > shard_bytes:
            write()
        pending[name] = tensor.detach().to("cpu", copy=True)  # a view would hold its whole bucket
    write()
    names = file_names(len(parts))  # known only now
    for number, name in enumerate(names):
        (folder / f"part-{number}").rename(folder / name)
    if len(parts) > 1:
        write_index(folder, zip(names, parts, strict=True))


def _info(tensor: Tensor) -> TensorInfo:
    return TensorInfo(tuple(tensor.shape), tensor.dtype)


def _nbytes(tensor: Tensor) -> int:
    return _info(tensor).nbytes


def _replace(draft: Path, folder: Path) -> None:
    fsync_tree(draft)
    old = None
    if os.path.lexists(folder):
        old = folder.rename(unused(folder.with_name(f".{folder.name}.old")))
    draft.rename(folder)
    fsync_tree(folder.parent, recursive=False)
    if old is not None:
        remove(old)
