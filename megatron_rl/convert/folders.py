"""Do what every conversion does around the tensors: check the tokenizer, and leave a target complete or absent."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_rl.convert.disk import remove, replace, unused
from megatron_rl.convert.safetensors_io import TensorInfo
from megatron_rl.convert.weights import Weights
from megatron_rl.errors import ConfigError, UserError
from megatron_rl.files import free_bytes
from megatron_rl.models.facts import hf_folder

Progress = Callable[[int, int], None]  # (bytes more, bytes in all)
SLACK_BYTES = 64 * 2**20  # headers, metadata, tokenizer
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def converted(weights: Weights, dtype: str) -> tuple[dict[str, TensorInfo], int]:
    """Return a model's tensors in another dtype, or as they are ("keep"), and their bytes.

    Raises: ConfigError for an unknown dtype, and when the folder's tokenizer does not belong to the model.
    """
    if dtype != "keep" and dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: expected keep, {', '.join(DTYPES)}")
    tensors = {name: TensorInfo(info.shape, DTYPES.get(dtype, info.dtype)) for name, info in weights.tensors.items()}
    _check_tokenizer(weights)
    return tensors, sum(info.nbytes for info in tensors.values())


def cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `tensor` as `dtype`. Raises: UserError when a finite value does not fit."""
    result = tensor.to(dtype)
    if dtype == torch.float16 and tensor.dtype != dtype:
        lost = int((result.isinf() & tensor.isfinite()).sum())
        if lost:
            raise UserError(f"{name}: {lost} values are beyond float16's range; convert to bfloat16 or float32")
    return result


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a model folder. Raises: ConfigError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ConfigError(f"{folder}: the tokenizer cannot be loaded: {error}") from error


def _check_tokenizer(weights: Weights) -> None:
    """Check that the model has an embedding for each token that the folder's tokenizer, if any, knows."""
    folder, size = weights.hf_folder, weights.hf.vocab_size
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return
    largest = max(load_tokenizer(folder).get_vocab().values(), default=-1)
    if largest >= size:
        raise ConfigError(
            f"{folder}: tokenizer mismatch: it has a token {largest}, the model's vocab_size is {size}; give the "
            "tokenizer that belongs to the model"
        )


@contextmanager
def published(target: Path, source: Path, needed_bytes: int, force: bool) -> Iterator[Path]:
    """Yield a new folder beside `target` to write into; leaving the block without an error renames it to `target`.

    An error removes it; one that a killed conversion left behind is removed at the start.
    Raises: UserError before anything is written when the target exists (without `force`) or is no model that a
    conversion could write again, source and target lie within one another, another conversion writes the target, or
    less than `needed_bytes` are free on the disk; and when writing fails.
    """
    target, source = target.absolute(), source.resolve()
    resolved = target.resolve()
    if resolved == source or source in resolved.parents or resolved in source.parents:
        raise UserError(f"{target} and the source {source} lie within one another; give another target")
    draft, old = (target.with_name(f".{target.name}.{what}") for what in ("draft", "old"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(draft) as folder:
            if old.exists() and not target.exists():  # a replacement was killed between its two renames
                old.rename(target)
            remove(old)
            _check_target(target, force)
            free = free_bytes(target.parent)
            if free < needed_bytes:
                raise UserError(
                    f"{target.parent}: the result needs {needed_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
                    "make room or choose another disk"
                )
            yield folder
            replace(folder, target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error}; nothing was left behind") from error


def _check_target(target: Path, force: bool) -> None:
    if not os.path.lexists(target):
        return
    if not force:
        raise UserError(f"{target} exists; give another target, or --force to replace it")
    if target.is_symlink() or not (hf_folder(target) / "config.json").is_file():
        raise UserError(f"{target} is no model folder: --force does not replace it; remove it yourself")
    if (target / "config.yaml").is_file():
        raise UserError(
            f"{target} is a training checkpoint: --force does not replace it, because its run could not go on without "
            "its optimizer; give another target, or remove it yourself"
        )


@contextmanager
def _locked(draft: Path) -> Iterator[Path]:
    """Yield an empty folder, `draft` unless something there cannot be removed, and remove it on an error.

    `draft` is locked until this process ends, so that two conversions never write one target.
    """
    draft.mkdir(exist_ok=True)
    lock = os.open(draft, os.O_RDONLY)
    folder = draft
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{draft}: another conversion is writing it; wait for it, or end it") from error
        try:
            if not all([remove(path) for path in draft.iterdir()]):  # each is tried
                folder = unused(draft)
                folder.mkdir()
            yield folder
        except BaseException:
            remove(folder)
            raise
    finally:
        os.close(lock)
