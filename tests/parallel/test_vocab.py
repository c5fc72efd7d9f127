"""The reference everywhere is a dense float64 softmax with autograd, on the unsharded logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_rl.parallel.vocab import vocab_parallel_stats
from tests import shape_checks
from tests.worlds import Worlds

T, V, V_PADDED = 11, 45, 64  # at TP 4 the third shard of 16 is partly padding and the last one wholly
# dtype, temperature, standard deviation of the logits, size of the offset of each row
CASES = [
    (torch.float32, 1.0, 1.0, 0.0),
    (torch.float32, 0.6, 30.0, 150.0),
    (torch.float32, 2.0, 30.0, 150.0),
    (torch.bfloat16, 1.0, 3.0, 0.0),
    (torch.bfloat16, 0.6, 3.0, 150.0),
    (torch.float16, 2.0, 3.0, 20.0),
    (torch.float64, 0.6, 3.0, 150.0),
]


def _inputs(case: tuple[torch.dtype, float, float, float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits `[T, V_PADDED]`, labels and the gradients of logprobs and entropy; some real logits are -inf."""
    dtype, _, scale, offset = case
    generator = torch.Generator().manual_seed(3)
    logits = scale * torch.randn(T, V_PADDED, generator=generator, dtype=torch.float64)
    logits += offset * torch.tensor([1.0, -1.0] * T)[:T, None]
    labels = torch.randint(0, V, (T,), generator=generator)
    labels[:4] = torch.tensor([0, V - 1, 16, 31])  # the shards' edges
    logits[1, 5:20] = -math.inf
    logits[2, :16] = -math.inf  # the whole first shard at TP 4
    logits[3, 40:V] = -math.inf
    logits[:, V:] = 400.0  # would dominate every sum if padding counted
    upstream = torch.randn(2, T, generator=generator, dtype=torch.float64)
    return logits.to(dtype), labels, upstream[0], upstream[1]


