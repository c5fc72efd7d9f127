"""What Transformer Engine would provide, in torch: a sequence-parallel RMSNorm and a packed-sequence core attention.

Megatron-Core's local spec has neither: its torch norm refuses sequence parallelism, its DotProductAttention refuses
packed sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_rl import device
from megatron_rl.parallel.context import gather_tokens, local_tokens


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm whose weight asks Megatron to sum its gradient over the sequence-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        """The signature that Megatron's layer specs call."""
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class PackedAttention(MegatronModule):
    """Causal self-attention inside each packed sequence, grouped queries included, through torch's SDPA.

    The packed tokens are padded to `[sequences, longest]`, so the cost is sequences * longest^2 rather than T^2. Under
    context parallelism a rank's queries meet the keys and values of all ranks, gathered in one collective a layer.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, attn_mask_type: Any, attention_type: str, **options: Any
    ) -> None:
        """The signature that Megatron's layer specs call."""
        super().__init__(config)
        self.scale = options.get("softmax_scale")
        self.context = options["pg_collection"].cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """This rank's query `[T, heads, d]`, key and value `[T, groups, d]` -> `[T, 1, heads * d]`.

        Raises: ValueError when not packed.
        """
        if packed_seq_params is None or packed_seq_params.qkv_format != "thd":
            raise ValueError("PackedAttention takes packed (thd) sequences only; pass packed_seq_params")
        cu_seqlens, longest = packed_seq_params.cu_seqlens_q, int(packed_seq_params.max_seqlen_q)
        index, valid = _padded_index(cu_seqlens, longest)
        queries, visible, seen = index, valid, None
        if (size := self.context.size()) > 1:
            key, value = gather_tokens(torch.stack([key, value], dim=1), cu_seqlens, self.context).unbind(1)
            queries, visible = _padded_index(cu_seqlens // size, longest // size)
            positions = local_tokens(cu_seqlens, self.context.rank(), size)[queries] - cu_seqlens[:-1, None]
            seen = (torch.arange(longest, device=query.device) <= positions[..., None])[:, None]
        # [S, longest, n, d] -> [S, n, longest, d]; causal masking keeps the padded keys out of every real query's sight
        q, k, v = (x[rows].transpose(1, 2) for x, rows in ((query, queries), (key, index), (value, index)))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, seen, is_causal=seen is None, scale=self.scale, enable_gqa=query.shape[1] != key.shape[1]
        )
        return out.transpose(1, 2)[visible].reshape(query.shape[0], 1, -1)


def _padded_index(cu_seqlens: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Rows `[S, longest]` into the packed tokens (padding points at the sequence's first token) and which are real."""
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    offsets = torch.arange(longest, device=cu_seqlens.device)
    valid = offsets[None] < lengths[:, None]
    return torch.where(valid, starts[:, None] + offsets[None], starts[:, None]), valid


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
