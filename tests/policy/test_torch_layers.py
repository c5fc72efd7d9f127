"""Packed attention with rotary embedding and shared prefixes against dense attention of every whole sample."""

from __future__ import annotations

from types import SimpleNamespace

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
    key, value = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / WIDTH**0.5
    future = torch.ones(len(query), len(query), dtype=torch.bool).triu(1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), value)


def test_prefixes_are_seen_and_get_their_gradients() -> None:
    from megatron_rl.policy.torch_layers import PackedAttention, packed_sequences
    from megatron_rl.types import Inputs

    bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
    real = torch.arange(int(bounds[-1])) < bounds[-2]
    inputs = Inputs(torch.zeros_like(POSITIONS), POSITIONS, bounds.int(), real, PREFIXES)
    draw = torch.Generator().manual_seed(0)
    qkv = [torch.randn(len(POSITIONS), n, WIDTH, generator=draw).requires_grad_() for n in (HEADS, GROUPS, GROUPS)]
    weight = torch.randn(len(POSITIONS), HEADS, WIDTH, generator=draw)

    attention = PackedAttention.__new__(PackedAttention)
    torch.nn.Module.__init__(attention)
    attention.scale, attention.context = None, SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    out = attention(*qkv, packed_seq_params=packed_sequences(inputs, INV_FREQ, 1))
    out = out.view(len(POSITIONS), HEADS, WIDTH)
    got = torch.autograd.grad((out * weight)[real].sum(), qkv)

    samples = [[0, 1, 2, 3, 4], [0, 1, 2, 5, 6, 7, 8], [9, 10, 11, 12, 13]]
    parts = [dense(*(x[rows] for x in qkv)) for rows in samples]
    expected = torch.cat([parts[0], parts[1][3:], parts[2]])
    torch.testing.assert_close(out[real], expected)
    want = torch.autograd.grad((expected * weight[real]).sum(), qkv)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
