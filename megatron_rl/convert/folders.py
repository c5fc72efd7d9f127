"""What every conversion does around the tensors: the files that travel, and a target that is complete or absent."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_rl.convert.safetensors_io import TensorInfo
from megatron_rl.convert.weights import Weights
from megatron_rl.errors import ConfigError, UserError
from megatron_rl.models.facts import hf_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TRAVEL = (
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*chat_template*",
    "LICENSE*",
    "NOTICE*",
)


def converted(tensors: dict[str, TensorInfo], dtype: str) -> dict[str, TensorInfo]:
    """The tensors in another dtype, or as they are ("keep"). Raises: ConfigError for an unknown name."""
    if dtype == "keep":
        return dict(tensors)
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: expected keep, {', '.join(DTYPES)}")
    return {name: TensorInfo(info.shape, DTYPES[dtype]) for name, info in tensors.items()}


def cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor` as `dtype`. Raises: UserError when a finite value does not fit."""
    result = tensor.to(dtype)
    if dtype == torch.float16 and tensor.dtype != dtype:
        lost = int((result.isinf() & tensor.isfinite()).sum())
        if lost:
            raise UserError(f"{name}: {lost} values are beyond float16's range; convert to bfloat16 or float32")
    return result


def check_tokenizer(weights: Weights) -> None:
    """Refuse a folder whose tokenizer knows tokens that the model has no embedding for.

    A folder without a tokenizer passes. Raises: ConfigError.
    """
    folder, size = weights.hf_folder, weights.hf.vocab_size
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: the tokenizer cannot be loaded: {error}") from error
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= size:
        raise ConfigError(
            f"{folder}: tokenizer mismatch: it has a token {largest}, the model's vocab_size is {size}; give the "
            "tokenizer that belongs to the model"
        )


def copy_side_files(weights: Weights, folder: Path, tensors: dict[str, TensorInfo]) -> None:
    """Copy the tokenizer, generation config, chat template and licence into `folder`, and config.json with the dtype
    that the weights have there."""
    folder.mkdir(exist_ok=True)
    for pattern in _TRAVEL:
        for path in weights.hf_folder.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    templates = weights.hf_folder / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, folder / templates.name)
    (folder / "config.json").write_text(json.dumps(_with_dtype(weights.raw_config, tensors), indent=2) + "\n")


def _with_dtype(raw: dict[str, Any], tensors: dict[str, TensorInfo]) -> dict[str, Any]:
    dtypes = {str(info.dtype).removeprefix("torch.") for info in tensors.values()}
    if len(dtypes) > 1:
        return raw
    return raw | {"torch_dtype" if "torch_dtype" in raw else "dtype": dtypes.pop()}


@contextmanager
def published(target: Path, source: Path, needed_bytes: int, force: bool) -> Iterator[Path]:
    """A new folder beside `target` to write into; leaving the block without an error renames it to `target`.

    An error removes it; one that a killed conversion left behind is removed at the start.
    Raises: UserError before anything is written when the target exists (without `force`) or is no model, source and
    target lie within one another, another conversion writes the target, or less than `needed_bytes` are free on the
    disk; and when writing fails.
    """
    target, source = target.absolute(), source.resolve()
    resolved = target.resolve()
    if resolved == source or source in resolved.parents or resolved in source.parents:
        raise UserError(f"{target} and the source {source} lie within one another; give another target")
    draft, old = (target.with_name(f".{target.name}.{what}") for what in ("draft", "old"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(draft):
            if old.exists():  # a replacement was killed between its two renames, or after them
                shutil.rmtree(old) if target.exists() else old.rename(target)
            _check_target(target, force)
            free = shutil.disk_usage(target.parent).free
            if free < needed_bytes:
                raise UserError(
                    f"{target.parent}: the result needs {needed_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
                    "make room or choose another disk"
                )
            yield draft
            _publish(draft, target, old)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error}; nothing was left behind") from error


def _check_target(target: Path, force: bool) -> None:
    if not os.path.lexists(target):
        return
    if not force:
        raise UserError(f"{target} exists; give another target, or --force to replace it")
    if target.is_symlink() or not (hf_folder(target) / "config.json").is_file():
        raise UserError(f"{target} is no model folder: --force does not replace it; remove it yourself")


@contextmanager
def _locked(draft: Path) -> Iterator[None]:
    """Create `draft` empty, hold a lock on it that ends with this process, and remove it on an error."""
    draft.mkdir(exist_ok=True)
    lock = os.open(draft, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{draft}: another conversion is writing it; wait for it, or end it") from error
        try:
            for path in draft.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            yield
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _publish(draft: Path, target: Path, old: Path) -> None:
    if target.exists():
        target.rename(old)
    draft.rename(target)
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    shutil.rmtree(old, ignore_errors=True)
