"""Convert a Hugging Face folder to a Megatron checkpoint, one parameter at a time, in one process."""

from pathlib import Path

from megatron_rl.convert.folders import SLACK_BYTES, Progress, cast, converted, published
from megatron_rl.convert.model_files import converted_files, write_files
from megatron_rl.convert.torch_dist import TorchDistWriter
from megatron_rl.convert.weights import open_weights, place_of
from megatron_rl.errors import ConfigError
from megatron_rl.models.mapping import model_rows, to_shard


def hf_to_megatron(
    source: Path,
    target: Path,
    *,
    dtype: str = "keep",
    force: bool = False,
    progress: Progress = lambda count, total: None,
) -> None:
    """Write the Megatron checkpoint `target`, its sub-folder `hf` holding config.json, tokenizer and the like.

    Memory: about twice the largest parameter. dtype: of the result; "keep" changes none.
    Raises: ConfigError when the source is refused, UserError when the target is; before anything is written.
    """
    weights = open_weights(source)
    if weights.is_megatron:
        raise ConfigError(
            f"{source} is a Megatron checkpoint already; hf-to-megatron takes a Hugging Face model, as "
            "megatron-to-hf writes it"
        )
    tensors, total = converted(weights, dtype)
    with published(target, source, total + SLACK_BYTES, force) as draft:
        writer, hf = TorchDistWriter(draft), weights.hf
        for row in model_rows(hf):
            parts = [cast(name, weights.read(name), tensors[name].dtype) for name in row.hf]
            # the shard of a layout with one rank is the whole; its vocabulary needs no padding, and no copy
            whole = parts[0] if row.kind == "vocab" else to_shard(row, parts, hf, 0, 1, hf.vocab_size)
            place = place_of(row, hf)
            writer.add(place.keys, whole, place.index, place.lead)
            for module in {key.rpartition(".")[0] for key in place.keys}:
                writer.add_nothing(f"{module}._extra_state", place.index, place.lead)
            progress(sum(part.nbytes for part in parts), total)
        writer.finish()
        write_files(draft / "hf", converted_files(weights, tensors.values()))
