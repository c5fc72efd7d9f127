"""The mapping table: shards against hand-written layouts, and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from megatron_rl.config_checks import ConfigError
from megatron_rl.convert.mapping import ROWS, find_row, from_shards, full_shapes, load_weights, to_shard

HF = AutoConfig.for_model(
    "qwen3",
    vocab_size=37,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=2,
    tie_word_embeddings=False,
)

QKV_ROWS = (("q", 16), ("k", 8), ("v", 8))


def _full_tensors(hf: PretrainedConfig) -> dict[str, Tensor]:
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(hf).named_parameters()}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def _padded(vocab: int, tp: int) -> int:
    return -(-vocab // (tp * 8)) * tp * 8  # 40, 48 and 64 rows: at tp=4 the last shard is padding in part


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("kind", ["replicated", "row", "vocab", "qkv", "gate_up"])
def test_from_shards_inverts_to_shard(kind: str, tp: int) -> None:
    tensors = _full_tensors(HF) | {f"model.layers.2.self_attn.{c}_proj.bias": torch.randn(n) for c, n in QKV_ROWS}
    rows = [row for row in ROWS if row.kind == kind]
    assert rows
    for row in rows:
        local = row.megatron.replace("{layer}", "0")
        filled = find_row(local, layer_offset=2, tied=False)
        full = [tensors[name] for name in filled.hf]
        padded = _padded(HF.vocab_size, tp)
        shards = [to_shard(filled, full, HF, rank, tp, padded) for rank in range(tp)]
        for shard in shards:
            assert full_shapes(filled, shard.shape, HF, tp) == [tuple(t.shape) for t in full]
            if kind != "replicated":
                assert shard.numel() * tp >= sum(t.numel() for t in full)
        for got, want in zip(from_shards(filled, shards, HF), full, strict=True):
            assert torch.equal(got, want), filled


def test_qkv_rows_are_grouped_by_key_head_and_split_by_group() -> None:
    """Megatron's order: for each key head its query heads, the key, the value. The numbers are 100, 200, 300 for q, k,
    v plus the head; 8 heads of 2 rows, 4 key heads, two to a rank."""
    full = [100.0 * which + torch.arange(heads).repeat_interleave(2) for which, heads in ((1, 8), (2, 4), (3, 4))]
    row = find_row("decoder.layers.0.self_attention.linear_qkv.bias", 0, tied=False)
    first, second = (to_shard(row, full, HF, rank, 2, 0) for rank in (0, 1))
    assert first.tolist() == [100, 100, 101, 101, 200, 200, 300, 300, 102, 102, 103, 103, 201, 201, 301, 301]
    assert second.tolist() == [104, 104, 105, 105, 202, 202, 302, 302, 106, 106, 107, 107, 203, 203, 303, 303]


def test_gate_and_up_are_split_before_they_are_joined() -> None:
    gate, up = torch.arange(24.0)[:, None], 100 + torch.arange(24.0)[:, None]
    row = find_row("decoder.layers.0.mlp.linear_fc1.weight", 0, tied=False)
    assert to_shard(row, [gate, up], HF, 1, 2, 0)[:, 0].tolist() == [*range(12, 24), *range(112, 124)]


def test_padded_vocabulary_rows_are_zero_and_do_not_come_back() -> None:
    row = find_row("embedding.word_embeddings.weight", 0, tied=False)
    full = 1.0 + torch.arange(37.0)[:, None].expand(37, 3)
    shards = [to_shard(row, [full], HF, rank, 4, padded_vocab=64) for rank in range(4)]
    assert [shard.shape for shard in shards] == [(16, 3)] * 4
    assert shards[2][:, 0].tolist() == [33, 34, 35, 36, 37] + [0] * 11 and not shards[3].any()
    assert torch.equal(from_shards(row, shards, HF)[0], full)


def test_names_of_layers_stages_and_transformer_engine() -> None:
    assert find_row("decoder.layers.1.mlp.linear_fc2.weight", 4, tied=False).hf == (
        "model.layers.5.mlp.down_proj.weight",
    )
    fused = find_row("decoder.layers.1.self_attention.linear_qkv.layer_norm_weight", 0, tied=False)
    assert fused.hf == ("model.layers.1.input_layernorm.weight",)
    fused = find_row("decoder.layers.1.mlp.linear_fc1.layer_norm_weight", 0, tied=False)
    assert fused.hf == ("model.layers.1.post_attention_layernorm.weight",)
    assert find_row("output_layer.weight", 0, tied=False).hf == ("lm_head.weight",)
    assert find_row("output_layer.weight", 0, tied=True).hf == ("model.embed_tokens.weight",)
    with pytest.raises(KeyError, match="decoder.layers.{layer}.mlp.router.weight"):
        find_row("decoder.layers.1.mlp.router.weight", 0, tied=False)


@pytest.mark.parametrize(
    ("model_type", "tied"), [("qwen2", True), ("qwen2", False), ("qwen3", True), ("llama", False), ("llama", True)]
)
def test_the_table_covers_every_tensor_of_the_architectures(model_type: str, tied: bool) -> None:
    """Against the parameter list of transformers' own classes."""
    hf = AutoConfig.for_model(**(HF.to_dict() | {"model_type": model_type, "tie_word_embeddings": tied}))
    known = {
        name.replace("{layer}", str(layer)) for row in ROWS for name in row.hf for layer in range(hf.num_hidden_layers)
    }
    assert set(_full_tensors(hf)) <= known


def test_a_misfit_is_refused_with_both_shapes_and_changes_nothing() -> None:
    """12 + 12 + 8 rows would fill a shard of 16 + 8 + 8 without a word, and 36 tokens would leave a row of zeros."""
    parameter = torch.ones(32, 16)
    tensors = {"q": torch.zeros(12, 16), "k": torch.zeros(12, 16), "v": torch.zeros(8, 16)}
    options = {"layer_offset": 0, "tp_rank": 0, "tp_size": 1, "padded_vocab": 40}
    with pytest.raises(ConfigError, match=r"q_proj.weight has shape \(12, 16\), expected \(16, 16\)"):
        load_weights(
            [("decoder.layers.0.self_attention.linear_qkv.weight", parameter)],
            lambda name: tensors[name.split(".")[-2][0]],
            HF,
            **options,
        )
    assert (parameter == 1).all()
    with pytest.raises(ConfigError, match=r"embed_tokens.weight has shape \(36, 16\), expected \(37, 16\)"):
        load_weights(
            [("embedding.word_embeddings.weight", torch.ones(40, 16))], lambda _: torch.ones(36, 16), HF, **options
        )
