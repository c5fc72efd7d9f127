"""One table between Hugging Face names and Megatron's: it serves loading, export and the weight stream to the engines.

A row says which Hugging Face tensors make one Megatron parameter, in which architectures it occurs and how tensor
parallelism splits it. The Hugging Face names are those on disk (one tensor an expert). Everything here is plain tensor
arithmetic: no collective, no Megatron import.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal, Self

import torch
from torch import Tensor
from transformers import PretrainedConfig

from megatron_rl.errors import ConfigError
from megatron_rl.models.facts import ARCHITECTURES

Kind = Literal["replicated", "row", "vocab", "qkv", "gate_up"]
Where = Literal["everywhere", "untied", "qkv_bias", "qk_norm", "dense", "moe"]


@dataclass(frozen=True, slots=True)
class Row:
    """`megatron` and `hf` may hold `{layer}` and `{expert}`, the global indices of the layer and of the expert."""

    megatron: str
    hf: tuple[str, ...]
    kind: Kind
    where: Where = "everywhere"

    @property
    def is_expert(self) -> bool:
        """Return whether the parameter belongs to one expert, and so to one rank of the expert-parallel group."""
        return ".experts." in self.megatron

    def fill(self, layer: int | str, expert: int | str = "") -> Self:
        """Return the row with its placeholders replaced."""
        fill = lambda name: name.replace("{layer}", str(layer)).replace("{expert}", str(expert))  # noqa: E731
        return replace(self, megatron=fill(self.megatron), hf=tuple(map(fill, self.hf)))


_LAYER = "model.layers.{layer}."
_ATTENTION, _MLP = _LAYER + "self_attn.", _LAYER + "mlp."
_DECODER = "decoder.layers.{layer}."
_EXPERT, _HF_EXPERT = _DECODER + "mlp.experts.local_experts.{expert}.", _MLP + "experts.{expert}."
_QKV = _DECODER + "self_attention.linear_qkv."
ROWS = (
    Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocab"),
    Row(_DECODER + "input_layernorm.weight", (_LAYER + "input_layernorm.weight",), "replicated"),
    Row(_QKV + "weight", tuple(f"{_ATTENTION}{c}_proj.weight" for c in "qkv"), "qkv"),
    Row(_QKV + "bias", tuple(f"{_ATTENTION}{c}_proj.bias" for c in "qkv"), "qkv", "qkv_bias"),
    Row(_DECODER + "self_attention.q_layernorm.weight", (_ATTENTION + "q_norm.weight",), "replicated", "qk_norm"),
    Row(_DECODER + "self_attention.k_layernorm.weight", (_ATTENTION + "k_norm.weight",), "replicated", "qk_norm"),
    Row(_DECODER + "self_attention.linear_proj.weight", (_ATTENTION + "o_proj.weight",), "row"),
    Row(_DECODER + "pre_mlp_layernorm.weight", (_LAYER + "post_attention_layernorm.weight",), "replicated"),
    Row(_DECODER + "mlp.linear_fc1.weight", (_MLP + "gate_proj.weight", _MLP + "up_proj.weight"), "gate_up", "dense"),
    Row(_DECODER + "mlp.linear_fc2.weight", (_MLP + "down_proj.weight",), "row", "dense"),
    Row(_DECODER + "mlp.router.weight", (_MLP + "gate.weight",), "replicated", "moe"),
    Row(_EXPERT + "linear_fc1.weight", tuple(f"{_HF_EXPERT}{c}_proj.weight" for c in ("gate", "up")), "gate_up", "moe"),
    Row(_EXPERT + "linear_fc2.weight", (_HF_EXPERT + "down_proj.weight",), "row", "moe"),
    Row("decoder.final_layernorm.weight", ("model.norm.weight",), "replicated"),
    Row("output_layer.weight", ("lm_head.weight",), "vocab", "untied"),
)
_BY_MEGATRON = {row.megatron: row for row in ROWS}

# Transformer Engine fuses a norm into the linear layer that follows it and names the weight after that layer
TE_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
# its grouped GEMM numbers the weights of one module, where Megatron's own experts are modules with a weight each
_TE_EXPERT = re.compile(r"mlp\.experts\.(linear_fc[12])\.weight(\d+)")
LAYER_INDEX = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT_INDEX = re.compile(r"(?<=\.local_experts\.)\d+(?=\.)")
# buffers that old checkpoints hold and that follow from config.json
_COMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|model\.rotary_emb\.inv_freq")


def is_moe_layer(hf: PretrainedConfig, layer: int) -> bool:
    """Return whether a layer's MLP (from 0) is a mixture of experts. Source: transformers' Qwen3MoeDecoderLayer."""
    if not ARCHITECTURES[hf.model_type].is_moe:
        return False
    return layer not in hf.mlp_only_layers and (layer + 1) % hf.decoder_sparse_step == 0


def model_rows(hf: PretrainedConfig) -> Iterator[Row]:
    """Yield every row of one model in the order of its layers, filled in, experts numbered globally."""
    for layered, rows in groupby(ROWS, lambda row: "{layer}" in row.megatron):
        block = list(rows)
        for layer in range(hf.num_hidden_layers) if layered else (0,):
            for row in block:
                if _occurs(row, hf, layer):
                    yield from (row.fill(layer, e) for e in (range(hf.num_experts) if row.is_expert else ("",)))


def _occurs(row: Row, hf: PretrainedConfig, layer: int) -> bool:
    kind, is_moe = ARCHITECTURES[hf.model_type], is_moe_layer(hf, layer)
    features = {"qkv_bias": kind.qkv_bias, "qk_norm": kind.qk_norm, "dense": not is_moe, "moe": is_moe}
    return (features | {"everywhere": True, "untied": not hf.tie_word_embeddings})[row.where]


def expected_hf_names(hf: PretrainedConfig) -> set[str]:
    """Return the names of the tensors that a checkpoint of this model holds (no lm_head.weight when tied)."""
    return {name for row in model_rows(hf) for name in row.hf}


def check_names(found: Iterable[str], hf: PretrainedConfig, source: str) -> None:
    """Refuse a checkpoint with a tensor too few or too many; `source` names it in the message.

    Rotary frequencies of old checkpoints are ignored, and so is the lm_head.weight that some checkpoints of tied models
    hold: whoever reads the tensors must see that it equals the embedding.
    Raises: ConfigError naming the first unknown and missing tensors.
    """
    names, expected = set(found), expected_hf_names(hf)
    tied = {"lm_head.weight"} if hf.tie_word_embeddings else set()
    unknown = sorted(name for name in names - expected - tied if not _COMPUTED.fullmatch(name))
    missing = sorted(expected - names)
    faults = [
        f"{len(some)} {what}: {', '.join(some[:3])}{', ...' if len(some) > 3 else ''}"
        for what, some in (("unknown", unknown), ("missing", missing))
        if some
    ]
    if faults:
        raise ConfigError(
            f"{source}: the weights do not belong to a {hf.model_type} model of this config.json; tensors "
            + "; ".join(faults)
        )


def global_name(local_name: str, layer_offset: int) -> str:
    """Return a parameter's Megatron name, its layer counted over the model; `layer_offset`: layers before its chunk."""
    match = LAYER_INDEX.match(local_name)
    return f"decoder.layers.{int(match[1]) + layer_offset}.{match[2]}" if match else local_name


