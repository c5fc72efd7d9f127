"""Read Hugging Face weights by name, without holding the model twice."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from megatron_rl import device
from megatron_rl.convert.weights import expected_weights

Source = Callable[[str], Tensor]


def random_source(hf: PretrainedConfig, seed: int) -> Source:
    """Return freshly initialised float32 weights as transformers draws them: the same for every layout. In a rehearsal
    they have shapes alone."""
    if device.REHEARSES:
        shapes = expected_weights(hf)
        return lambda name: torch.empty(shapes[name])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = AutoModelForCausalLM.from_config(hf, dtype=torch.float32).state_dict()
    return hub_views(weights).__getitem__


def hub_views(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a transformers model's tensors under the names that checkpoints have; they share memory with `weights`.

    In memory transformers 5 stacks a layer's experts: gate_up_proj `[experts, 2 * width, hidden]` and down_proj
    `[experts, hidden, width]`. On disk each expert has its own `[width, hidden]` (gate, up) and `[hidden, width]`.
    """
    views: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        layer, stacked, part = name.partition(".mlp.experts.")
        if not stacked:
            views[name] = tensor
            continue
        for expert, own in enumerate(tensor.detach().unbind(0)):
            parts = own.chunk(2, dim=0) if part == "gate_up_proj" else (own,)
            for projection, view in zip(part.removesuffix("_proj").split("_"), parts, strict=True):
                views[f"{layer}{stacked}{expert}.{projection}_proj.weight"] = view
    return views
