"""A model's layers without Transformer Engine: Megatron's own, with torch's RMSNorm and torch's causal attention over
packed sequences.

The rotary embedding is applied here as well, from one table for all layers: Megatron's own walks the sequences one by
one, in every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from megatron_rl import device
from megatron_rl.parallel.context import gather_tokens, local_tokens
from megatron_rl.policy.replay import RoutedSequences
from megatron_rl.types import Inputs

vars(moe_utils).setdefault("te_general_gemm", None)  # 0.16.1 reads a name that is bound only where TE imports
_PACKS_KEPT = 8  # attention masks of long sequences would fill the memory


@dataclass
class PackedSequences(RoutedSequences):
    """A micro-batch's inputs as PackedAttention takes them: what all layers share is computed once."""

    cos: Tensor | None = None  # [T, 1, d] float32, of the rotary angles of this rank's tokens, twice
    sin: Tensor | None = None  # likewise, the first time negative
    prefixes: Tensor | None = None  # see Inputs
    rows: _Rows | None = None  # made by the first layer, which knows how many heads this rank has


def packed_sequences(
    inputs: Inputs, inv_freq: Tensor, context_size: int, routes: Tensor | None = None
) -> PackedSequences:
    """`inv_freq`: `[d/2]`, the inverse frequencies of the rotary embedding; `routes`: see RoutedSequences."""
    cu_seqlens = inputs.cu_seqlens * context_size
    angles = torch.outer(inputs.position_ids.to(inv_freq.dtype), inv_freq)[:, None]
    cos, sin = angles.cos(), angles.sin()
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=inputs.longest,
        routes=routes,
        cos=torch.cat([cos, cos], dim=-1),
        sin=torch.cat([-sin, sin], dim=-1),
        prefixes=inputs.prefixes,
    )


class RememberedPacks:
    """The sequences of micro-batches, prepared for attention once: a micro-batch goes through the model at least twice,
    for its log-probabilities and for its update. Each is kept as long as its tokens live."""

    def __init__(self, inv_freq: Tensor) -> None:
        """`inv_freq`: `[d/2]`, the inverse frequencies of the rotary embedding."""
        self._inv_freq = inv_freq
        self._known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def of(self, inputs: Inputs, context_size: int, routes: Tensor | None) -> PackedSequences:
        """Return what `packed_sequences` makes of the inputs."""
        known = self._known.get(inputs.token_ids) if routes is None else None
        if known is not None:
            return known
        packed = packed_sequences(inputs, self._inv_freq, context_size, routes)
        if routes is None and len(self._known) < _PACKS_KEPT:
            self._known[inputs.token_ids] = packed
        return packed


