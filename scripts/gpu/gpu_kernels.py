"""The kernels of the vocabulary statistics against float64, and their bytes per second beside a plain copy's."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from gpu_answer import Answer
from torch import Tensor

from megatron_rl import device
from megatron_rl.parallel.fused_linear import float32_linear, linear_stats
from megatron_rl.parallel.vocab import (
    VocabShard,
    gradient_coefficients,
    merge_shards,
    merge_stacked,
    vocab_parallel_stats,
)

# name -> dtype, columns, real columns, temperature, standard deviation and offset of the logits
CASES: dict[str, tuple[torch.dtype, int, int, float, float, float]] = {
    "float32": (torch.float32, 19_072, 19_010, 1.0, 3.0, 0.0),
    "float32, odd width, offset -150": (torch.float32, 4_999, 4_999, 0.6, 3.0, -150.0),
    "bfloat16": (torch.bfloat16, 19_072, 19_010, 1.0, 3.0, 0.0),
    "bfloat16, odd width, scale 30": (torch.bfloat16, 4_999, 4_990, 0.7, 30.0, 0.0),
    "float16": (torch.float16, 2_048, 2_048, 2.0, 3.0, -20.0),
}
ALLOWED = (
    1e-5  # of the size of the value, or of 1 where that is smaller; gradients besides by half a step of their dtype
)
ROWS = 256
WIDE = 152_064  # a vocabulary of Qwen2.5


def kernels(answer: Answer) -> None:
    """Look at values and gradients, at offsets beyond 2^31, at the fused output layer, then at speed."""
    for name, case in CASES.items():
        values, gradient = errors(case)
        answer.check(name, max(values, gradient) <= ALLOWED, f"largest error {values:.1e}, of gradients {gradient:.1e}")
    empty_shards(answer)
    fused(answer)
    far_rows(answer)
    speeds(answer)


def logits_of(case: tuple[torch.dtype, int, int, float, float, float]) -> tuple[Tensor, Tensor]:
    """Return logits `[ROWS, V]` with masked tokens and hostile padding, and labels."""
    dtype, width, real, _, deviation, offset = case
    generator = torch.Generator().manual_seed(7)
    logits = deviation * torch.randn(ROWS, width, generator=generator, dtype=torch.float64) + offset
    logits[1, 10:140:3] = -math.inf
    logits[2, : width // 2] = -math.inf
    logits[:, real:] = 400.0  # would dominate every sum if padding counted
    labels = torch.randint(width // 2, real, (ROWS,), generator=generator)
    where = device.device()
    return logits.to(dtype).to(where), labels.to(where)


def errors(case: tuple[torch.dtype, int, int, float, float, float]) -> tuple[float, float]:
    """Return the largest errors of the four statistics and of the logits' gradient against a dense float64 softmax."""
    dtype, _, real, temperature, *_ = case
    logits, labels = logits_of(case)
    upstream = torch.randn(2, ROWS, generator=torch.Generator().manual_seed(8)).to(logits.device)
    exact = logits.double().requires_grad_()
    want = dense(exact[:, :real] / temperature, labels)
    (want[0] * upstream[0] + want[1] * upstream[1]).sum().backward()
    assert exact.grad is not None
    inner = logits.clone().requires_grad_()
    computed = inner * 1.0  # what the statistics overwrite must be no leaf
    stats = vocab_parallel_stats(
        computed,
        labels,
        group=None,
        vocab_start=0,
        vocab_size=real,
        temperature=temperature,
        with_sum_p2=True,
    )
    got = [stats.logprobs, stats.entropy, stats.sum_p2, stats.sum_p2_logp]
    (stats.logprobs * upstream[0] + stats.entropy * upstream[1]).sum().backward()
    assert inner.grad is not None
    values = max(relative(mine, theirs) for mine, theirs in zip(got, want, strict=True) if mine is not None)
    rounding = torch.finfo(dtype).eps / 2 * exact.grad.abs() if dtype != torch.float32 else 0.0
    excess = ((inner.grad.double() - exact.grad).abs() - rounding).clamp(min=0.0)
    return values, float((excess / exact.grad.abs().clamp(min=1.0)).nan_to_num(nan=math.inf).max())


def dense(x: Tensor, labels: Tensor) -> list[Tensor]:
    """Return log-probabilities, entropy, sum pi^2 and sum pi^2 log pi `[T]` of logits `[T, V]`, as they are defined."""
    log_p = torch.log_softmax(x, 1)
    p, finite = log_p.exp(), log_p.masked_fill(log_p == -math.inf, 0.0)
    return [log_p.gather(1, labels[:, None])[:, 0], -(p * finite).sum(1), (p * p).sum(1), (p * p * finite).sum(1)]


def relative(mine: Tensor, theirs: Tensor) -> float:
    """Return the largest difference, relative to what is compared with where that is above 1."""
    difference = (mine.detach().double() - theirs.detach().double()).abs()
    return float((difference / theirs.detach().abs().clamp(min=1.0)).nan_to_num(nan=math.inf).max())


def empty_shards(answer: Answer) -> None:
    """Look at a shard of padding alone, and at the merge of unequal shards."""
    case = (torch.float32, 3_000, 2_500, 1.0, 3.0, 0.0)
    logits, labels = logits_of(case)
    cuts = (0, 1_024, 2_496, 2_816, 3_000)
    parts = []
    for a, b in zip(cuts, cuts[1:], strict=False):
        shard = logits[:, a:b].contiguous()
        parts.append(
            device.vocab_kernels(shard).shard_stats(shard, labels - a, min(max(2_500 - a, 0), b - a), 1.0, True)
        )
    got = merge_stacked(torch.stack(parts), 1.0)[2:]
    want = dense(logits[:, :2_500].double(), labels)
    error = max(relative(mine, theirs) for mine, theirs in zip(got, want, strict=True))
    answer.check("four shards, one of padding alone", error <= ALLOWED, f"largest error {error:.1e}")


