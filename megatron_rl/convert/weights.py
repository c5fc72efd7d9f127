"""The weights of a model folder under their Hugging Face names, one tensor at a time, whatever the folder's format.

A Hugging Face folder holds config.json and safetensors. A Megatron checkpoint is a `torch_dist` folder, written by
`megatron-rl convert` or by training, whose sub-folder `hf/` holds config.json and the tokenizer. Its tensors do not
depend on the layout that wrote them: layers (and experts) are stacked in leading dimensions.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from megatron_rl.convert.safetensors_io import Stored, TensorInfo, stored_tensors
from megatron_rl.convert.torch_dist import TorchDistError, TorchDistReader
from megatron_rl.errors import ConfigError
from megatron_rl.models.architecture import head_dim, resolve_hf_config
from megatron_rl.models.facts import architecture_faults, hf_folder, read_config_json
from megatron_rl.models.mapping import LAYER_INDEX, TE_NAMES, Row, check_names, from_shards, is_moe_layer, model_rows

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Weights:
    """A checked model folder."""

    path: Path
    is_megatron: bool
    raw_config: dict[str, Any]  # config.json
    hf: PretrainedConfig
    tensors: dict[str, TensorInfo]  # Hugging Face name -> what `read(name)` gives, in the order of the layers
    read: Callable[[str], Tensor]

    @property
    def hf_folder(self) -> Path:
        """Where config.json and the tokenizer are."""
        return hf_folder(self.path)


@dataclass(frozen=True, slots=True)
class CheckpointPlace:
    """Where Megatron's checkpoint keeps the parameter of a row: `tensor[index]` of the one of `keys` that is there,
    whose shape begins with `lead`."""

    keys: tuple[str, ...]
    index: tuple[int, ...]
    lead: tuple[int, ...]


_FUSED = {norm: weight for weight, norm in TE_NAMES.items()}
_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")
_MODEL_KEYS = ("embedding.", "decoder.", "output_layer.")


def place_of(row: Row, hf: PretrainedConfig) -> CheckpointPlace:
    """Where Megatron-Core 0.16 puts the (filled) row. Source: TransformerBlock.sharded_state_dict, SequentialMLP."""
    match = LAYER_INDEX.fullmatch(row.megatron)
    if match is None:
        return CheckpointPlace((row.megatron,), (), ())
    layer, rest = int(match[1]), match[2]
    names: tuple[str, ...] = (_FUSED.get(rest, rest),)
    if rest == "pre_mlp_layernorm.weight" and is_moe_layer(hf, layer):
        names = (*names, rest)  # before experts the local layers keep the dense name, Transformer Engine's do not
    index, lead = [layer], [hf.num_hidden_layers]
    prefix = "decoder.layers."
    if len({is_moe_layer(hf, other) for other in range(hf.num_hidden_layers)}) > 1:
        index, lead, prefix = [], [], f"decoder.layers.{layer}."  # layers that differ cannot be stacked
    if expert := _EXPERT.search(rest):
        index.append(int(expert[1]))
        lead.append(hf.num_experts)
        names = (_EXPERT.sub(".experts.", rest),)
    return CheckpointPlace(tuple(prefix + name for name in names), tuple(index), tuple(lead))


def expected_shapes(row: Row, hf: PretrainedConfig) -> list[tuple[int, ...]]:
    """Shapes of the Hugging Face tensors of a (filled) row, from config.json alone."""
    hidden, width = hf.hidden_size, head_dim(hf)
    ffn = hf.moe_intermediate_size if row.is_expert else hf.intermediate_size
    queries, keys = hf.num_attention_heads * width, hf.num_key_value_heads * width
    match row.kind:
        case "vocab":
            return [(hf.vocab_size, hidden)]
        case "qkv":
            inputs = (hidden,) if row.megatron.endswith("weight") else ()
            return [(rows, *inputs) for rows in (queries, keys, keys)]
        case "gate_up":
            return [(ffn, hidden)] * 2
        case "row":
            return [(hidden, ffn if "linear_fc2" in row.megatron else queries)]
        case "replicated":
            if row.megatron.endswith("router.weight"):
                return [(hf.num_experts, hidden)]
            is_head_norm = row.megatron.endswith(("q_layernorm.weight", "k_layernorm.weight"))
            return [(width,) if is_head_norm else (hidden,)]


def expected_weights(hf: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of every weight of a model, in the order of its layers, from its config alone."""
    return {name: shape for row in model_rows(hf) for name, shape in zip(row.hf, expected_shapes(row, hf), strict=True)}


