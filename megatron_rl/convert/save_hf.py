"""Writing the policy in Hugging Face format: what stands beside the weights, and the weights as a bounded stream."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from megatron_rl.config import Config
from megatron_rl.convert.safetensors_io import TensorInfo, file_names, write_file, write_index
from megatron_rl.errors import UserError
from megatron_rl.models.facts import hf_folder
from megatron_rl.parallel.groups import Groups

SHARD_BYTES = 4 * 2**30


class Described(Protocol):
    """A model as far as its description goes: the policy, or one that is not built."""

    @property
    def config(self) -> Config:
        """Of the run."""

    @property
    def hf_config(self) -> PretrainedConfig:
        """Its architecture."""


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
    draft, problem = folder.with_name(f".{folder.name}.draft"), None
    stream = policy.hf_weights()
    if policy.groups.rank == 0:
        try:
            shutil.rmtree(draft, ignore_errors=True)
            write_hf_extras(draft, policy, tokenizer)
            write_shards(draft, stream, shard_bytes)
            _replace(draft, folder)
        except OSError as error:
            place = next(parent for parent in folder.absolute().parents if parent.exists())
            free = shutil.disk_usage(place).free
            problem = f"cannot write the model to {folder}: {error}; {free:,} bytes are free there"
            shutil.rmtree(draft, ignore_errors=True)
    for _ in stream:  # a collective: every rank exhausts it, rank 0 also after a failure
        pass
    problem = policy.groups.all_ranks.gather_objects(problem)[0]
    if problem is not None:
        raise UserError(problem)


def write_hf_extras(folder: Path, policy: Described, tokenizer: Any) -> None:
    """Write what a model folder holds beside its weights: config.json, the tokenizer with its chat template (unless it
    is None), and the generation config of model.path if it has one."""
    folder.mkdir(parents=True, exist_ok=True)
    hf = copy.deepcopy(policy.hf_config)
    hf.dtype = policy.config.model.dtype
    if not hf.architectures:  # the servers choose the model's class by it
        hf.architectures = [AutoModelForCausalLM._model_mapping[type(hf)].__name__]
    hf.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    path = policy.config.model.path
    generation = None if path is None else hf_folder(path) / "generation_config.json"
    if generation is not None and generation.is_file():
        shutil.copyfile(generation, folder / generation.name)


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


def fsync_tree(folder: Path, *, recursive: bool = True) -> None:
    """Put a folder's names, and its files, on the disk before something else relies on them."""
    for path in [*(folder.rglob("*") if recursive else ()), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _replace(draft: Path, folder: Path) -> None:
    fsync_tree(draft)
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        draft.rename(folder)
        shutil.rmtree(old)
    else:
        draft.rename(folder)
    fsync_tree(folder.parent, recursive=False)
