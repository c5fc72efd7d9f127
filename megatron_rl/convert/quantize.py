"""Export a quantised model through nvidia-modelopt: the unified Hugging Face format that SGLang and vLLM load."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_rl import device
from megatron_rl.convert.check import transformers_model
from megatron_rl.convert.folders import DTYPES, check_tokenizer, converted, load_tokenizer, published
from megatron_rl.convert.model_files import converted_files, write_files
from megatron_rl.convert.to_hf import open_checkpoint
from megatron_rl.errors import ConfigError, UserError

# the exported INT8 format is named after SmoothQuant (W8A8_SQ_PER_CHANNEL), with or without its factors
RECIPES = {"fp8": "FP8_DEFAULT_CFG", "int8": "INT8_SMOOTHQUANT_CFG"}
_MAX_TEXTS = 128
_MAX_TOKENS = 512
_FREE_BYTES = 2 * 10**9  # beside the quantised model: what modelopt writes on the way


def quantize_to_hf(
    source: Path, target: Path, *, recipe: str, calibration: Path, dtype: str = "keep", force: bool = False
) -> None:
    """Write a quantised Hugging Face folder from a Megatron checkpoint. The whole model is held in memory, twice at its
    peak.

    recipe: fp8 (weights and activations, one scale a tensor) or int8 (SmoothQuant, one scale a channel). calibration: a
    file of texts typical of the model's use (see `read_texts`) from which the activations' scales come.
    Raises: UserError without nvidia-modelopt or when it cannot quantise this model, ConfigError for a refused source.
    """
    if recipe not in RECIPES:
        raise ConfigError(f"--quantize {recipe}: expected one of {', '.join(RECIPES)}")
    mtq, export = _modelopt()
    weights, texts = open_checkpoint(source), list(read_texts(calibration))
    tensors = converted(weights.tensors, dtype)
    check_tokenizer(weights)
    total = sum(info.nbytes for info in tensors.values())
    with published(target, source, total + _FREE_BYTES, force) as draft:
        stored = next(iter(tensors.values())).dtype if dtype == "keep" else DTYPES[dtype]
        model = transformers_model(weights, stored)
        model.config.architectures = model.config.architectures or [type(model).__name__]  # the export asks for it
        batches = _batches(weights.hf_folder, texts)

        def feed(calibrated: Any) -> None:
            with torch.inference_mode():
                for batch in batches:
                    calibrated(batch)

        try:
            export(mtq.quantize(model, getattr(mtq, RECIPES[recipe]), feed), export_dir=str(draft))
        except (RuntimeError, ValueError, NotImplementedError, AssertionError, KeyError) as error:
            raise UserError(
                f"nvidia-modelopt cannot make {recipe} of this {weights.hf.model_type} model on this machine: "
                f"{type(error).__name__}: {error}"
            ) from error
        exported = json.loads((draft / "config.json").read_bytes())
        files = converted_files(weights, tensors.values())
        described = json.loads(files["config.json"]) | {"quantization_config": exported["quantization_config"]}
        write_files(draft, files | {"config.json": json.dumps(described, indent=2).encode()})


def read_texts(path: Path) -> Iterator[str]:
    """Yield the first texts of a file: a line each, or the field `problem`, `prompt` or `text` of JSON lines.

    Raises: ConfigError without such a file, without a text in it, for a line that is no UTF-8, or a JSON line without
    such a field.
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
        text = str(next(record[key] for key in ("problem", "prompt", "text") if key in record))
        text.encode()  # half of a surrogate pair is valid JSON and no text
    except (ValueError, TypeError, StopIteration) as error:
        raise ConfigError(f"{path}:{number}: expected a JSON object with problem, prompt or text") from error
    return text


def _batches(folder: Path, texts: list[str]) -> list[torch.Tensor]:
    tokenizer = load_tokenizer(folder)
    return [tokenizer(text, return_tensors="pt", truncation=True, max_length=_MAX_TOKENS).input_ids for text in texts]


def _modelopt() -> tuple[Any, Any]:
    device.prepare_megatron()  # modelopt imports megatron.core
    try:
        import modelopt.torch.quantization as mtq
        from modelopt.torch.export import export_hf_checkpoint
    except ImportError as error:
        raise UserError(
            f"--quantize needs nvidia-modelopt ({error}); install it: pip install 'megatron_rl[quantize]'"
        ) from error
    return mtq, export_hf_checkpoint
