"""Row statistics of a logits shard and the gradient written over it, in torch: the twin of `vocab_triton`.

Exponentials are MKL's e^x on Intel's processors and torch's 2^x, with exponents of log2(e) times the size, on others,
where MKL's costs four times as much; on Intel's it costs six tenths. The maker decides and not a measurement, so that a
run repeats bit for bit. What leaves this file is in nats.
"""

import math
from pathlib import Path

import torch
from torch import Tensor

_CPUS = Path("/proc/cpuinfo")
_POWER, _PER_NAT = (
    (torch.exp, 1.0)
    if torch.backends.mkl.is_available() and _CPUS.exists() and "GenuineIntel" in _CPUS.read_text()
    else (torch.exp2, math.log2(math.e))
)
# e^x and 2^x are exactly 0 in float64 below -1075, so clamping here changes no sum; it turns the -inf of a masked logit
# into a number that 0 can be multiplied with.
LOWEST_EXPONENT = -1.0e4
# two blocks of scratch and one of logits: 1.5 MB in float32, which stays in the cache of a CPU's core
_BLOCK_ELEMENTS = 2**17


def shard_stats(
    logits: Tensor,
    columns: Tensor,
    real_columns: int,
    temperature: float,
    with_sum_p2: bool,
    block_rows: int | None = None,
) -> Tensor:
    """Return m, s, t, z and, with_sum_p2, q, u of every row, in one pass over a logits shard.

    With d = (x - m) / temperature: m = max x, s = sum e^d, t = sum d e^d, z = x[column], q = sum e^2d, u = sum d e^2d.

    Args:
        logits: `[T, V]` contiguous; columns from `real_columns` on are padding and count as -inf.
        columns: `[T]` int64, the target's column; z is -inf where it is none of the real ones.
        real_columns: between 0 and V.
        temperature: divides the logits; m and z are before the division.
        with_sum_p2: also q and u.
        block_rows: rows worked on at once; None: as many as stay in a CPU's cache.

    Returns: `[T, 4 or 6]` float32 (float64 of float64). A row without a finite logit is (-inf, 0, 0, -inf, 0, 0) when
        it has no real columns, else (-inf, 0, 0, z, 0, 0): nothing of it survives the merge with another shard.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    stats = torch.zeros(logits.shape[0], 6 if with_sum_p2 else 4, dtype=dtype, device=logits.device)
    real = logits[:, :real_columns]
    if real.numel() == 0:
        stats[:, 0] = stats[:, 3] = -math.inf
        return stats
    stats[:, 3] = real.gather(1, columns.clamp(0, real_columns - 1)[:, None])[:, 0]
    stats[:, 3].masked_fill_((columns < 0) | (columns >= real_columns), -math.inf)
    block_rows = _rows_of_a_block(real, block_rows)
    scratch = torch.empty(2, block_rows, real_columns, dtype=dtype, device=logits.device)
    for rows, out in zip(real.split(block_rows), stats.split(block_rows), strict=True):
        d, e = scratch[:, : rows.shape[0]]
        rows = _as_float(rows, d)
        torch.amax(rows, 1, out=out[:, 0])
        _exponents(rows, out[:, 0], temperature, d)
        _POWER(d, out=e)
        torch.sum(e, 1, out=out[:, 1])
        torch.sum(d.mul_(e), 1, out=out[:, 2])  # not a matrix product: TF32 would round its inputs to 11 bits
        if with_sum_p2:
            torch.sum(d.mul_(e), 1, out=out[:, 5])
            torch.sum(e.mul_(e), 1, out=out[:, 4])
    stats[:, 2::3].div_(_PER_NAT)
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
    """Overwrite a logits shard with e^d (a + b d), plus `at_target` at the target's column; 0 in the padding.

    Args:
        logits, columns, real_columns, temperature, block_rows: as in `shard_stats`.
        maximum: `[T]`, of the whole row over all shards, before the temperature; d = (x - maximum) / temperature.
        a, b, at_target: `[T]`, of `maximum`'s dtype; None is 0.
    """
    logits[:, real_columns:].zero_()
    real = logits[:, :real_columns]
    if real.numel() == 0:
        return
    on_shard = (columns >= 0) & (columns < real_columns)
    columns = columns.clamp(0, real_columns - 1)
    if at_target is not None:
        at_target = at_target * on_shard
    if b is not None:
        b = b / _PER_NAT
    block_rows = _rows_of_a_block(real, block_rows)
    scratch = torch.empty(1 if b is None else 2, block_rows, real_columns, dtype=maximum.dtype, device=logits.device)
    for start in range(0, real.shape[0], block_rows):
        block = slice(start, start + block_rows)
        rows = real[block]
        d, e = scratch[0, : rows.shape[0]], scratch[-1, : rows.shape[0]]
        _exponents(_as_float(rows, d), maximum[block], temperature, d)
        _POWER(d, out=e)
        out = rows if rows.dtype == e.dtype else e  # the sum is rounded once
        factor = a[block, None] if b is None else d.mul_(b[block, None]).add_(a[block, None])
        torch.mul(e, factor, out=out)
        if at_target is not None:
            out.scatter_add_(1, columns[block, None], at_target[block, None])
        if out is e:
            rows.copy_(e)


def _rows_of_a_block(real: Tensor, block_rows: int | None) -> int:
    return min(block_rows or max(1, _BLOCK_ELEMENTS // real.shape[1]), real.shape[0])


def _as_float(rows: Tensor, scratch: Tensor) -> Tensor:
    """Return the rows in the scratch's dtype: copied once, because mixed operators convert at each use."""
    return rows if rows.dtype == scratch.dtype else scratch.copy_(rows)


def _exponents(rows: Tensor, maximum: Tensor, temperature: float, out: Tensor) -> None:
    """Write out = (rows - maximum) / temperature * _PER_NAT, finite where a logit or the whole row is -inf."""
    shift = maximum.masked_fill(maximum == -math.inf, 0.0)
    torch.sub(rows, shift[:, None], out=out)
    if _PER_NAT != temperature:
        out.mul_(_PER_NAT / temperature)
    out.clamp_(min=LOWEST_EXPONENT)
