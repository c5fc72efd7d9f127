"""Quantised export through nvidia-modelopt, where it is installed: the scales and integers give the weights back."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_rl.convert.to_megatron import hf_to_megatron
from megatron_rl.data.tokenizer import character_tokenizer
from tests.policy.tiny import hf_model, save
from tests.worlds import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("modelopt") is None, reason="needs the extra quantize"),
]


@pytest.mark.parametrize(("recipe", "dtype"), [("fp8", torch.float8_e4m3fn), ("int8", torch.int8)])
def test_the_export_gives_the_weights_back(recipe: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """To half a step: FP8 E4M3 keeps 3 bits of mantissa, so 2^-4 of a value; INT8's step is its scale."""
    source = save(hf_model(), tmp_path / "hf")
    character_tokenizer().save_pretrained(source)
    hf_to_megatron(source, tmp_path / "megatron")
    (tmp_path / "texts").write_text("(1+2)*3\n4*5-1\n7+8\n")
    command = [
        sys.executable,
        "-m",
        "megatron_rl",
        "convert",
        "megatron-to-hf",
        tmp_path / "megatron",
        tmp_path / "out",
    ]
    options = ["--quantize", recipe, "--calibration", tmp_path / "texts"]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # modelopt patches transformers where it is imported: not in this process
    subprocess.run(
        list(map(str, command + options)), check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "modelopt"
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    found, expected = load_file(tmp_path / "out" / "model.safetensors"), load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    weight, scale = found[f"{name}.weight"], found[f"{name}.weight_scale"].reshape(-1, 1)
    assert weight.dtype == dtype
    target = expected[f"{name}.weight"]
    if recipe == "fp8":
        value, bound = weight.float() * scale, target.abs() * 2**-4 + 2**-10 * scale  # the latter: subnormal numbers
    else:  # SmoothQuant moved a factor a column from the activations into the weights
        factor = found[f"{name}.pre_quant_scale"]
        value, bound = weight.float() * scale * factor, 0.501 * scale * factor
    assert ((value - target).abs() <= bound).all(), (value - target).abs().max()
    assert torch.equal(found["lm_head.weight"], expected["lm_head.weight"])
