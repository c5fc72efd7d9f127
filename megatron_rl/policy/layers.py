"""What Transformer Engine would provide, in torch: a sequence-parallel RMSNorm, and the packed-sequence core attention
of attention.py.

Megatron-Core's local spec has neither: its torch norm refuses sequence parallelism, its DotProductAttention refuses
packed sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rl import device
from megatron_rl.policy.attention import PackedAttention


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm whose weight asks Megatron to sum its gradient over the sequence-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        """The signature that Megatron's layer specs call."""
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def block_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """A pipeline stage's layers (of its chunk `vp_stage`): Transformer Engine's on CUDA, Megatron's local ones with the
    two modules above on a CPU."""
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=device.ON_GPU, normalization="RMSNorm", vp_stage=vp_stage
    )
    if device.ON_GPU:
        return block
    block.layer_norm = RMSNorm
    for layer in block.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = PackedAttention
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    return block
