"""The mapping table: shards against hand-written layouts, and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from megatron_rl.errors import ConfigError
from megatron_rl.models.mapping import (
    ROWS,
    check_names,
    expected_hf_names,
    find_row,
    from_shards,
    full_shapes,
    global_name,
    load_weights,
    split_of,
    to_shard,
)

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
    rows = [row for row in ROWS if row.kind == kind and row.where != "moe"]
    assert rows
    for row in rows:
        name = global_name(row.megatron.replace("{layer}", "0"), 2)
        filled = find_row(name, tied=False)
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
    row = find_row("decoder.layers.0.self_attention.linear_qkv.bias", tied=False)
    first, second = (to_shard(row, full, HF, rank, 2, 0) for rank in (0, 1))
    assert first.tolist() == [100, 100, 101, 101, 200, 200, 300, 300, 102, 102, 103, 103, 201, 201, 301, 301]
    assert second.tolist() == [104, 104, 105, 105, 202, 202, 302, 302, 106, 106, 107, 107, 203, 203, 303, 303]


def test_with_fewer_key_heads_than_ranks_a_group_is_cut_through() -> None:
    """Megatron splits the merged rows evenly: 4 heads of 2 rows, 2 key heads, 4 ranks, so each has half a group."""
    hf = AutoConfig.for_model(**(HF.to_dict() | {"num_attention_heads": 4, "num_key_value_heads": 2}))
    full = [100.0 * which + torch.arange(heads).repeat_interleave(2) for which, heads in ((1, 4), (2, 2), (3, 2))]
    row = find_row("decoder.layers.0.self_attention.linear_qkv.bias", tied=False)
    shards = [to_shard(row, full, hf, rank, 4, 0) for rank in range(4)]
    assert [shard.tolist() for shard in shards] == [
        [100, 100, 101, 101],
        [200, 200, 300, 300],
        [102, 102, 103, 103],
        [201, 201, 301, 301],
    ]
    assert full_shapes(row, (4,), hf, 4) == [(8,), (4,), (4,)]
    for got, want in zip(from_shards(row, shards, hf), full, strict=True):
        assert torch.equal(got, want)


def test_gate_and_up_are_split_before_they_are_joined() -> None:
    gate, up = torch.arange(24.0)[:, None], 100 + torch.arange(24.0)[:, None]
    row = find_row("decoder.layers.0.mlp.linear_fc1.weight", tied=False)
    assert to_shard(row, [gate, up], HF, 1, 2, 0)[:, 0].tolist() == [*range(12, 24), *range(112, 124)]


def test_padded_vocabulary_rows_are_zero_and_do_not_come_back() -> None:
    row = find_row("embedding.word_embeddings.weight", tied=False)
    full = 1.0 + torch.arange(37.0)[:, None].expand(37, 3)
    shards = [to_shard(row, [full], HF, rank, 4, padded_vocab=64) for rank in range(4)]
    assert [shard.shape for shard in shards] == [(16, 3)] * 4
    assert shards[2][:, 0].tolist() == [33, 34, 35, 36, 37] + [0] * 11 and not shards[3].any()
    assert torch.equal(from_shards(row, shards, HF)[0], full)


def test_names_of_layers_stages_and_transformer_engine() -> None:
    assert find_row(global_name("decoder.layers.1.mlp.linear_fc2.weight", 4), tied=False).hf == (
        "model.layers.5.mlp.down_proj.weight",
    )
    fused = find_row("decoder.layers.1.self_attention.linear_qkv.layer_norm_weight", tied=False)
    assert fused.hf == ("model.layers.1.input_layernorm.weight",)
    fused = find_row("decoder.layers.1.mlp.linear_fc1.layer_norm_weight", tied=False)
    assert fused.hf == ("model.layers.1.post_attention_layernorm.weight",)
    assert find_row("output_layer.weight", tied=False).hf == ("lm_head.weight",)
    assert find_row("output_layer.weight", tied=True).hf == ("model.embed_tokens.weight",)
    with pytest.raises(KeyError, match="decoder.layers.{layer}.mlp.shared_experts.linear_fc1.weight"):
        find_row("decoder.layers.1.mlp.shared_experts.linear_fc1.weight", tied=False)


@pytest.mark.parametrize("name", ["local_experts.3.linear_fc1.weight", "linear_fc1.weight3"])
def test_experts_are_numbered_over_the_whole_layer(name: str) -> None:
    """Megatron's own experts and the grouped ones of Transformer Engine."""
    row = find_row(f"decoder.layers.5.mlp.experts.{name}", tied=False, expert_offset=8)
    assert row.hf == tuple(f"model.layers.5.mlp.experts.11.{part}_proj.weight" for part in ("gate", "up"))
    assert row.is_expert and split_of(row, 1, 2, ep_size=4) == (0, 1) and split_of(row, 1, 2, ep_size=1) == (1, 2)
    router = find_row("decoder.layers.5.mlp.router.weight", tied=False, expert_offset=8)
    assert router.hf == ("model.layers.5.mlp.gate.weight",) and not router.is_expert


def test_names_that_do_not_belong_are_refused_by_name() -> None:
    names = expected_hf_names(HF)
    check_names(names | {"model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"}, HF, "here")
    others = names - {"model.layers.2.mlp.up_proj.weight"} | {"model.layers.0.mlp.experts.0.down_proj.weight"}
    with pytest.raises(ConfigError, match=r"here: .* 1 unknown: .*\.experts.0.down_proj.weight; 1 missing: .*up_proj"):
        check_names(others, HF, "here")
    gone = {name for name in names if ".layers.2." in name}
    with pytest.raises(ConfigError, match="11 missing: model.layers.2.input_layernorm.weight, .*, .*, ...$"):
        check_names(names - gone, HF, "here")
    tied = AutoConfig.for_model(**(HF.to_dict() | {"tie_word_embeddings": True}))
    assert names - expected_hf_names(tied) == {"lm_head.weight"}
    check_names(names, tied, "here")  # Qwen3-0.6B is tied and stores both


def test_a_misfit_is_refused_with_both_shapes_and_changes_nothing() -> None:
    """12 + 12 + 8 rows would fill a shard of 16 + 8 + 8 without a word, and 36 tokens would leave a row of zeros."""
    parameter = torch.ones(32, 16)
    tensors = {"q": torch.zeros(12, 16), "k": torch.zeros(12, 16), "v": torch.zeros(8, 16)}
    options = {"tp_rank": 0, "tp_size": 1, "padded_vocab": 40}
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