def find_row(name: str, tied: bool, expert_offset: int = 0) -> Row:
    """Return the row of a parameter of this rank, global indices filled in.

    name: a `global_name`. expert_offset: experts of a layer on earlier expert-parallel ranks. With tied embeddings the
    output layer of a later stage is the embedding's copy. Raises: KeyError naming the parameter.
    """
    match = LAYER_INDEX.match(name)
    layer = expert = ""
    if match:
        layer = match[1]
        rest = _TE_EXPERT.sub(r"mlp.experts.local_experts.\2.\1.weight", TE_NAMES.get(match[2], match[2]))
        if index := _EXPERT_INDEX.search(rest):
            expert = str(int(index[0]) + expert_offset)
        name = _DECODER + _EXPERT_INDEX.sub("{expert}", rest)
    if name == "output_layer.weight" and tied:
        name = "embedding.word_embeddings.weight"
    row = _BY_MEGATRON.get(name)
    if row is None:
        raise KeyError(f"no mapping row for the Megatron parameter {name!r}")
    return row.fill(layer, expert)


def split_of(row: Row, tp_rank: int, tp_size: int, ep_size: int) -> tuple[int, int]:
    """Return the (rank, size) by which the parameter of a row is split: experts that are dealt out over an
    expert-parallel group stay whole."""
    return (0, 1) if row.is_expert and ep_size > 1 else (tp_rank, tp_size)


