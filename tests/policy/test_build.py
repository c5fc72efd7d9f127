"""What a model is on a GPU, as far as a CPU can tell: where its weights are made, who adds up their gradients, and that
a pass that only looks lets go of its logits."""

from __future__ import annotations

import gc
import weakref
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.policy.tiny import HF, make_batch, make_config, policy_of
from tests.worlds import Worlds

MOE = {
    "model_type": "qwen3_moe",
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def _devices() -> dict[str, str]:
    """Of a mixture's parameters, where whatever names no device is made on one that no CPU run uses."""
    from megatron_rl import device
    from megatron_rl.models.architecture import resolve_hf_config
    from megatron_rl.parallel.groups import init_groups
    from megatron_rl.policy import build

    hf = resolve_hf_config(HF | MOE)
    config = make_config(None, model={"hf_config": HF | MOE})
    groups = init_groups(config.parallel, config.seed)
    with mock.patch.object(device, "device", lambda: torch.device("meta")):
        chunk = build._chunk(hf, build.transformer_config(hf, config), 64, groups, 0, 1)
    return {name: parameter.device.type for name, parameter in chunk.named_parameters()}


def test_a_mixtures_router_is_made_on_the_device(worlds: Worlds) -> None:
    ((found),) = worlds.run(1, _devices)
    routers = [name for name in found if "router" in name]
    assert routers and {found[name] for name in routers} == {"meta"}


class _Product(torch.autograd.Function):
    """A linear layer's product that adds its weight's gradient as Transformer Engine's do: `fused`, to the float32
    buffer, and then hands back memory that nobody wrote, for which NaN stands."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, fused: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.fused = weight, fused
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (x,) = ctx.saved_tensors
        if not ctx.fused:
            return None, grad.t() @ x, None
        ctx.weight.main_grad += grad.t().float() @ x.float()
        ctx.weight.grad_added_to_main_grad = True
        return None, torch.full_like(ctx.weight, torch.nan), None


class _Linear(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(3, 4, generator=draw).bfloat16())
        self.fuse_wgrad_accumulation = False

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.weight, self.fuse_wgrad_accumulation)


def _weight_gradients() -> list[Tensor]:
    """Of two micro-batches, twice over: rounded and added by DDP, added by the product, and the exact sum."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from megatron_rl.models.architecture import resolve_hf_config
    from megatron_rl.parallel.groups import init_groups
    from megatron_rl.policy import build

    config = make_config(None)
    init_groups(config.parallel, config.seed)
    tconfig = build.transformer_config(resolve_hf_config(HF), config)
    inputs = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = []
    for fused in (False, True):
        model: Any = torch.nn.Sequential(_Linear())
        options = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        ddp = DistributedDataParallel(tconfig, options, model)
        if fused:
            build._add_weight_gradients(model)
        for _ in range(2):  # the second update begins anew
            ddp.zero_grad_buffer()
            for x in inputs:
                ddp(x).float().square().sum().backward()
        found.append(model[0].weight.main_grad.clone())
    weight = model[0].weight.detach()
    found.append(sum((2 * (x @ weight.t()).float()).bfloat16().float().t() @ x.float() for x in inputs))
    return found


def test_transformer_engines_products_add_weight_gradients_in_float32(worlds: Worlds) -> None:
    ((by_hook, by_product, exact),) = worlds.run(1, _weight_gradients)
    assert torch.equal(by_product, exact)
    assert not torch.equal(by_hook, exact)
    torch.testing.assert_close(by_hook, exact, rtol=2e-2, atol=2e-2)


def _logits_alive(parallel: dict[str, Any]) -> tuple[list[int], int]:
    """(Outputs of earlier micro-batches that are alive when the last stage begins one, and how many there are.)"""
    alive: list[int] = []
    outputs: list[weakref.ref[Tensor]] = []
    with policy_of(make_config(None, parallel=parallel)) as policy:
        batch = make_batch(policy.config, policy.groups)
        last = policy.model.chunks[-1]

        def count_alive(*_: Any) -> None:
            gc.collect()
            alive.append(sum(output() is not None for output in outputs))

        if last.post_process:
            last.register_forward_pre_hook(count_alive)
            last.register_forward_hook(lambda module, args, output: outputs.append(weakref.ref(output)))
        policy.stats(batch.mini_batches[0])
        return alive, len(batch.mini_batches[0].micro_batches)


@pytest.mark.parametrize("parallel", [{}, {"pp": 2}], ids=str)  # Megatron's interleaved schedule keeps none by itself
def test_a_pass_that_only_looks_keeps_no_logits(worlds: Worlds, parallel: dict[str, Any]) -> None:
    found = worlds.run(parallel.get("pp", 1), _logits_alive, parallel)
    alive, count = found[-1]
    assert count > 1 and alive == [0] * count
