"""The CPU's gated activation against what autograd makes of its definition, bit for bit."""

from __future__ import annotations

import pytest
import torch

from megatron_rl.kernels import swiglu_cpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(5, 1, 12), (32, 896), (0, 8)])
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x = (4 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()
    gate, linear = x.chunk(2, -1)
    expected = torch.nn.functional.silu(gate) * linear
    product = swiglu_cpu.swiglu(x)
    grad = torch.randn(expected.shape, generator=generator).to(dtype)
    assert torch.equal(product, expected)
    assert torch.equal(*(torch.autograd.grad(y, x, grad)[0] for y in (product, expected)))


def test_megatrons_layers_use_it() -> None:
    import megatron_rl.policy  # noqa: F401  prepares Megatron
    from megatron.core.transformer import mlp  # isort: skip

    assert mlp._swiglu_cpu is swiglu_cpu
