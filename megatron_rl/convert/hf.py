"""Reading Hugging Face weights by name, without holding the model twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from megatron_rl.config_checks import ConfigError

Source = Callable[[str], Tensor]


def random_source(hf: PretrainedConfig, seed: int) -> Source:
    """Freshly initialised float32 weights as transformers draws them: the same for every layout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = AutoModelForCausalLM.from_config(hf, dtype=torch.float32).state_dict()
    return weights.__getitem__


def folder_source(path: str | Path) -> Source:
    """Lazily read tensors from `*.safetensors` in a model folder. Raises: ConfigError (no weights, or no such
    tensor)."""
    folder = Path(path)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = json.loads(index.read_text())["weight_map"]
    elif (folder / "model.safetensors").is_file():
        with safe_open(folder / "model.safetensors", framework="pt") as handle:
            files = dict.fromkeys(handle.keys(), "model.safetensors")
    else:
        raise ConfigError(
            f"model.path: no model.safetensors or its index in {folder}; give a folder with safetensors weights"
        )
    handles: dict[str, safe_open] = {}

    def read(name: str) -> Tensor:
        if name not in files:
            raise ConfigError(
                f"{folder}: tensor {name!r} is missing; the folder's weights do not belong to its config.json"
            )
        file = files[name]
        if file not in handles:
            handles[file] = safe_open(folder / file, framework="pt")
        return handles[file].get_tensor(name)

    return read


def write_folder(path: Path, hf: PretrainedConfig, weights: dict[str, Tensor]) -> None:
    """Write config.json and model.safetensors, as transformers reads them."""
    path.mkdir(parents=True, exist_ok=True)
    hf.save_pretrained(path)
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()}, path / "model.safetensors", {"format": "pt"}
    )
