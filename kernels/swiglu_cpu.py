"""The gated activation of a feed-forward layer on a CPU. For silu(a) * b autograd computes both halves of the gradient
and then copies them together; here each is written where it belongs."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def swiglu(x: Tensor) -> Tensor:
    """Return `silu(a) * b` of x = [a, b] `[..., 2 F]` -> `[..., F]`; values and gradients have autograd's bits."""
    product: Tensor = _SwiGLU.apply(x)
    return product


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gate, linear = x.chunk(2, -1)
        activated = torch.nn.functional.silu(gate)
        ctx.save_for_backward(x, activated)
        return activated * linear

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, activated = ctx.saved_tensors
        gate, linear = x.chunk(2, -1)
        result = torch.empty_like(x)
        of_gate, of_linear = result.chunk(2, -1)
        torch.ops.aten.silu_backward.grad_input(grad * linear, gate, grad_input=of_gate)
        torch.mul(grad, activated, out=of_linear)
        return result
