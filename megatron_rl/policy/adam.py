"""What torch's AdamW needs where it takes the place of Transformer Engine's Adam: on a CPU, on a GPU without that, and
on the host."""

import inspect
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer

from megatron_rl import device


def engine_faults() -> list[str]:
    """Return what keeps Megatron from Transformer Engine's layers and Adam; it goes on without either, silently."""
    from megatron.core import optimizer
    from megatron.core.extensions import transformer_engine

    faults = [] if transformer_engine.HAVE_TE else ["Megatron-Core cannot import Transformer Engine (HAVE_TE is false)"]
    return faults + ["Megatron-Core takes torch's Adam, not Transformer Engine's"] * optimizer.USING_PYTORCH_OPTIMIZER


def fuse_torch_adam(optimizer: Any) -> None:
    """Let torch's AdamW update in one pass, as Megatron has it do on the host: faster, and both places then round
    alike."""
    for chained in optimizer.chained_optimizers:
        if isinstance(chained.optimizer, torch.optim.AdamW):
            for group in chained.optimizer.param_groups:
                group["fused"] = True


def begin_torch_adam(optimizer: Any) -> None:
    """Give torch's Adam the state that its first update would begin with, if it has none yet: Megatron can neither save
    an optimizer without it nor load into one. Its own way to get one is a step, which weight decay makes felt."""
    for adam in (chained.optimizer for chained in optimizer.chained_optimizers if not chained.optimizer.state):
        if not isinstance(adam, torch.optim.AdamW | HybridDeviceOptimizer):
            continue
        for parameter in (parameter for group in adam.param_groups for parameter in group["params"]):
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            step = torch.zeros((), device="cpu" if isinstance(adam, HybridDeviceOptimizer) else parameter.device)
            adam.state[parameter] = {"step": step, **moments}  # fused, AdamW counts where the weights are


def restore_step_0(saved: dict[str, Any]) -> None:
    """The number of updates of an optimizer that is not distributed, which Megatron drops when it is 0."""
    if {"state", "param_groups"} <= saved.keys():
        saved["state"].setdefault("common_step", torch.tensor(0.0))
    for value in saved.values():
        if isinstance(value, dict):
            restore_step_0(value)


def let_torch_adam_load() -> None:
    """Mend how Megatron-Core 0.16.1 loads the distributed optimizer where it has torch's AdamW for want of another.

    Its restoring expects a `step`, and then all parameters share one `step` tensor, which AdamW would count once per
    parameter.
    """
    if HAVE_APEX_OR_TE or getattr(DistributedOptimizer, "_loads_torch_adam", False):
        return
    DistributedOptimizer._loads_torch_adam = True
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states
    load_state_dict = DistributedOptimizer.load_state_dict

    def with_step(self: Any, parameter: Any, tensors: dict[str, Any]) -> None:
        group, index = self.model_param_group_index_map[parameter]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][index]]
        kept = {"step": state["step"]} if "step" in state else {}
        with torch.no_grad():
            set_states(self, parameter, kept | tensors)

    def with_own_steps(self: Any, state_dict: Any) -> None:
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].to(state["exp_avg"].device, copy=True)

    DistributedOptimizer._set_main_param_and_optimizer_states = with_step
    DistributedOptimizer.load_state_dict = with_own_steps


def host_options() -> dict[str, Any]:
    """Return what Megatron's OptimizerConfig needs to keep all of the optimizer's state on the host."""
    return {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": 1.0,
        "pin_cpu_grads": device.ON_GPU,
        "pin_cpu_params": device.ON_GPU,
    }


def use_main_weights(optimizer: MegatronOptimizer) -> None:
    """Let each optimizer of the chain update the float32 main weights without further copies. Call it once, before the
    first update."""
    for chained in optimizer.chained_optimizers:
        if chained.optimizer is not None:
            options = chained.optimizer.defaults | {"param_update_in_fp32": False}
            chained.optimizer = HybridDeviceOptimizer(chained.optimizer.param_groups, **options)
            for group in chained.optimizer.param_groups:
                for name in inspect.signature(HybridDeviceOptimizer).parameters.keys() - {"params"}:
                    group.pop(name, None)


def refresh_host_weights(optimizer: MegatronOptimizer) -> None:
    """Copy the main weights to the host, after something else than an update wrote them; nothing where no state is
    there."""
    with torch.no_grad():
        for chained in optimizer.chained_optimizers:
            if isinstance(chained.optimizer, HybridDeviceOptimizer):
                for main, on_host in chained.optimizer.gpu_params_map_cpu_copy.items():
                    on_host.copy_(main)
