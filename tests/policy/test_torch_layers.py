"""Packed attention with rotary embedding and shared prefixes against dense attention of every whole sample."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

HEADS, GROUPS, WIDTH = 4, 2, 6
INV_FREQ = torch.tensor([1.0, 0.3, 0.05])
# two samples behind one prefix of three tokens, one alone, padding
LENGTHS, PREFIXES = [3, 2, 4, 5, 2], torch.tensor([-1, 0, 0, -1, -1])
POSITIONS = torch.tensor([0, 1, 2, 3, 4, 3, 4, 5, 6, 0, 1, 2, 3, 4, 0, 1])


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Of whole samples, one by one: `[T, heads, d]`, by the textbook."""
    angles = torch.outer(torch.arange(len(query)).float(), INV_FREQ).repeat(1, 2)[:, None]
    query, key = (
        x * angles.cos() + torch.cat([-x[..., WIDTH // 2 :], x[..., : WIDTH // 2]], -1) * angles.sin()
        for x in (query, key)
    )
    return causal(query, key, value)


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of one sequence, grouped queries included."""
    key, value = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / WIDTH**0.5
    future = torch.ones(len(query), len(query), dtype=torch.bool).triu(1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), value)


def packed_attention() -> Any:
    """The module without a Megatron config, on one context-parallel rank."""
    from megatron_rl.policy.torch_layers import PackedAttention

    attention = PackedAttention.__new__(PackedAttention)
    torch.nn.Module.__init__(attention)
    attention.scale, attention.context = None, SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    return attention


def test_prefixes_are_seen_and_get_their_gradients() -> None:
    from megatron_rl.policy.torch_layers import packed_sequences
    from megatron_rl.types import Inputs

    bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
    real = torch.arange(int(bounds[-1])) < bounds[-2]
    inputs = Inputs(torch.zeros_like(POSITIONS), POSITIONS, bounds.int(), real, int(bounds.diff().max()), PREFIXES)
    draw = torch.Generator().manual_seed(0)
    qkv = [torch.randn(len(POSITIONS), n, WIDTH, generator=draw).requires_grad_() for n in (HEADS, GROUPS, GROUPS)]
    weight = torch.randn(len(POSITIONS), HEADS, WIDTH, generator=draw)

    out = packed_attention()(*qkv, packed_seq_params=packed_sequences(inputs, INV_FREQ, 1))
    out = out.view(len(POSITIONS), HEADS, WIDTH)
    got = torch.autograd.grad((out * weight)[real].sum(), qkv)

    samples = [[0, 1, 2, 3, 4], [0, 1, 2, 5, 6, 7, 8], [9, 10, 11, 12, 13]]
    parts = [dense(*(x[rows] for x in qkv)) for rows in samples]
    expected = torch.cat([parts[0], parts[1][3:], parts[2]])
    torch.testing.assert_close(out[real], expected)
    want = torch.autograd.grad((expected * weight[real]).sum(), qkv)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_flash_attention_gets_the_packed_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's kernel does not run here: the textbook stands for it, and takes what it would be told."""
    from megatron_rl import device
    from megatron_rl.policy.torch_layers import packed_sequences
    from megatron_rl.types import Inputs

    lengths = torch.tensor([5, 1, 7, 3])
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    positions = torch.cat([torch.arange(int(n)) for n in lengths])
    inputs = Inputs(torch.zeros_like(positions), positions, bounds, positions >= 0, int(lengths.max()))
    draw = torch.Generator().manual_seed(0)
    qkv = [torch.randn(len(positions), n, WIDTH, generator=draw).requires_grad_() for n in (HEADS, GROUPS, GROUPS)]
    calls = []

    def flash(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **options: Any):
        calls.append((cu_q.tolist(), cu_k.tolist(), max_q, max_k, options))
        parts = [x.split(cu_q.diff().tolist()) for x in (q, k, v)]
        return torch.cat([causal(*part) for part in zip(*parts, strict=True)])

    outs, grads = [], []
    for chosen in (None, flash):
        monkeypatch.setattr(device, "flash_attention", lambda dtype, chosen=chosen: chosen)
        out = packed_attention()(*qkv, packed_seq_params=packed_sequences(inputs, INV_FREQ, 1))
        outs.append(out)
        grads.append(torch.autograd.grad(out.sin().sum(), qkv))
    told = {"scale": None, "window_size": (-1, 0), "enable_gqa": True}
    assert calls == [(bounds.tolist(), bounds.tolist(), 7, 7, told)]
    assert outs[0].shape == outs[1].shape
    torch.testing.assert_close(outs[1], outs[0])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