def fused(answer: Answer) -> None:
    """Look at the statistics without logits, and at float32 logits of bfloat16 weights."""
    generator = torch.Generator().manual_seed(9)
    where = device.device()
    hidden = torch.randn(ROWS, 512, generator=generator).bfloat16().to(where)
    weight = (torch.randn(5_000, 512, generator=generator) / 8).bfloat16().to(where)
    labels = torch.randint(0, 4_900, (ROWS,), generator=generator).to(where)
    want = dense((hidden.double() @ weight.double().t())[:, :4_900], labels)
    shard = VocabShard(None, 0, 4_900)
    for name, is_float32, allowed in (("float32 logits", True, 1e-4), ("bfloat16 logits", False, 0.1)):
        inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        stats = linear_stats(*inputs, labels, shard, chunk_tokens=100, float32_logits=is_float32)
        error = max(relative(stats.logprobs, want[0]), relative(stats.entropy, want[1]))
        stats.logprobs.sum().backward()
        is_finite = all(x.grad is not None and bool(x.grad.isfinite().all()) for x in inputs)
        answer.check(f"fused output layer, {name}", error <= allowed and is_finite, f"largest error {error:.1e}")
    inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = float32_linear(*inputs)
    error = relative(logits, hidden.double() @ weight.double().t())
    logits.sum().backward()
    assert inputs[1].grad is not None
    exact = hidden.double().sum(0)
    backward = relative(inputs[1].grad[0], exact)
    answer.check(
        "product with float32 sums",
        error <= 1e-4 and backward <= 1e-2,
        f"error {error:.1e}, of gradients {backward:.1e}",
    )


def far_rows(answer: Answer) -> None:
    """Look at rows whose offsets do not fit 32 bits: 2.4e9 logits."""
    rows, width, last = (126_000, 19_072, 32) if device.ON_GPU else (64, 19_072, 32)
    needed = rows * width * 2 * 1.5
    if device.ON_GPU and device.gpu_memory()[1] < needed:
        answer.skip("offsets beyond 2^31", f"{needed / 2**30:.0f} GiB of free device memory are needed")
        return
    logits = torch.empty(rows, width, dtype=torch.bfloat16, device=device.device())
    few = 3 * torch.randn(64, width, generator=torch.Generator().manual_seed(3)).to(logits)
    for start in range(0, rows, 64):
        logits[start : start + 64] = few[: rows - start]
    labels = (torch.arange(rows, device=logits.device) * 37) % width
    want = dense(logits[-last:].double(), labels[-last:])
    functions = device.vocab_kernels(logits)
    maximum, log_s, *stats = merge_shards(functions.shard_stats(logits, labels, width, 1.0, True), None, 1.0)
    error = max(relative(mine[-last:], theirs) for mine, theirs in zip(stats, want, strict=True))
    p = torch.softmax(logits[-last:].double(), 1)
    one = torch.nn.functional.one_hot(labels[-last:], width)
    factors = gradient_coefficients(log_s, stats[1], torch.ones_like(log_s), None, 1.0)
    functions.write_gradient(logits, labels, width, maximum, *factors, 1.0)
    gradient = float((logits[-last:].double() - (one - p)).abs().max())
    answer.check(
        f"{rows * width / 1e9:.1f}e9 logits",
        error <= ALLOWED and gradient <= 4e-3,
        f"{error:.1e}, {gradient:.1e}",
    )


def speeds(answer: Answer) -> None:
    """Measure bytes per second of both kernels: each logit is read once, and once read and written."""
    rows = 4096 if device.ON_GPU else 16
    for dtype in (torch.bfloat16, torch.float32):
        logits = torch.randn(rows, WIDE, device=device.device()).to(dtype)
        other = torch.empty_like(logits)
        labels = torch.arange(rows, device=logits.device) % WIDE
        functions = device.vocab_kernels(logits)
        local = functions.shard_stats(logits, labels, WIDE, 1.0, False)
        maximum, log_s, *_ = merge_shards(local, None, 1.0)
        factors = gradient_coefficients(log_s, log_s, torch.ones_like(log_s) * 1e-3, None, 1.0)
        rates = {
            "copy": rate(lambda: other.copy_(logits), 2 * logits.nbytes),  # noqa: B023
            "statistics": rate(lambda: functions.shard_stats(logits, labels, WIDE, 1.0, False), logits.nbytes),  # noqa: B023
            "gradient": rate(
                lambda: functions.write_gradient(other, labels, WIDE, maximum, *factors, 1.0),  # noqa: B023
                2 * logits.nbytes,
            ),
        }
        name = f"speed, {str(dtype).removeprefix('torch.')}"
        answer.figure(name, rates)
        text = ", ".join(f"{what} {value / 1e9:.0f} GB/s" for what, value in rates.items())
        if device.ON_GPU:
            slowest = min(rates["statistics"], rates["gradient"])
            answer.check(name, slowest >= 0.5 * rates["copy"], f"{text}; at least half a copy's is expected")
        else:
            answer.skip(name, f"a CPU's: {text}")


def rate(act: Callable[[], object], nbytes: int) -> float:
    """Return bytes/s of device time, the median of a few runs after a warm-up."""
    for _ in range(3):
        act()
    seconds = []
    for _ in range(10 if device.ON_GPU else 3):
        start = device.mark()
        act()
        end = device.mark()
        device.synchronize()
        seconds.append(device.seconds_between(start, end))
    return nbytes / max(sorted(seconds)[len(seconds) // 2], 1e-9)
