"""Compare two model folders of either format: every tensor bit for bit, and the logits on a probe prompt."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.convert.folders import Progress, load_tokenizer
from megatron_rl.convert.weights import Weights, open_weights
from megatron_rl.errors import ConfigError

_ROWS = 4096
_INTEGERS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True, slots=True)
class Comparison:
    """What differs between two folders, one line each, and how much was compared."""

    differences: tuple[str, ...]
    num_tensors: int
    num_bytes: int  # of the first folder


def compare_tensors(a: Path, b: Path, progress: Progress = lambda count, total: None) -> Comparison:
    """Names, shapes, dtypes and bits of two folders; memory: about two parameters.

    Raises: ConfigError when a folder is not a valid model.
    """
    first, second = open_weights(a), open_weights(b)
    found = []
    total = sum(info.nbytes for info in first.tensors.values())
    for name in [*first.tensors, *(name for name in second.tensors if name not in first.tensors)]:
        found += _difference(name, first, second)
        progress(first.tensors[name].nbytes if name in first.tensors else 0, total)
    return Comparison(tuple(found), len(first.tensors), total)


def _difference(name: str, first: Weights, second: Weights) -> list[str]:
    for here, there in ((first, second), (second, first)):
        if name not in here.tensors:
            return [f"{name}: only in {there.path}"]
    a, b = first.tensors[name], second.tensors[name]
    if a.shape != b.shape:
        return [f"{name}: shape {a.shape} against {b.shape}"]
    largest, elements = _distance(first.read(name), second.read(name))
    names = [str(info.dtype).removeprefix("torch.") for info in (a, b)]
    dtypes = f"dtype {names[0]} against {names[1]}" if a.dtype != b.dtype else ""
    values = f"{elements:,} elements differ, max |difference| {largest:.3g}" if elements else ""
    return [f"{name}: {'; '.join(filter(None, (dtypes, values)))}"] if dtypes or values else []


def _distance(a: Tensor, b: Tensor) -> tuple[float, int]:
    """(largest |difference|, number of elements whose bits differ; of two dtypes, whose values do)."""
    largest, count = 0.0, 0
    for start in range(0, a.shape[0], _ROWS):
        x, y = a[start : start + _ROWS], b[start : start + _ROWS]
        bits = [t.view(_INTEGERS[t.dtype.itemsize]) for t in (x, y)] if x.dtype == y.dtype else [x.double(), y.double()]
        differs = bits[0] != bits[1]
        if differs.any():
            count += int(differs.sum())
            largest = max(largest, float((x[differs].double() - y[differs].double()).abs().nan_to_num(torch.inf).max()))
    return largest, count


def compare_logits(a: Path, b: Path, prompt: str) -> tuple[float, bool, int]:
    """(largest |difference| of the logits, whether every argmax agrees, tokens) on `prompt`, in transformers' float32.

    Each model is held in memory whole, one after the other.
    Raises: ConfigError when neither folder has a tokenizer, or the vocabularies differ.
    """
    first, second = open_weights(a), open_weights(b)
    token_ids = _encode(first, second, prompt)
    with torch.inference_mode():
        logits = [transformers_model(weights, torch.float32)(token_ids).logits[0] for weights in (first, second)]
    if logits[0].shape != logits[1].shape:
        raise ConfigError(f"the vocabularies differ: {logits[0].shape[-1]} tokens in {a}, {logits[1].shape[-1]} in {b}")
    largest = float((logits[0] - logits[1]).abs().nan_to_num(torch.inf).max())
    return largest, torch.equal(logits[0].argmax(-1), logits[1].argmax(-1)), token_ids.shape[1]


def _encode(first: Weights, second: Weights, prompt: str) -> Tensor:
    for weights in (first, second):
        if (weights.hf_folder / "tokenizer_config.json").is_file():
            token_ids = load_tokenizer(weights.hf_folder)(prompt, return_tensors="pt").input_ids
            if token_ids.shape[1] == 0:
                raise ConfigError(f"--prompt {prompt!r}: no tokens; give a longer text")
            return token_ids
    raise ConfigError(f"--prompt needs a tokenizer, and neither {first.path} nor {second.path} has one")


def transformers_model(weights: Weights, dtype: torch.dtype) -> Any:
    """The model as transformers runs it, on the CPU: a Hugging Face folder by its own loader, a checkpoint's tensors
    copied into a fresh model."""
    from transformers import AutoModelForCausalLM

    from megatron_rl.convert.hf import hub_views

    if not weights.is_megatron:
        return AutoModelForCausalLM.from_pretrained(weights.path, dtype=dtype, local_files_only=True).eval()
    model = AutoModelForCausalLM.from_config(weights.hf, dtype=dtype).eval()
    views = hub_views(dict(model.named_parameters()))
    if views.keys() != weights.tensors.keys():
        raise ConfigError(f"{weights.path}: transformers names other tensors: {sorted(views.keys() ^ weights.tensors)}")
    with torch.no_grad():
        for name, view in views.items():
            view.copy_(weights.read(name))
    return model
