"""Adam on the host (optimizer.cpu_offload): its moments, and the copy of the float32 weights that it updates.

Megatron-Core's HybridDeviceOptimizer does it, with three corrections. Its own float32 copies of weights that are not
float32 are for its precision-aware optimizer, which keeps no main weights; here the main weights are float32, and the
bookkeeping of those copies makes 0.16.1 fail when it loads a checkpoint. So does saving its options, among them
classes, with the hyper-parameters. And what a checkpoint brings reaches the main weights alone: the next update would
start from the host's older copy and write it over them.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from megatron_rl import device


def host_options() -> dict[str, Any]:
    """For Megatron's OptimizerConfig: all of the optimizer's state on the host."""
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
