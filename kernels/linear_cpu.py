"""The matrix products of a linear layer on a CPU, by the library that is fastest for them.

float32: torch multiplies with MKL, which keeps to AVX2 on AMD's processors; oneDNN takes AVX-512 wherever it is: more
than twice as fast on Zen 5. It builds a kernel for each new shape, which costs as much as a small product itself
(0.3 ms) and is kept, so packing rounds the number of rows up to a multiple of ROWS (`device.row_multiple`), and what
has another number of rows (a mixture's experts) stays with MKL.

bfloat16 weights and float32 activations (model.activations): MKL's product of bfloat16 numbers whose sums are float32,
where the processor multiplies tiles of them (AMX); elsewhere the weight is converted in blocks. In the forward pass
activations enter as the sum of two bfloat16 numbers, 16 bits of their 24: what the trainer computes of a packed
sequence and the embedded engine token by token then agrees to 1e-4 nats, where one rounding would leave 1e-2.

All other types stay with torch.
"""

import ctypes
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROWS = 16
# oneDNN adds up a row in one go, MKL in parts: of long rows its sums are off by up to three times as much, which alone
# moves a real model's logits by 1e-4
LONGEST_SUM = 448
_CONVERTED = 2**21  # elements of a weight that exist in float32 at once: 8 MB
_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # called in this order
_FEW_ROWS = 128  # up to which both halves go through the weight at once: reading it costs more than computing
# inductor's own operator: torch offers oneDNN's float32 product by no other name without copies of both inputs
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x @ weight.T`: `[..., K]`, `[N, K]` -> `[..., N]`. Not differentiable, as the other two."""
    if _is_mixed(x, weight):
        return precise_product(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])
    suits = _suits(x) and x.shape[-1] <= LONGEST_SUM
    return _product(x, weight) if suits else torch.matmul(x, weight.t())


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """Return `grad @ weight`: `[..., N]`, `[N, K]` -> `[..., K]`."""
    if _is_mixed(grad, weight):
        return float32_product(grad.flatten(0, -2).to(weight.dtype), weight.t()).unflatten(0, grad.shape[:-1])
    return _product(grad, weight.t()) if _suits(grad) else torch.matmul(grad, weight)


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor | None:
    """Return `grad.T @ x`: `[T, N]`, `[T, K]` -> `[N, K]`; None when it was added to Megatron's float32 sum of a
    bfloat16 weight's gradients, `weight.main_grad`, whose rounding and copies that saves."""
    if _is_mixed(x, weight):
        total = getattr(weight, "main_grad", None)
        sums = total if total is not None and total.dtype == torch.float32 else None
        product = float32_product(grad.to(weight.dtype).t(), x.to(weight.dtype).t(), sums, adds=sums is not None)
        return product if sums is None else None
    if not _suits(grad):
        return torch.matmul(grad.t(), x)
    if grad.shape[1] <= x.shape[1]:
        return _product(grad.t(), x.t())
    # oneDNN copies its first operand when it is transposed: the smaller one, then
    return _product(x.t(), grad.t()).t().contiguous()


def precise_product(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Return `x @ weight.T` of float32 `[T, K]` and bfloat16 `[N, K]` in float32, x taken to 16 bits, into `out` where
    it is given."""
    high = x.to(weight.dtype)
    if x.dtype == weight.dtype:
        return float32_product(high, weight, out)
    low, rows = torch.sub(x, high).to(weight.dtype), len(x)
    if rows > _FEW_ROWS or out is not None:
        return float32_product(low, weight, float32_product(high, weight, out), adds=True)
    both = float32_product(torch.cat([high, low]), weight)
    return both[:rows].add_(both[rows:])


def float32_product(a: Tensor, b: Tensor, out: Tensor | None = None, *, adds: bool = False) -> Tensor:
    """Return `a @ b.T` of bfloat16 `[M, K]`, `[N, K]`, written into the float32 `out` `[M, N]` where it is given, or
    added to it: a product of two bfloat16 numbers is exact in float32, which a tensor core adds up as well."""
    out = a.new_empty(len(a), len(b), dtype=torch.float32) if out is None else out
    gemm = _bfloat16_gemm()
    if gemm is not None and out.numel() and a.shape[1]:
        gemm(a, b, out, adds)
        return out
    rows, a = max(1, _CONVERTED // max(1, b.shape[1])), a.float()
    for block, columns in zip(b.split(rows), out.split(rows, dim=1), strict=True):
        torch.addmm(columns, a, block.float().t(), beta=float(adds), out=columns)
    return out


def use_in(model: torch.nn.Module) -> None:
    """Let the linear layers of a Hugging Face model that only infers take the same products, and those that read the
    same input be one."""
    for module in model.modules():
        for names in _SAME_INPUT:
            layers = [getattr(module, name, None) for name in names]
            if all(type(layer) is torch.nn.Linear for layer in layers):
                _join([layer for layer in layers if layer is not None])
        if type(module) is torch.nn.Linear and "forward" not in vars(module):
            module.forward = partial(_forward, module)  # type: ignore[method-assign]


def _join(layers: list[torch.nn.Linear]) -> None:
    """Make the weights views of one, behind one another; the first layer computes for all."""
    weight, sizes = torch.cat([layer.weight.data for layer in layers]), [layer.out_features for layer in layers]
    products: list[Tensor] = []

    def forward(layer: torch.nn.Linear, x: Tensor) -> Tensor:
        if layer is layers[0]:
            products[:] = linear(x, weight).split(sizes, -1)
        product = products.pop(0)
        return product if layer.bias is None else product.add_(layer.bias)

    for layer, part in zip(layers, weight.split(sizes), strict=True):
        layer.weight.data, layer.forward = part, partial(forward, layer)  # type: ignore[method-assign]


def _forward(module: torch.nn.Linear, x: Tensor) -> Tensor:
    product = linear(x, module.weight)
    return product if module.bias is None else product.add_(module.bias)


def _is_mixed(x: Tensor, weight: Tensor) -> bool:
    return x.dtype == torch.float32 and weight.dtype == torch.bfloat16


def _suits(x: Tensor) -> bool:
    return _HAS_ONEDNN and x.dtype == torch.float32 and x.numel() // max(1, x.shape[-1]) % ROWS == 0 < x.numel()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return `a @ b.T`."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return product


@cache
def _bfloat16_gemm() -> Callable[[Tensor, Tensor, Tensor, bool], None] | None:
    """Return MKL's GEMM of bfloat16 with float32 sums, which torch carries and offers by no operator; None where the
    processor has no tiles for it, or torch no MKL."""
    try:
        gemm = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GEMM_BF16BF16F32
    except (OSError, AttributeError):
        return None
    gemm.restype = None
    return partial(_call_gemm, gemm) if torch.cpu._is_amx_tile_supported() else None


def _call_gemm(gemm: Any, a: Tensor, b: Tensor, out: Tensor, adds: bool) -> None:
    """Write `a @ b.T`. MKL's matrices lie column by column, so it computes `out.T = b @ a.T`."""
    sizes = (len(b), len(a), a.shape[1])
    (a, a_step, a_by_column), (b, b_step, b_by_column) = _laid_out(a), _laid_out(b)
    n, m, k, ldb, lda, ldc = (ctypes.byref(ctypes.c_int(size)) for size in (*sizes, b_step, a_step, out.stride(0)))
    one, beta = (ctypes.byref(ctypes.c_float(value)) for value in (1.0, float(adds)))
    at_b, at_a, at_out = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (b, a, out))
    ways = b"N" if b_by_column else b"T", b"T" if a_by_column else b"N"
    gemm(*ways, n, m, k, one, at_b, ldb, at_a, lda, beta, at_out, ldc)


def _laid_out(x: Tensor) -> tuple[Tensor, int, bool]:
    """Return a matrix as MKL takes it, how many elements lie from one row or column to the next, and whether it lies
    column by column."""
    rows, columns = x.shape
    if x.stride(0) == 1 and x.stride(1) >= rows:
        return x, x.stride(1), True
    if x.stride(1) != 1 or x.stride(0) < columns:
        x = x.contiguous()
    return x, x.stride(0), False
