"""Write the policy in Hugging Face format, its weights as a bounded stream."""

import glob
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from megatron_rl.convert.disk import remove, replace, unused
from megatron_rl.convert.model_files import Described, policy_files, write_files
from megatron_rl.convert.safetensors_io import TensorInfo, shards, write_model
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

    Rank 0 writes what the weight stream brings, see `write_shards`.
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
            replace(draft, folder)
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

    Holds one such file, and the tensor that begins the next. Raises: OSError.
    """
    held: dict[str, Tensor] = {}

    def announced() -> Iterator[tuple[str, TensorInfo]]:
        for name, tensor in stream:
            held[name] = tensor.detach().to("cpu", copy=True)  # a view would hold its whole bucket
            yield name, TensorInfo(tuple(tensor.shape), tensor.dtype)

    write_model(folder, shards(announced(), shard_bytes), held.pop)
