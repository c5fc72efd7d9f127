"""The CPU's matrix products: right whoever computes them, and computed by oneDNN where they should be."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_rl.kernels import linear_cpu

PRODUCTS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "linear": lambda x, w, g: (linear_cpu.linear(x, w), x @ w.t()),
    "input gradient": lambda x, w, g: (linear_cpu.input_gradient(g, w), g @ w),
    "weight gradient": lambda x, w, g: (linear_cpu.weight_gradient(g, x, w), g.t() @ x),
}


def _operands(rows: int, wide: int, narrow: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows)
    shapes = [(rows, narrow), (wide, narrow), (rows, wide)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize(("wide", "narrow"), [(40, 12), (12, 40)])
@pytest.mark.parametrize(
    ("rows", "dtype", "by_onednn"),
    [
        (32, torch.float32, True),
        (7, torch.float32, False),
        (0, torch.float32, False),
        (32, torch.bfloat16, False),
        (32, torch.float64, False),
    ],
)
def test_products(name: str, wide: int, narrow: int, rows: int, dtype: torch.dtype, by_onednn: bool) -> None:
    operands = _operands(rows, wide, narrow, dtype)
    with mock.patch.object(linear_cpu, "_product", wraps=linear_cpu._product) as product:
        got, same_type = PRODUCTS[name](*operands)
    assert product.called == (by_onednn and linear_cpu._HAS_ONEDNN)
    assert got.dtype == dtype and got.is_contiguous() and got.shape == same_type.shape
    exact = PRODUCTS[name](*(x.double() for x in operands))[1]
    error = {torch.float32: 2e-5, torch.bfloat16: 0.2, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=error)


@pytest.mark.parametrize("by_mkl", [True, False])
@pytest.mark.parametrize(
    ("rows", "wide", "narrow"), [(32, 40, 12), (300, 24, 500), (7, 33, 50), (1, 40, 24), (0, 5, 8)]
)
def test_float32_activations_meet_bfloat16_weights(
    monkeypatch: pytest.MonkeyPatch, by_mkl: bool, rows: int, wide: int, narrow: int
) -> None:
    if not by_mkl:
        monkeypatch.setattr(linear_cpu, "_bfloat16_gemm", lambda: None)
        monkeypatch.setattr(linear_cpu, "_CONVERTED", 8 * narrow)
    elif linear_cpu._bfloat16_gemm() is None:
        pytest.skip("this processor has no AMX tiles, or torch no MKL")
    x, weight, grad = (each.float() for each in _operands(rows, wide, narrow, torch.float64))
    weight = weight.bfloat16()
    x = x[:, ::2].repeat_interleave(2, 1)[:, :narrow]
    exact = x.double() @ weight.double().t()
    got = linear_cpu.linear(x, weight)
    assert got.dtype == torch.float32 and got.shape == exact.shape
    # 16 bits of an activation: an error of 2^-17 of each product
    bound = 2**-16 * (x.double().abs() @ weight.double().abs().t()) + 1e-9
    assert bool(((got.double() - exact).abs() <= bound).all())
    torch.testing.assert_close(linear_cpu.precise_product(x, weight, torch.empty_like(got)), got, rtol=0, atol=1e-4)
    rounded, of_x = grad.bfloat16().double(), x.bfloat16().double()
    for gradient, wanted in (
        (linear_cpu.input_gradient(grad, weight), rounded @ weight.double()),
        (linear_cpu.weight_gradient(grad, x, weight), rounded.t() @ of_x),
    ):
        torch.testing.assert_close(gradient.double(), wanted, rtol=0, atol=1e-4)
    total = torch.ones_like(weight, dtype=torch.float32)
    weight.main_grad = total.clone()  # what Megatron sums the gradients of micro-batches in
    assert linear_cpu.weight_gradient(grad, x, weight) is None
    torch.testing.assert_close(weight.main_grad - total, (rounded.t() @ of_x).float(), rtol=0, atol=1e-4)


def test_long_sums_of_the_forward_pass_are_not_onednns() -> None:
    with mock.patch.object(linear_cpu, "_product", wraps=linear_cpu._product) as product:
        for width, calls in ((linear_cpu.LONGEST_SUM + 1, 0), (linear_cpu.LONGEST_SUM, 1)):
            x, weight, _ = _operands(32, 40, width, torch.float32)
            torch.testing.assert_close(linear_cpu.linear(x, weight), x @ weight.t(), rtol=0, atol=2e-4)
            assert product.call_count == calls * linear_cpu._HAS_ONEDNN


def test_more_dimensions_and_strided_operands() -> None:
    x, weight, grad = _operands(32, 40, 12, torch.float32)
    wide = torch.cat([x, x], dim=1)[:, :12]  # rows that are not behind one another
    assert torch.equal(linear_cpu.linear(wide.view(4, 8, 12), weight), linear_cpu.linear(x, weight).view(4, 8, 40))
    assert torch.equal(
        linear_cpu.input_gradient(grad.view(32, 1, 40), weight)[:, 0], linear_cpu.input_gradient(grad, weight)
    )


@pytest.mark.parametrize("bias", [True, False])
def test_a_model_that_infers(bias: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(12, 40, bias=bias), torch.nn.SiLU(), torch.nn.Linear(40, 12, bias=bias))
    model.requires_grad_(False)
    x = _operands(32, 40, 12, torch.float32)[0]
    expected = model(x)
    linear_cpu.use_in(model)
    with mock.patch.object(linear_cpu, "_product", wraps=linear_cpu._product) as product:
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-6)
    assert product.call_count == 2 * linear_cpu._HAS_ONEDNN
