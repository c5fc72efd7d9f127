"""The fused output layer against the layer and the statistics apart, whose gradients autograd takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.parallel.fused_linear import float32_linear, linear_stats
from megatron_rl.parallel.vocab import VocabShard, vocab_parallel_stats
from tests.parallel.test_vocab import _Watch
from tests.worlds import Worlds

T, H, V, V_PADDED = 13, 10, 45, 64  # at TP 2 the second shard is partly padding


def _inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(T, H, generator=generator, dtype=torch.float64)
    weight = torch.randn(V_PADDED, H, generator=generator, dtype=torch.float64)
    weight[V:] *= 20  # would dominate every sum if padding counted
    labels = torch.randint(0, V, (T,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), labels, torch.randn(2, T, generator=generator)


def _both(dtype: torch.dtype) -> list[list[Tensor]]:
    """Values and gradients of hidden (summed over ranks) and weight, apart and fused, on this rank's shard."""
    hidden, weight, labels, upstream = _inputs(dtype)
    rank, size = dist.get_rank(), dist.get_world_size()
    shard = weight.chunk(size)[rank]
    place = VocabShard(dist.group.WORLD, rank * len(shard), V)
    options: dict[str, Any] = {"temperature": 0.7, "with_sum_p2": True}
    found = []
    for fused in (False, True):
        h, w = hidden.clone().requires_grad_(), shard.clone().requires_grad_()
        if fused:
            stats = linear_stats(h, w, labels, place, **options, chunk_tokens=4)
        else:
            place_keywords: dict[str, Any] = {"group": place.group, "vocab_start": place.start, "vocab_size": V}
            stats = vocab_parallel_stats(h @ w.t(), labels, **place_keywords, **options)
        (stats.logprobs * upstream[0] + stats.entropy * upstream[1]).sum().backward()
        assert h.grad is not None and w.grad is not None
        dist.all_reduce(h.grad)
        padding = max(0, min(len(shard), rank * len(shard) + len(shard) - V))
        assert not w.grad[len(shard) - padding :].any()
        values = [stats.logprobs, stats.entropy, stats.sum_p2, stats.sum_p2_logp]
        found.append([*(value.detach() for value in values if value is not None), h.grad, w.grad])
    return found


def _float32() -> list[list[Tensor]]:
    """As `_both`: exact products of the same bfloat16 numbers, then float32 logits whole and in chunks."""
    hidden, weight, labels, upstream = _inputs(torch.bfloat16)
    rank, size = dist.get_rank(), dist.get_world_size()
    shard = weight.chunk(size)[rank]
    place = VocabShard(dist.group.WORLD, rank * len(shard), V)
    keywords: dict[str, Any] = {"group": place.group, "vocab_start": place.start, "vocab_size": V}
    found = []
    for way in ("exact", "whole", "chunks"):
        dtype = torch.float32 if way == "exact" else torch.bfloat16
        h, w = (x.to(dtype, copy=True).requires_grad_() for x in (hidden, shard))
        if way == "chunks":
            stats = linear_stats(h, w, labels, place, chunk_tokens=4, float32_logits=True)
        else:
            stats = vocab_parallel_stats(float32_linear(h, w) if way == "whole" else h @ w.t(), labels, **keywords)
        (stats.logprobs * upstream[0] + stats.entropy * upstream[1]).sum().backward()
        assert h.grad is not None and w.grad is not None
        found.append([stats.logprobs.detach(), stats.entropy.detach(), h.grad, w.grad])
    return found


@pytest.mark.parametrize("size", [1, 2])
def test_float32_logits_round_only_their_gradient(worlds: Worlds, size: int) -> None:
    for exact, *ways in worlds.run(size, _float32):
        for values in ways:
            for want, got, tolerance in zip(exact, values, (2e-6, 2e-6, 1e-2, 1e-2), strict=True):
                torch.testing.assert_close(got.float(), want, rtol=0, atol=tolerance * float(want.abs().max()))
            assert [value.dtype for value in values] == [torch.float32] * 2 + [torch.bfloat16] * 2


def test_float32_logits_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_rl.kernels import linear_cpu
    from megatron_rl.parallel import fused_linear

    hidden, weight, _, _ = _inputs(torch.bfloat16)
    results = []
    for elements in (2**20, 4 * T):  # 5 rows of the weight; a row, or 4 columns, of the gradient
        monkeypatch.setattr(linear_cpu, "_CONVERTED", elements)
        monkeypatch.setattr(fused_linear, "_ROUNDED_ELEMENTS", elements)
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logits = float32_linear(h, w)
        logits.backward(torch.randn(T, V_PADDED, generator=torch.Generator().manual_seed(1)))
        results.append([logits.detach(), h.grad, w.grad])
    for one, many in zip(*results, strict=True):
        torch.testing.assert_close(many, one, rtol=1e-2, atol=1e-2 if many.dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("size", [1, 2])
def test_fused_equals_apart(worlds: Worlds, size: int) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 2e-2)):
        for apart, fused in worlds.run(size, _both, dtype):
            assert len(apart) == len(fused) == 6
            for want, got in zip(apart, fused, strict=True):
                assert got.dtype == want.dtype
                torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def _watched() -> tuple[list[str], int]:
    tokens, width, chunk = 64, 500, 4
    hidden, weight = torch.randn(tokens, 8, requires_grad=True), torch.randn(width, 8, requires_grad=True)
    shard = VocabShard(dist.group.WORLD, width * dist.get_rank(), 970)
    with _Watch(hidden) as watch:
        stats = linear_stats(hidden, weight, torch.arange(tokens), shard, chunk_tokens=chunk)
        (stats.logprobs.sum() + stats.entropy.sum()).backward()
    return watch.collectives, max(watch.allocated.values())


def test_one_collective_and_never_more_than_a_chunk_of_logits(worlds: Worlds) -> None:
    for collectives, largest in worlds.run(2, _watched):
        assert len(collectives) == 1 and "allgather" in collectives[0]
        assert largest <= 2 * 4 * 500  # the scratch of a chunk; the weight's gradient has 4,000 elements too


def test_no_tokens_and_inputs_that_cannot_work() -> None:
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.zeros(6, 4, requires_grad=True)
    labels = torch.empty(0, dtype=torch.int64)
    stats = linear_stats(hidden, weight, labels, VocabShard(None, 0, 6))
    stats.logprobs.sum().backward()
    assert weight.grad is not None and not weight.grad.any()
    with pytest.raises(ValueError, match=r"weight \(6, 4\).*one dtype"):
        linear_stats(hidden.double(), weight, labels, VocabShard(None, 0, 6))
    with pytest.raises(ValueError, match="chunk_tokens: got 0"):
        linear_stats(hidden, weight, labels, VocabShard(None, 0, 6), chunk_tokens=0)
