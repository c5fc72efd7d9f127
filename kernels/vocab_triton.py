"""Row statistics of a logits shard and the gradient written over it, as Triton kernels: the twin of `vocab_torch`.

Both are bound by memory traffic: forward reads each logit once, backward reads it once and writes it once. A program
holds one row's tile at a time, so a row may have any length; many rows in flight hide the latency. With V a multiple of
16 and a base address that is one too, loads and stores are 128 bits wide.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
WARPS = 4
_LOG2_E = tl.constexpr(math.log2(math.e))
_LOWEST = tl.constexpr(-1.0e4)  # see vocab_torch.LOWEST_EXPONENT


def shard_stats(
    logits: Tensor,
    columns: Tensor,
    real_columns: int,
    temperature: float,
    with_sum_p2: bool,
    block_rows: int | None = None,
) -> Tensor:
    """Return what `vocab_torch.shard_stats` does; `block_rows` has no meaning here, where no scratch memory is used."""
    tokens, width = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    stats = torch.zeros(tokens, 6 if with_sum_p2 else 4, dtype=dtype, device=logits.device)
    if tokens:
        stats_kernel[(tokens,)](
            logits, columns, stats, width, real_columns, _scale(temperature), with_sum_p2, BLOCK, num_warps=WARPS
        )
    return stats


def write_gradient(
    logits: Tensor,
    columns: Tensor,
    real_columns: int,
    maximum: Tensor,
    a: Tensor,
    b: Tensor | None,
    at_target: Tensor | None,
    temperature: float,
    block_rows: int | None = None,
) -> None:
    """Overwrite a logits shard as `vocab_torch.write_gradient` does; `block_rows` has no meaning here."""
    tokens, width = logits.shape
    if tokens and width:
        factors = (a, a if b is None else b, a if at_target is None else at_target)
        has = (b is not None, at_target is not None)
        grid = (tokens, triton.cdiv(width, BLOCK))
        gradient_kernel[grid](
            logits, columns, maximum, *factors, width, real_columns, _scale(temperature), *has, BLOCK, num_warps=WARPS
        )


def _scale(temperature: float) -> float:
    """Return log2(e) / temperature, compiled in: an argument would be float32, and a run has one temperature or two."""
    return math.log2(math.e) / temperature


@triton.jit
def stats_kernel(
    logits,
    columns,
    stats,
    width,
    real_columns,
    SCALE: tl.constexpr,
    WITH_SUM_P2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write a row's statistics, a program a row: an online softmax in base 2, its first moment, those of its square."""
    row = tl.program_id(0).to(tl.int64)  # rows * width passes 2^31
    acc = stats.dtype.element_ty
    base = logits + row * width
    m = tl.full([], float("-inf"), acc)
    s = tl.full([], 0.0, acc)
    t = tl.full([], 0.0, acc)
    q = tl.full([], 0.0, acc)
    u = tl.full([], 0.0, acc)
    for start in range(0, real_columns, BLOCK):
        places = start + tl.arange(0, BLOCK)
        x = tl.load(base + places, mask=places < width, other=float("-inf")).to(acc)
        x = tl.where(places < real_columns, x, float("-inf"))  # not in the load: it would be narrow when V is odd
        new = tl.maximum(m, tl.max(x, 0))
        shift = tl.where(new == float("-inf"), 0.0, new)
        delta = _exponent(m, shift, SCALE)
        d = _exponent(x, shift, SCALE)
        e = tl.exp2(d)
        w = tl.exp2(delta)
        de = d * e
        t = w * (t + delta * s) + tl.sum(de, 0)
        s = w * s + tl.sum(e, 0)
        if WITH_SUM_P2:
            u = w * w * (u + delta * q) + tl.sum(de * e, 0)
            q = w * w * q + tl.sum(e * e, 0)
        m = new
    column = tl.load(columns + row)
    on_shard = (column >= 0) & (column < real_columns)
    z = tl.load(base + tl.where(on_shard, column, 0), mask=on_shard, other=float("-inf")).to(acc)
    out = stats + row * (6 if WITH_SUM_P2 else 4)
    tl.store(out, m)
    tl.store(out + 1, s)
    tl.store(out + 2, t / _LOG2_E)
    tl.store(out + 3, z)
    if WITH_SUM_P2:
        tl.store(out + 4, q)
        tl.store(out + 5, u / _LOG2_E)


@triton.jit
def gradient_kernel(
    logits,
    columns,
    maximum,
    a,
    b,
    at_target,
    width,
    real_columns,
    SCALE: tl.constexpr,
    HAS_B: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradient over the logits, one program a tile of a row: the softmax is computed again."""
    row = tl.program_id(0).to(tl.int64)
    acc = maximum.dtype.element_ty
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    where = logits + row * width + places
    x = tl.load(where, mask=places < width, other=float("-inf")).to(acc)
    m = tl.load(maximum + row)
    d = _exponent(x, tl.where(m == float("-inf"), 0.0, m), SCALE)
    factor = tl.load(a + row)
    if HAS_B:
        factor = factor + tl.load(b + row) / _LOG2_E * d
    gradient = tl.exp2(d) * factor
    if HAS_TARGET:
        gradient += tl.where(places == tl.load(columns + row), tl.load(at_target + row), 0.0)
    gradient = tl.where(places < real_columns, gradient, 0.0)
    tl.store(where, gradient.to(logits.dtype.element_ty), mask=places < width)


@triton.jit
def _exponent(x, shift, SCALE: tl.constexpr):
    """Return (x - shift) * SCALE, finite where x is -inf. Not `maximum`, which would turn a NaN into a number."""
    d = (x - shift) * SCALE
    return tl.where(d < _LOWEST, _LOWEST, d)