def open_weights(path: str | Path, hf: PretrainedConfig | None = None) -> Weights:
    """Check a model folder of either format against its config.json (or `hf`) and open it. No tensor is read but two
    embeddings that must be equal.

    Raises: ConfigError naming what does not fit: the architecture, a file, a tensor.
    """
    folder = Path(path)
    raw = read_config_json(folder)
    is_megatron = any((folder / name).is_file() for name in ("metadata.json", ".metadata"))
    if faults := architecture_faults(raw):
        raise ConfigError(f"{folder}: {'; '.join(faults)}")
    try:
        hf = hf or resolve_hf_config(raw)
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from error
    opened = _open_megatron(folder, hf) if is_megatron else _open_hf(folder, hf)
    return Weights(folder, is_megatron, raw, hf, *opened)


def _open_hf(folder: Path, hf: PretrainedConfig) -> tuple[dict[str, TensorInfo], Callable[[str], Tensor]]:
    stored = stored_tensors(folder)
    check_names(stored, hf, str(folder))
    expected = expected_weights(hf)
    tensors = {name: stored[name].info for name in expected}
    for name, info in tensors.items():
        if info.shape != expected[name]:
            raise ConfigError(_misfit(folder, name, info.shape, expected[name]))
    if hf.tie_word_embeddings and "lm_head.weight" in stored:
        if not _are_equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"]):
            raise ConfigError(
                f"{folder}: config.json ties the embeddings, but lm_head.weight and model.embed_tokens.weight differ; "
                "set tie_word_embeddings=false, or remove lm_head.weight"
            )
    return tensors, lambda name: stored[name].read()


def _are_equal(a: Stored, b: Stored, rows: int = 8192) -> bool:
    """Whether two matrices are equal, a few rows at a time."""
    starts = range(0, a.info.shape[0], rows)
    return a.info == b.info and all(torch.equal(a.read(start, rows), b.read(start, rows)) for start in starts)


def _open_megatron(folder: Path, hf: PretrainedConfig) -> tuple[dict[str, TensorInfo], Callable[[str], Tensor]]:
    try:
        reader = TorchDistReader(folder)
    except TorchDistError as error:
        raise ConfigError(str(error)) from error
    tensors: dict[str, TensorInfo] = {}
    rows: dict[str, Row] = {}
    keys: dict[str, str] = {}  # Megatron parameter -> key in this checkpoint
    missing: list[str] = []
    for row in model_rows(hf):
        place, shapes = place_of(row, hf), expected_shapes(row, hf)
        key = next((key for key in place.keys if key in reader.tensors), None)
        if key is None:
            missing.append(place.keys[0])
            continue
        stored = reader.tensors[key]
        found, expected = tuple(stored.size), (*place.lead, sum(shape[0] for shape in shapes), *shapes[0][1:])
        fits = found[0] >= expected[0] and found[1:] == expected[1:] if row.kind == "vocab" else found == expected
        if not fits:
            raise ConfigError(_misfit(folder, key, found, expected))
        if stored.properties.dtype not in FLOATS:
            raise ConfigError(f"{folder}: {key} is {stored.properties.dtype}; only plain floats can be converted")
        keys[row.megatron] = key
        for name, shape in zip(row.hf, shapes, strict=True):
            tensors[name], rows[name] = TensorInfo(shape, stored.properties.dtype), row
    known = set(keys.values()).union(*(place_of(row, hf).keys for row in rows.values()))
    unknown = sorted(key for key in reader.tensors if key.startswith(_MODEL_KEYS) and key not in known)
    faults = {"missing": sorted(set(missing)), "unknown": unknown}
    if any(faults.values()):
        text = "; ".join(f"{len(some)} {what}: {', '.join(some[:3])}" for what, some in faults.items() if some)
        raise ConfigError(f"{folder}: not the weights of a {hf.model_type} model of this config.json; tensors {text}")
    return tensors, _megatron_source(reader, rows, keys, hf)


def _megatron_source(
    reader: TorchDistReader, rows: dict[str, Row], keys: dict[str, str], hf: PretrainedConfig
) -> Callable[[str], Tensor]:
    last: dict[str, Tensor] = {}  # the tensors of one row: q, k and v come from the same parameter

    def read(name: str) -> Tensor:
        if name not in last:
            last.clear()  # before the next is read, so that memory holds one
            row = rows[name]
            whole = reader.read(
                keys[row.megatron], place_of(row, hf).index, hf.vocab_size if row.kind == "vocab" else None
            )
            last.update(zip(row.hf, from_shards(row, [whole], hf), strict=True))
        return last[name]

    return read


def _misfit(folder: Path, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    return f"{folder}: {name} has shape {found}, expected {expected}; the weights do not belong to this config.json"
