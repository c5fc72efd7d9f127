"""Export a quantised model for SGLang and vLLM: FP8 through nvidia-modelopt, INT8 as compressed-tensors stores it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_rl import device
from megatron_rl.convert.check import transformers_model
from megatron_rl.convert.folders import DTYPES, SLACK_BYTES, cast, converted, load_tokenizer, published
from megatron_rl.convert.model_files import converted_files, write_files
from megatron_rl.convert.safetensors_io import TensorInfo
from megatron_rl.convert.save_hf import write_shards
from megatron_rl.convert.to_hf import open_checkpoint, parse_size
from megatron_rl.convert.weights import Weights
from megatron_rl.errors import ConfigError, UserError
from megatron_rl.models.facts import is_moe

# what compressed-tensors' config.json says of such a model
INT8_CONFIG: dict[str, Any] = json.loads((Path(__file__).parent / "assets" / "int8.json").read_text())
_LINEAR = "_proj.weight"  # ends the Hugging Face names of all weights of linear layers but lm_head
_MAX_TEXTS = 128
_CUT_TEXT: dict[str, Any] = {"return_tensors": "pt", "truncation": True, "max_length": 512}
_FREE_BYTES = 2 * 10**9  # beside the quantised model: what modelopt writes on the way


def fp8_to_hf(source: Path, target: Path, *, calibration: Path, dtype: str = "keep", force: bool = False) -> None:
    """Write an FP8 Hugging Face folder from a Megatron checkpoint: weights and activations, one scale a tensor. The
    whole model is held in memory, twice at its peak.

    calibration: a file of texts typical of the model's use (see `read_texts`) from which the activations' scales come.
    Raises: UserError without nvidia-modelopt or when it cannot quantise this model, ConfigError for a refused source.
    """
    mtq, export = _modelopt()
    weights, texts = open_checkpoint(source), list(read_texts(calibration))
    tensors, total = converted(weights, dtype)
    with published(target, source, total + _FREE_BYTES, force) as draft:
        stored = next(iter(tensors.values())).dtype if dtype == "keep" else DTYPES[dtype]
        model = transformers_model(weights, stored)
        model.config.architectures = model.config.architectures or [type(model).__name__]  # the export asks for it
        tokenizer = load_tokenizer(weights.hf_folder)
        batches = [tokenizer(text, **_CUT_TEXT).input_ids for text in texts]

        def feed(calibrated: Any) -> None:
            with torch.inference_mode():
                for batch in batches:
                    calibrated(batch)

        try:
            export(mtq.quantize(model, mtq.FP8_DEFAULT_CFG, feed), export_dir=str(draft))
        except (RuntimeError, ValueError, NotImplementedError, AssertionError, KeyError) as error:
            raise UserError(
                f"nvidia-modelopt cannot make fp8 of this {weights.hf.model_type} model on this machine: "
                f"{type(error).__name__}: {error}"
            ) from error
        exported = json.loads((draft / "config.json").read_bytes())
        _describe(draft, weights, tensors, exported["quantization_config"])


def int8_to_hf(
    source: Path, target: Path, *, dtype: str = "keep", max_shard_size: str = "5GB", force: bool = False
) -> None:
    """Write an INT8 Hugging Face folder from a Megatron checkpoint, in the form that compressed-tensors calls
    int-quantized: the linear layers' weights rounded, one float32 scale an output channel; the engine quantises each
    token's activations itself, so nothing is calibrated. Embeddings, norms and lm_head keep their dtype.

    Memory: one file of at most `max_shard_size`.
    Raises: ConfigError when the source is refused, UserError when the target is; before anything is written.
    """
    weights, limit = open_checkpoint(source), parse_size(max_shard_size)
    if is_moe(weights.raw_config):
        raise ConfigError(
            f"{source}: --quantize int8 takes no mixture of experts: SGLang 0.5.23 loads INT8 experts on NPUs alone; "
            "take --quantize fp8"
        )
    tensors, total = converted(weights, dtype)

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for name, info in tensors.items():
            if name.endswith(_LINEAR):
                rounded, scale = _round_channels(weights.read(name))
                yield name, rounded
                yield f"{name}_scale", scale
            else:
                yield name, cast(name, weights.read(name), info.dtype)

    with published(target, source, total + SLACK_BYTES, force) as draft:
        write_shards(draft, stream(), limit)
        _describe(draft, weights, tensors, INT8_CONFIG)


def _round_channels(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `[out, in]` int8 and `[out, 1]` float32 whose product is `weight` to half a scale."""
    weight = weight.float()
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale.where(scale > 0, 1.0)).round().to(torch.int8), scale


def _describe(draft: Path, weights: Weights, tensors: dict[str, TensorInfo], quantization: dict[str, Any]) -> None:
    files = converted_files(weights, tensors.values())
    described = json.loads(files["config.json"]) | {"quantization_config": quantization}
    write_files(draft, files | {"config.json": json.dumps(described, indent=2).encode()})


def read_texts(path: Path) -> Iterator[str]:
    """Yield the first texts of a file: a line each, or the field `problem`, `prompt` or `text` of JSON lines.

    Raises: ConfigError without such a file or a text, for a line that is no UTF-8, or a JSON line without such a field.
    """
    if not path.is_file():
        raise ConfigError(f"--calibration {path}: no such file; give texts typical of the model's use, one a line")
    count = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            yield _text(line, path, number)
            count += 1
            if count == _MAX_TEXTS:
                return
    if not count:
        raise ConfigError(f"--calibration {path}: the file is empty; give texts, one a line")


def _text(line: bytes, path: Path, number: int) -> str:
    try:
        text = line.decode("utf-8-sig").strip()  # some editors put a byte order mark before the first line
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}:{number}: expected text in UTF-8: {error}; save the file in UTF-8") from error
    if path.suffix != ".jsonl":
        return text
    try:
        record = json.loads(text)
        text = next(record[key] for key in ("problem", "prompt", "text") if key in record)
        text.encode()  # half of a surrogate pair is valid JSON and no text, and messages are none either
    except (ValueError, TypeError, StopIteration, AttributeError) as error:
        raise ConfigError(f"{path}:{number}: expected a JSON object with a text as problem, prompt or text") from error
    return text


def _modelopt() -> tuple[Any, Any]:
    device.prepare_megatron()  # modelopt imports megatron.core
    try:
        import modelopt.torch.quantization as mtq
        from modelopt.torch.export import export_hf_checkpoint
    except ImportError as error:
        raise UserError(
            f"--quantize fp8 needs nvidia-modelopt ({error}); type: pip install 'nvidia-modelopt==0.47.*' requests"
        ) from error
    return mtq, export_hf_checkpoint
