"""The three matrix products of a linear layer in float32 on a CPU, by oneDNN.

torch multiplies float32 matrices with MKL, which keeps to AVX2 on AMD's processors; oneDNN takes AVX-512 wherever it
is: more than twice as fast on Zen 5. It builds a kernel for each new shape, which costs as much as a small product
itself (0.3 ms) and is kept, so packing rounds the number of rows up to a multiple of ROWS (`device.row_multiple`), and
what has another number of rows (a mixture's experts) stays with MKL. So do the other types, for which torch itself
takes oneDNN.
"""

from functools import partial

import torch
from torch import Tensor

ROWS = 16
# oneDNN adds up a row in one go, MKL in parts: of long rows its sums are off by up to three times as much, which alone
# moves a real model's logits by 1e-4
LONGEST_SUM = 448
_CONVERTED = 2**21  # elements of a weight that exist in float32 at once: 8 MB
# inductor's own operator: torch offers oneDNN's float32 product by no other name without copies of both inputs
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x @ weight.T`: `[..., K]`, `[N, K]` -> `[..., N]`. Not differentiable, as the other two."""
    suits = _suits(x) and x.shape[-1] <= LONGEST_SUM
    return _product(x, weight) if suits else torch.matmul(x, weight.t())


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """Return `grad @ weight`: `[..., N]`, `[N, K]` -> `[..., K]`."""
    return _product(grad, weight.t()) if _suits(grad) else torch.matmul(grad, weight)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Return `grad.T @ x`: `[T, N]`, `[T, K]` -> `[N, K]`."""
    if not _suits(grad):
        return torch.matmul(grad.t(), x)
    if grad.shape[1] <= x.shape[1]:
        return _product(grad.t(), x.t())
    # oneDNN copies its first operand when it is transposed: the smaller one, then
    return _product(x.t(), grad.t()).t().contiguous()


def float32_product(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Write `x @ weight.T` of bfloat16 `[T, K]`, `[N, K]` into the float32 `out` `[T, N]`: a product of two bfloat16
    numbers is exact in float32, which a tensor core adds up as well. The weight is converted in blocks."""
    rows, x = max(1, _CONVERTED // max(1, weight.shape[1])), x.float()
    for block, columns in zip(weight.split(rows), out.split(rows, dim=1), strict=True):
        torch.mm(x, block.float().t(), out=columns)


def use_in(model: torch.nn.Module) -> None:
    """Let the linear layers of a model that only infers take the same products."""
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.forward = partial(_forward, module)  # type: ignore[method-assign]


def _forward(module: torch.nn.Linear, x: Tensor) -> Tensor:
    product = linear(x, module.weight)
    return product if module.bias is None else product.add_(module.bias)


def _suits(x: Tensor) -> bool:
    return _HAS_ONEDNN and x.dtype == torch.float32 and x.numel() // max(1, x.shape[-1]) % ROWS == 0 < x.numel()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return `a @ b.T`."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return product