def to_shard(
    row: Row, tensors: list[Tensor], hf: PretrainedConfig, tp_rank: int, tp_size: int, padded_vocab: int
) -> Tensor:
    """Return this rank's Megatron shard of full Hugging Face tensors. Padded vocabulary rows are 0.

    For experts `tp_rank` and `tp_size` are those of `split_of`.
    """
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
            # the flat rows are split, not the groups: with fewer groups than ranks Megatron cuts through a group and
            # gathers the projections before it attends
            groups = hf.num_key_value_heads
            merged = torch.cat([t.reshape(groups, -1, *t.shape[1:]) for t in tensors], dim=1)
            return merged.reshape(-1, *full.shape[1:]).chunk(tp_size, dim=0)[tp_rank]
        case "gate_up":
            return torch.cat([t.chunk(tp_size, dim=0)[tp_rank] for t in tensors])


def from_shards(row: Row, shards: list[Tensor], hf: PretrainedConfig) -> list[Tensor]:
    """Return a parameter's Hugging Face tensors from all its shards in rank order: the inverse of `to_shard`."""
    match row.kind:
        case "replicated":
            return [shards[0]]
        case "row":
            return [torch.cat(shards, dim=1)]
        case "vocab":
            whole = torch.cat(shards, dim=0) if len(shards) > 1 else shards[0]
            return [whole[: hf.vocab_size]]
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
    """Return the shapes of the Hugging Face tensors of a row whose Megatron shard has the shape `shard`."""
    shards = [torch.empty(shard, device="meta")] * tp_size
    return [tuple(tensor.shape) for tensor in from_shards(row, shards, hf)]


def load_weights(
    parameters: Iterable[tuple[str, Tensor]],
    source: Callable[[str], Tensor],
    hf: PretrainedConfig,
    *,
    tp_rank: int,
    tp_size: int,
    padded_vocab: int,
    ep_rank: int = 0,
    ep_size: int = 1,
) -> None:
    """Fill a rank's parameters from `source(hf_name)`. Raises: ConfigError naming a tensor whose shape does not fit."""
    expert_offset = ep_rank * experts_per_rank(hf, ep_size)
    for name, parameter in parameters:
        row = find_row(name, hf.tie_word_embeddings, expert_offset)
        rank, size = split_of(row, tp_rank, tp_size, ep_size)
        tensors, shapes = [source(n) for n in row.hf], full_shapes(row, parameter.shape, hf, size)
        # the full tensors, before any split: padding would fill a short embedding with zero rows and cut a long one
        for hf_name, tensor, expected in zip(row.hf, tensors, shapes, strict=True):
            if tuple(tensor.shape) != expected:
                raise ConfigError(
                    f"{hf_name} has shape {tuple(tensor.shape)}, expected {expected} for the Megatron parameter "
                    f"{name}; the weights do not belong to this config.json"
                )
        with torch.no_grad():
            parameter.copy_(to_shard(row, tensors, hf, rank, size, padded_vocab))


def experts_per_rank(hf: PretrainedConfig, ep_size: int) -> int:
    """Return the experts of one layer on each rank of an expert-parallel group; 0 in a dense model."""
    return hf.num_experts // ep_size if ARCHITECTURES[hf.model_type].is_moe else 0
