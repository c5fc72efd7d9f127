"""One table between Hugging Face names and Megatron's: it serves loading, export and the weight stream to the engines.

A row says which Hugging Face tensors make one Megatron parameter and how tensor parallelism splits it. Everything here
is plain tensor arithmetic: no collective, no Megatron import.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig

from megatron_rl.config_checks import ConfigError

Kind = Literal["replicated", "row", "vocab", "qkv", "gate_up"]


@dataclass(frozen=True, slots=True)
class Row:
    """`megatron` and `hf` may hold `{layer}`, the global layer index."""

    megatron: str
    hf: tuple[str, ...]
    kind: Kind


_LAYER = "model.layers.{layer}."
_ATTENTION, _MLP = _LAYER + "self_attn.", _LAYER + "mlp."
_DECODER = "decoder.layers.{layer}."
ROWS = (
    Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocab"),
    Row(_DECODER + "input_layernorm.weight", (_LAYER + "input_layernorm.weight",), "replicated"),
    Row(_DECODER + "self_attention.linear_qkv.weight", tuple(f"{_ATTENTION}{c}_proj.weight" for c in "qkv"), "qkv"),
    Row(_DECODER + "self_attention.linear_qkv.bias", tuple(f"{_ATTENTION}{c}_proj.bias" for c in "qkv"), "qkv"),
    Row(_DECODER + "self_attention.q_layernorm.weight", (_ATTENTION + "q_norm.weight",), "replicated"),
    Row(_DECODER + "self_attention.k_layernorm.weight", (_ATTENTION + "k_norm.weight",), "replicated"),
    Row(_DECODER + "self_attention.linear_proj.weight", (_ATTENTION + "o_proj.weight",), "row"),
    Row(_DECODER + "pre_mlp_layernorm.weight", (_LAYER + "post_attention_layernorm.weight",), "replicated"),
    Row(_DECODER + "mlp.linear_fc1.weight", (_MLP + "gate_proj.weight", _MLP + "up_proj.weight"), "gate_up"),
    Row(_DECODER + "mlp.linear_fc2.weight", (_MLP + "down_proj.weight",), "row"),
    Row("decoder.final_layernorm.weight", ("model.norm.weight",), "replicated"),
    Row("output_layer.weight", ("lm_head.weight",), "vocab"),
)
_BY_MEGATRON = {row.megatron: row for row in ROWS}

# Transformer Engine fuses a norm into the linear layer that follows it and names the weight after that layer
_TE_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def find_row(local_name: str, layer_offset: int, tied: bool) -> Row:
    """The row of a parameter of this pipeline stage, layer index filled in (`layer_offset`: layers on earlier stages).

    With tied embeddings the output layer of a later stage is the embedding's copy. Raises: KeyError naming the
    parameter.
    """
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", local_name)
    layer = ""
    if match:
        layer = str(int(match[1]) + layer_offset)
        local_name = _DECODER + _TE_NAMES.get(match[2], match[2])
    if local_name == "output_layer.weight" and tied:
        local_name = "embedding.word_embeddings.weight"
    row = _BY_MEGATRON.get(local_name)
    if row is None:
        raise KeyError(f"no mapping row for the Megatron parameter {local_name!r}")
    fill = lambda name: name.replace("{layer}", layer)  # noqa: E731
    return Row(fill(row.megatron), tuple(fill(name) for name in row.hf), row.kind)


def to_shard(
    row: Row, tensors: list[Tensor], hf: PretrainedConfig, tp_rank: int, tp_size: int, padded_vocab: int
) -> Tensor:
    """Full Hugging Face tensors -> this rank's Megatron shard. Padded vocabulary rows are 0."""
    full = tensors[0]
    match row.kind:
        case "replicated":
            return full
        case "row":
            return full.chunk(tp_size, dim=1)[tp_rank]
        case "vocab":
            rows = padded_vocab // tp_size
            start = tp_rank * rows
            shard = full.new_zeros(rows, full.shape[1])
            real = full[start : start + rows]
            shard[: real.shape[0]] = real
            return shard
        case "qkv":
            groups = hf.num_key_value_heads
            merged = torch.cat([t.reshape(groups, -1, *t.shape[1:]) for t in tensors], dim=1)
            return merged.chunk(tp_size, dim=0)[tp_rank].reshape(-1, *full.shape[1:])
        case "gate_up":
            return torch.cat([t.chunk(tp_size, dim=0)[tp_rank] for t in tensors])


def from_shards(row: Row, shards: list[Tensor], hf: PretrainedConfig) -> list[Tensor]:
    """All tensor-parallel shards of one parameter, in rank order -> its Hugging Face tensors (the inverse of
    `to_shard`)."""
    match row.kind:
        case "replicated":
            return [shards[0]]
        case "row":
            return [torch.cat(shards, dim=1)]
        case "vocab":
            return [torch.cat(shards, dim=0)[: hf.vocab_size]]
        case "qkv":
            groups = hf.num_key_value_heads
            ratio = hf.num_attention_heads // groups
            merged = torch.cat(shards, dim=0)
            width = merged.shape[0] // (groups * (ratio + 2))
            parts = merged.reshape(groups, (ratio + 2) * width, *merged.shape[1:]).split(
                [ratio * width, width, width], dim=1
            )
            return [part.reshape(-1, *merged.shape[1:]) for part in parts]
        case "gate_up":
            halves = [shard.chunk(2, dim=0) for shard in shards]
            return [torch.cat([half[i] for half in halves]) for i in (0, 1)]


def full_shapes(row: Row, shard: Sequence[int], hf: PretrainedConfig, tp_size: int) -> list[tuple[int, ...]]:
    """Shapes of the Hugging Face tensors of a row whose Megatron shard has the shape `shard`."""
    first, *rest = shard
    match row.kind:
        case "replicated":
            return [tuple(shard)]
        case "row":
            return [(first, rest[0] * tp_size)]
        case "vocab":
            return [(hf.vocab_size, *rest)]
        case "qkv":
            ratio = hf.num_attention_heads // hf.num_key_value_heads
            one = first * tp_size // (ratio + 2)  # rows of all keys
            return [(ratio * one, *rest), (one, *rest), (one, *rest)]
        case "gate_up":
            return [(first * tp_size // 2, *rest)] * 2


def load_weights(
    parameters: Iterable[tuple[str, Tensor]],
    source: Callable[[str], Tensor],
    hf: PretrainedConfig,
    *,
    layer_offset: int,
    tp_rank: int,
    tp_size: int,
    padded_vocab: int,
) -> None:
    """Fill a stage's parameters from `source(hf_name)`. Raises: ConfigError naming a tensor whose shape does not
    fit."""
    for name, parameter in parameters:
        row = find_row(name, layer_offset, hf.tie_word_embeddings)
        tensors, shapes = [source(n) for n in row.hf], full_shapes(row, parameter.shape, hf, tp_size)
        # the full tensors, before any split: padding would fill a short embedding with zero rows and cut a long one
        for hf_name, tensor, expected in zip(row.hf, tensors, shapes, strict=True):
            if tuple(tensor.shape) != expected:
                raise ConfigError(
                    f"{hf_name} has shape {tuple(tensor.shape)}, expected {expected} for the Megatron parameter "
                    f"{name}; the weights do not belong to this config.json"
                )
        with torch.no_grad():
            parameter.copy_(to_shard(row, tensors, hf, tp_rank, tp_size, padded_vocab))
