"""Floating-point operations of a model, by arithmetic on its Hugging Face config."""

from __future__ import annotations

from typing import Any

from megatron_rl.config_checks import head_width, is_moe, num_experts


def forward_flops(hf: dict[str, Any], tokens: float, attention_pairs: float) -> float:
    """Of one forward pass of the whole model over `tokens`; a backward pass costs twice as much.

    A multiply-add counts 2. Weight matrices that a token meets (of a mixture its top-k experts and the router; the
    output layer, not the embedding's look-up) cost 2 a parameter; `attention_pairs`, of a token and one that it attends
    to, cost 4 * heads * head_dim a layer. Activation recomputation does not count.
    `hf`: contents of a config.json with its vocab_size.
    Source: arXiv 2204.02311, appendix B (model FLOPs utilisation), with causal attention counted as what it computes.
    """
    hidden, layers, heads = hf["hidden_size"], hf["num_hidden_layers"], hf["num_attention_heads"]
    width = head_width(hf)
    groups = hf.get("num_key_value_heads") or heads
    attention = hidden * (heads + 2 * groups) * width + heads * width * hidden
    mlps = layers * 3 * hidden * hf["intermediate_size"]
    if is_moe(hf):
        skipped, sparse_step = hf.get("mlp_only_layers") or [], hf.get("decoder_sparse_step", 1)
        sparse = sum(layer not in skipped and (layer + 1) % sparse_step == 0 for layer in range(layers))
        experts = 3 * hidden * hf["moe_intermediate_size"] * hf["num_experts_per_tok"] + hidden * (num_experts(hf) or 0)
        mlps += sparse * (experts - 3 * hidden * hf["intermediate_size"])
    matrices = layers * attention + mlps + hf["vocab_size"] * hidden
    return 2.0 * matrices * tokens + 4.0 * layers * heads * width * attention_pairs
