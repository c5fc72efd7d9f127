"""Convert a Megatron checkpoint to a Hugging Face folder with sharded safetensors, one parameter at a time."""

import re
from pathlib import Path

from torch import Tensor

from megatron_rl.convert.folders import SLACK_BYTES, Progress, cast, converted, published
from megatron_rl.convert.model_files import converted_files, write_files
from megatron_rl.convert.safetensors_io import shards, write_model
from megatron_rl.convert.weights import Weights, open_weights
from megatron_rl.errors import ConfigError

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}  # as in transformers


def megatron_to_hf(
    source: Path,
    target: Path,
    *,
    dtype: str = "keep",
    max_shard_size: str = "5GB",
    force: bool = False,
    progress: Progress = lambda count, total: None,
) -> None:
    """Write the Hugging Face folder `target` from a converted or a training checkpoint (of any layout).

    Memory: about twice the largest parameter. max_shard_size: of one file, such as 500MB.
    Raises: ConfigError when the source is refused, UserError when the target is; before anything is written.
    """
    weights, limit = open_checkpoint(source), parse_size(max_shard_size)
    tensors, total = converted(weights, dtype)

    def read(name: str) -> Tensor:
        return cast(name, weights.read(name), tensors[name].dtype)

    with published(target, source, total + SLACK_BYTES, force) as draft:
        write_model(draft, shards(tensors.items(), limit), read, lambda count: progress(count, total))
        write_files(draft, converted_files(weights, tensors.values()))


def open_checkpoint(source: Path) -> Weights:
    """Open a Megatron checkpoint. Raises: ConfigError, also for a folder of the other format."""
    weights = open_weights(source)
    if not weights.is_megatron:
        raise ConfigError(f"{source} is a Hugging Face model already; megatron-to-hf takes a Megatron checkpoint")
    return weights


def parse_size(text: str) -> int:
    """Return the bytes of a size such as 5GB. Raises: ConfigError."""
    match = re.fullmatch(r"(\d+)(KB|MB|GB)", text.upper())
    if match is None or int(match[1]) == 0:
        raise ConfigError(f"--max-shard-size {text}: expected a number and KB, MB or GB, such as 5GB")
    return int(match[1]) * _UNITS[match[2]]
