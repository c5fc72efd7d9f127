"""Quantised exports: scales and integers give the weights back. FP8 needs nvidia-modelopt."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_rl.convert.quantize import INT8_CONFIG, int8_to_hf
from megatron_rl.convert.to_megatron import hf_to_megatron
from megatron_rl.data.tokenizer import character_tokenizer
from megatron_rl.errors import ConfigError
from tests.policy.tiny import hf_model, save
from tests.worlds import ROOT

LINEAR = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


MOE = {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "head_dim": 8,
}


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
def test_int8_gives_the_weights_back(changes: dict[str, Any], tmp_path: Path) -> None:
    """To half a step of each channel; all but the linear layers stay bit for bit."""
    source = save(hf_model(**changes), tmp_path / "hf")
    character_tokenizer().save_pretrained(source)
    hf_to_megatron(source, tmp_path / "megatron")
    int8_to_hf(tmp_path / "megatron", tmp_path / "out", max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1 and (tmp_path / "out" / "tokenizer.json").is_file()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == INT8_CONFIG and config["architectures"]
    found: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        found |= load_file(path)
    expected = load_file(source / "model.safetensors")
    linear = {name for name in expected if name.split(".")[-2] in LINEAR and name.endswith(".weight")}
    assert len(linear) > 10 and set(found) == set(expected) | {f"{name}_scale" for name in linear}
    for name, target in expected.items():
        if name in linear:
            weight, scale = found[name], found[f"{name}_scale"]
            assert (weight.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (len(target), 1))
            assert ((weight * scale - target).abs() <= 0.501 * scale).all(), name
            assert (weight.abs().amax(1) == 127).all(), name  # the scale wastes no step
        else:
            assert torch.equal(found[name], target), name


def test_int8_of_a_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    """SGLang's loader raises NotImplementedError for it."""
    hf_to_megatron(save(hf_model(**MOE), tmp_path / "hf"), tmp_path / "megatron")
    with pytest.raises(ConfigError, match="int8 takes no mixture of experts: SGLang .*--quantize fp8"):
        int8_to_hf(tmp_path / "megatron", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("modelopt") is None, reason="needs the extra quantize")
def test_fp8_gives_the_weights_back(tmp_path: Path) -> None:
    """To half a step: E4M3 keeps 3 bits of mantissa, so 2^-4 of a value."""
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
    options = ["--quantize", "fp8", "--calibration", tmp_path / "texts"]
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
    assert weight.dtype == torch.float8_e4m3fn
    target = expected[f"{name}.weight"]
    value, bound = weight.float() * scale, target.abs() * 2**-4 + 2**-10 * scale  # the latter: subnormal numbers
    assert ((value - target).abs() <= bound).all(), (value - target).abs().max()
    assert torch.equal(found["lm_head.weight"], expected["lm_head.weight"])