def _dense(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    log_p = torch.log_softmax(logits.double() / temperature, dim=1)
    p, finite_log_p = log_p.exp(), log_p.masked_fill(log_p == -math.inf, 0.0)
    logprobs = log_p.gather(1, labels[:, None])[:, 0]
    return logprobs, -(p * finite_log_p).sum(1), (p * p).sum(1), (p * p * finite_log_p).sum(1)


def _on_shard(case: tuple[torch.dtype, float, float, float], widths: tuple[int, ...]) -> dict[str, Any]:
    logits, labels, grad_logprobs, grad_entropy = _inputs(case)
    start = sum(widths[: dist.get_rank()])
    shard = logits[:, start : start + widths[dist.get_rank()]].clone()
    x = shard.requires_grad_() * 1
    options = {"vocab_start": start, "vocab_size": V, "temperature": case[1], "block_rows": 4, "with_sum_p2": True}
    stats = vocab_parallel_stats(x, labels, group=dist.group.WORLD, **options)
    values = [stats.logprobs, stats.entropy, stats.sum_p2, stats.sum_p2_logp]
    loss = (stats.logprobs * grad_logprobs).sum() + (stats.entropy * grad_entropy).sum()
    (grad,) = torch.autograd.grad(loss, x)
    return {"values": [v.detach() for v in values], "grad": grad, "in_place": grad.data_ptr() == x.data_ptr()}


@pytest.mark.parametrize("widths", [(64,), (32, 32), (16, 16, 16, 16), (45, 0)], ids=str)
def test_values_and_gradients_equal_a_dense_softmax(worlds: Worlds, widths: tuple[int, ...]) -> None:
    for case in CASES:
        print(case)  # shown when it fails
        logits, labels, grad_logprobs, grad_entropy = _inputs(case)
        logits = logits[:, : sum(widths)].double().requires_grad_()
        expected = _dense(logits[:, :V], labels, case[1])
        ((expected[0] * grad_logprobs).sum() + (expected[1] * grad_entropy).sum()).backward()
        ranks = worlds.run(len(widths), _on_shard, case, widths)
        exact = case[0] == torch.float64
        tolerance = {"rtol": 1e-12, "atol": 1e-12} if exact else {"rtol": 2e-6, "atol": 2e-6}
        for rank in ranks:
            for got, want in zip(rank["values"], expected, strict=True):
                assert got.dtype == (torch.float64 if exact else torch.float32)
                torch.testing.assert_close(got.double(), want.detach(), **tolerance)
            assert rank["in_place"] or rank["grad"].numel() == 0
        grad = torch.cat([rank["grad"] for rank in ranks], 1)
        assert grad.dtype == case[0] and torch.equal(grad[:, V:], torch.zeros_like(grad[:, V:]))
        rounding = torch.finfo(case[0]).eps / 2  # the gradient is computed in float32 and rounded once
        torch.testing.assert_close(
            grad.double(), logits.grad, rtol=tolerance["rtol"] + rounding, atol=tolerance["atol"]
        )


def test_hand_computed() -> None:
    logits = torch.tensor([[0.0, 2 * math.log(3.0), 50.0]])  # at temperature 2: 1/4, 3/4 and a padding column
    options = {"vocab_start": 0, "vocab_size": 2, "temperature": 2.0, "with_sum_p2": True}
    stats = vocab_parallel_stats(logits, torch.tensor([1]), group=None, **options)
    quarter, three = 0.25 * math.log(0.25), 0.75 * math.log(0.75)
    assert stats.logprobs.item() == pytest.approx(math.log(0.75), abs=1e-6)
    assert stats.entropy.item() == pytest.approx(-quarter - three, abs=1e-6)
    assert stats.sum_p2 is not None and stats.sum_p2.item() == pytest.approx(0.625, abs=1e-6)
    assert stats.sum_p2_logp is not None
    assert stats.sum_p2_logp.item() == pytest.approx(0.25 * quarter + 0.75 * three, abs=1e-6)
    outside = vocab_parallel_stats(logits, torch.tensor([2]), group=None, vocab_start=0, vocab_size=2)
    assert outside.logprobs.item() == -math.inf and outside.sum_p2 is None


class _Replay(torch.autograd.Function):
    """gradcheck runs backward many times on one graph; this rebuilds the graph and its copy of the logits each time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, labels)
        ctx.temperature = temperature
        return _Replay.stats(x, labels, temperature)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, labels = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            outputs = _Replay.stats(x, labels, ctx.temperature)
            return *torch.autograd.grad(outputs, x, grads), None, None

    @staticmethod
    def stats(x: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        options = {"vocab_start": 0, "vocab_size": 7, "temperature": temperature, "block_rows": 2}
        stats = vocab_parallel_stats(x.clone(), labels, group=None, **options)
        return stats.logprobs, stats.entropy


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_gradcheck(temperature: float) -> None:
    x = torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(_Replay.apply, (x, torch.tensor([0, 6, 3, 3, 1]), temperature))


class _Watch(TorchDispatchMode):
    """Names of the collectives that run, and sizes in elements of all storages that operators allocate."""

    def __init__(self, known: Tensor) -> None:
        super().__init__()
        self.collectives: list[str] = []
        self.allocated: dict[int, int] = {known.untyped_storage().data_ptr(): 0}
        self.kept: list[Tensor] = []  # alive, so that no address is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "c10d" in str(func):
            self.collectives.append(str(func))
            return out
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.allocated.setdefault(storage.data_ptr(), storage.nbytes() // tensor.element_size())
                self.kept.append(tensor)
        return out


def _watched() -> tuple[list[str], list[str], list[int]]:
    rows, columns, block = 64, 500, 4
    x = torch.randn(rows, columns, requires_grad=True) * 1
    options = {"vocab_start": columns * dist.get_rank(), "vocab_size": 970, "block_rows": block, "with_sum_p2": True}
    labels = torch.arange(rows)
    with _Watch(x) as forward:
        stats = vocab_parallel_stats(x, labels, group=dist.group.WORLD, **options)
        loss = stats.logprobs.sum() + stats.entropy.sum()
    with _Watch(x) as backward:
        torch.autograd.grad(loss, x)
    sizes = [*forward.allocated.values(), *backward.allocated.values()]
    return forward.collectives, backward.collectives, sorted(sizes)


def test_one_collective_and_no_tensor_like_the_logits(worlds: Worlds) -> None:
    for forward, backward, sizes in worlds.run(2, _watched):
        assert len(forward) == 1 and "allgather" in forward[0]
        assert backward == []
        block = 2 * 4 * 500
        assert (
            block * 0.9 < sizes[-1] <= block
        )  # the scratch of forward and of backward, and nothing else of that order
        assert sizes[-2] <= block and sizes[-3] <= 2 * 64 * 6


def _empty() -> tuple[int, ...]:
    x = torch.randn(0, 8, requires_grad=True) * 1
    labels = torch.empty(0, dtype=torch.int64)
    options = {"vocab_start": 8 * dist.get_rank(), "vocab_size": 16, "with_sum_p2": True}
    stats = vocab_parallel_stats(x, labels, group=dist.group.WORLD, **options)
    (grad,) = torch.autograd.grad(stats.logprobs.sum() + stats.entropy.sum(), x)
    return tuple(grad.shape)


def test_no_tokens(worlds: Worlds) -> None:
    assert worlds.run(2, _empty) == [(0, 8), (0, 8)]


@pytest.mark.parametrize("used", ["logprobs", "entropy"])
def test_gradient_of_one_output_alone(used: str) -> None:
    base = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 9, 4, 4, 7, 2])
    dense = base.double().requires_grad_()
    _dense(dense, labels, 0.6)[used == "entropy"].sum().backward()
    x = base.clone().requires_grad_() * 1
    stats = vocab_parallel_stats(x, labels, group=None, vocab_start=0, vocab_size=10, temperature=0.6)
    (grad,) = torch.autograd.grad(getattr(stats, used).sum(), x)
    torch.testing.assert_close(grad.double(), dense.grad, rtol=1e-6, atol=1e-6)


def test_no_gradient_is_recorded_without_need() -> None:
    x, labels = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 1, 2])
    with torch.no_grad():
        assert not vocab_parallel_stats(x, labels, group=None, vocab_start=0, vocab_size=5).logprobs.requires_grad
    stats = vocab_parallel_stats(x * 1, labels, group=None, vocab_start=0, vocab_size=5, with_sum_p2=True)
    assert stats.logprobs.requires_grad and stats.entropy.requires_grad
    assert stats.sum_p2 is not None and not stats.sum_p2.requires_grad
    assert stats.sum_p2_logp is not None and not stats.sum_p2_logp.requires_grad


def test_a_second_backward_is_refused() -> None:
    x = torch.randn(3, 5, requires_grad=True) * 1
    stats = vocab_parallel_stats(x, torch.tensor([0, 1, 2]), group=None, vocab_start=0, vocab_size=5)
    stats.logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward .* overwrote the logits"):
        stats.entropy.sum().backward()


@pytest.mark.parametrize(
    ("logits", "labels", "options", "message"),
    [
        (torch.zeros(5, 3).T, torch.zeros(3, dtype=torch.int64), {}, "expected a contiguous"),
        (torch.zeros(3, 5), torch.zeros(3, dtype=torch.int32), {}, r"labels: got shape \(3,\), torch.int32"),
        (torch.zeros(3, 5), torch.zeros(4, dtype=torch.int64), {}, r"labels: got shape \(4,\)"),
        (torch.zeros(3, 5, requires_grad=True), torch.zeros(3, dtype=torch.int64), {}, "leaf"),
        (torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64), {"temperature": 0.0}, "temperature: got 0.0"),
        (torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64), {"block_rows": 0}, "block_rows: got 0"),
    ],
    ids=["strides", "label dtype", "label count", "leaf", "temperature", "block_rows"],
)
def test_inputs_that_cannot_work(logits: Tensor, labels: Tensor, options: dict[str, Any], message: str) -> None:
    with shape_checks.off(), pytest.raises(ValueError, match=message):
        vocab_parallel_stats(logits, labels, group=None, vocab_start=0, vocab_size=5, **options)