class PackedAttention(MegatronModule):
    """Rotary embedding, then causal self-attention inside each packed sequence, grouped queries included.

    On a GPU in bfloat16 torch's flash attention takes the tokens as they are packed. Elsewhere, and for sequences with
    a prefix and under context parallelism, SDPA takes them padded to `[sequences, longest]`, so that the cost is
    sequences * longest^2 rather than T^2. The queries of a sequence with a prefix meet the prefix's keys before its
    own. Under context parallelism a rank's queries meet the keys and values of all ranks, gathered in one collective a
    layer.
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
        """This rank's query `[T, heads, d]`, key and value `[T, groups, d]`, before rotation -> `[T, 1, heads * d]`.

        Raises: ValueError when not packed.
        """
        packed = packed_seq_params
        if not isinstance(packed, PackedSequences):
            raise ValueError("PackedAttention takes packed (thd) sequences only; pass `packed_sequences`")
        tokens = query.shape[0]
        query, key = (_Rotate.apply(x, packed.cos, packed.sin) for x in (query, key))
        flash = device.flash_attention(query.dtype)
        if flash is not None and packed.prefixes is None and self.context.size() == 1:
            return self._flash(flash, query, key, value, packed).view(tokens, 1, -1)
        if self.context.size() > 1:
            key, value = gather_tokens(torch.stack([key, value], dim=1), packed.cu_seqlens_q, self.context).unbind(1)
        if packed.rows is None:
            packed.rows = _rows(packed, query, key, self.context.rank(), self.context.size())
        query, key, value = (x.reshape(-1, x.shape[-1]) for x in (query, key, value))
        outs = []
        for block in packed.rows.blocks:
            q, k, v = (
                x.index_select(0, rows.flatten()).view(*rows.shape, -1)
                for x, rows in ((query, block.queries), (key, block.keys), (value, block.keys))
            )
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, block.mask, is_causal=block.mask is None, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
            )
            outs.append(out.reshape(-1, out.shape[-1]))
        out = torch.cat(outs) if len(outs) > 1 else outs[0]
        return out.index_select(0, packed.rows.outputs).view(tokens, 1, -1)

    def _flash(
        self, flash: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences
    ) -> Tensor:
        """`[T, heads, d]`, of rotated queries and keys."""
        bounds, longest = packed.cu_seqlens_q, packed.max_seqlen_q
        options: dict[str, Any] = {"scale": self.scale, "window_size": (-1, 0), "enable_gqa": True}
        return flash(query, key, value, bounds, bounds, longest, longest, **options)


@dataclass(frozen=True, slots=True)
class _Block:
    """Sequences that one SDPA call computes, padded to the longest. Rows are those of [T * heads, d] and of
    [T * groups, d]: head h of token t is row t * heads + h."""

    queries: Tensor  # [S, heads, longest] int64
    keys: Tensor  # [S, groups, longest key] int64
    mask: Tensor | None  # [S, 1, longest, longest key], 0 or -inf; None: causal


@dataclass(frozen=True, slots=True)
class _Rows:
    """All blocks of a micro-batch, and the way back from their flattened outputs."""

    blocks: list[_Block]
    outputs: Tensor  # [T * heads] int64


def _rows(packed: PackedSequences, query: Tensor, key: Tensor, rank: int, size: int) -> _Rows:
    heads, groups = query.shape[1], key.shape[1]
    blocks, outputs, rows = [], torch.empty(query.shape[:2], dtype=torch.int64, device=query.device), 0
    for queries, real, keys, seen in _tokens(packed, rank, size):
        places = torch.arange(rows, rows + queries.numel() * heads, device=query.device).view(len(queries), heads, -1)
        outputs[queries[real]] = places.transpose(1, 2)[real]
        rows += places.numel()
        mask = None if seen is None else query.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)[:, None]
        blocks.append(_Block(_by_head(queries, heads), _by_head(keys, groups), mask))
    return _Rows(blocks, outputs.flatten())


def _tokens(packed: PackedSequences, rank: int, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Return for each block: tokens that ask `[S, longest]`, which of them are real, tokens that they meet `[S, longest
    key]`, and which of those each sees; None: those before it, which keeps the padding out of every real query's sight.

    `rank`, `size`: in the context-parallel group."""
    cu_seqlens, prefixes = packed.cu_seqlens_q.long(), packed.prefixes
    starts, lengths = cu_seqlens[:-1] // size, cu_seqlens.diff() // size
    if size > 1:
        queries, real = _padded(starts, lengths)
        keys, _ = _padded(starts * size, lengths * size)
        positions = local_tokens(packed.cu_seqlens_q, rank, size)[queries] - cu_seqlens[:-1, None]
        yield queries, real, keys, torch.arange(keys.shape[1], device=keys.device) <= positions[..., None]
        return
    has_prefix = torch.zeros_like(starts, dtype=torch.bool) if prefixes is None else prefixes >= 0
    queries, real = _padded(starts[~has_prefix], lengths[~has_prefix])
    yield queries, real, queries, None
    if prefixes is not None:
        queries, real = _padded(starts[has_prefix], lengths[has_prefix])
        before = prefixes[has_prefix]
        prefix, of_prefix = _padded(starts[before], lengths[before])
        longest = queries.shape[1]
        own = torch.ones(longest, longest, dtype=torch.bool, device=queries.device).tril()
        seen = torch.cat([of_prefix[:, None].expand(-1, longest, -1), own.expand(len(queries), -1, -1)], dim=-1)
        yield queries, real, torch.cat([prefix, queries], dim=1), seen


def _padded(starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Packed tokens `[S, longest]` (padding points at the sequence's first) and which are real."""
    offsets = torch.arange(int(lengths.max()), device=starts.device)
    real = offsets[None] < lengths[:, None]
    return torch.where(real, starts[:, None] + offsets[None], starts[:, None]), real


def _by_head(tokens: Tensor, heads: int) -> Tensor:
    """`[S, longest]` tokens -> `[S, heads, longest]` rows."""
    return tokens[:, None] * heads + torch.arange(heads, device=tokens.device)[:, None]


class _Rotate(torch.autograd.Function):
    """The rotary embedding of x `[T, heads, d]`, whose dimension i is paired with i + d/2; cos, sin `[T, 1, d]`, see
    PackedSequences."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # two rounded products and a sum, no fused multiply-add: bit for bit what transformers computes
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.mul(x, cos).add_(x.roll(x.shape[-1] // 2, -1).mul_(sin))


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm whose weight asks Megatron to sum its gradient over the sequence-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        """The signature that Megatron's layer specs call."""
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """`[..., H]`, whose type may be float32 beside a bfloat16 weight."""
        return torch.nn.functional.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def block_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """A pipeline stage's layers (of its chunk `vp_stage`): Megatron's local ones with the two modules above."""
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage)
    block.layer_norm = RMSNorm
    for layer in block.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = PackedAttention
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    return block
