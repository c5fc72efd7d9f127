"""The one list of what the policy cannot be, against models that transformers builds; what is said of folders."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_rl.config import parse_config
from megatron_rl.convert.hf import hub_views
from megatron_rl.errors import ConfigError
from megatron_rl.models.architecture import head_dim, resolve_hf_config
from megatron_rl.models.facts import (
    ARCHITECTURES,
    architecture_faults,
    head_width,
    model_folder_fault,
    moe_layers,
    require_model,
)
from megatron_rl.models.mapping import expected_hf_names, is_moe_layer
from tests.config.test_config import raw

BASE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 24,
    "max_position_embeddings": 256,
    "sliding_window": None,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 64,
    "attention_factor": 1.0,
}
# what a config.json may say, and whether the policy can be that
FEATURES: list[tuple[dict[str, Any], bool]] = [
    ({}, True),
    ({"tie_word_embeddings": True}, True),
    ({"head_dim": 16}, True),
    ({"head_dim": None}, True),
    ({"num_key_value_heads": None}, True),
    ({"hidden_act": "swish"}, True),
    ({"hidden_act": "gelu"}, False),
    ({"rms_norm_eps": 1, "initializer_range": 1, "router_aux_loss_coef": 0}, True),
    (dict.fromkeys(["rms_norm_eps", "hidden_act", "tie_word_embeddings", "attention_bias", "use_cache"]), True),
    (dict.fromkeys(["max_position_embeddings", "use_sliding_window", "norm_topk_prob", "mlp_only_layers"]), True),
    ({"eos_token_id": None, "pad_token_id": None, "architectures": None}, True),
    ({"attention_bias": True}, False),
    ({"mlp_bias": True}, False),
    ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, False),
    ({"layer_types": ["full_attention", "sliding_attention"]}, False),
    ({"layer_types": ["full_attention", "full_attention"]}, True),
    ({"layer_types": ["full_attention"]}, False),
    ({"quantization_config": {"quant_method": "fp8"}}, False),
    ({"num_key_value_heads": 3}, False),
    ({"head_dim": 15}, False),
    ({"hidden_size": 34}, False),
    ({"rope_theta": 5e5}, True),
    ({"rope_scaling": None}, True),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, True),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, True),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, True),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, True),
    ({"rope_scaling": LLAMA3}, True),
    ({"rope_scaling": YARN}, False),
    ({"rope_parameters": YARN}, False),
    ({"rope_scaling": YARN | {"attention_factor": 1.0}}, True),
    ({"rope_scaling": YARN | {"attention_factor": 1.2}}, False),
    ({"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}, True),
    ({"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}}, False),
    ({"rope_scaling": YARN | {"factor": 1.0}}, True),
    ({"rope_scaling": {"rope_type": "yarn"}}, False),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, False),
    ({"rope_scaling": LONG}, False),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}, False),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "partial_rotary_factor": 0.5}, False),
    ({"rope_scaling": {"rope_type": "mrope", "mrope_section": [1, 1, 2]}}, False),
    ({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}, False),
]


def config_of(kind: str, changes: dict[str, Any]) -> dict[str, Any]:
    return {"model_type": kind, **BASE, **(EXPERTS if ARCHITECTURES[kind].is_moe else {}), **changes}


def is_refused_by_the_check(hf: dict[str, Any]) -> bool:
    try:
        parse_config(raw(model={"hf_config": hf}, parallel={}))
    except ConfigError as error:
        assert "model" in str(error)
        return True
    return False


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize(
    ("changes", "is_possible"), FEATURES, ids=[json.dumps(changes)[:60] for changes, _ in FEATURES]
)
def test_the_check_and_the_policy_agree_with_transformers(
    kind: str, changes: dict[str, Any], is_possible: bool
) -> None:
    """What passes is a model with the policy's weights, full attention, SiLU and fixed frequencies; and nothing else
    that transformers would build so is refused."""
    hf = config_of(kind, changes)
    assert is_refused_by_the_check(hf) == (not is_possible) == bool(architecture_faults(hf))
    before = json.dumps(hf)
    if not is_possible:
        with pytest.raises(ConfigError, match="^model: "):
            resolve_hf_config(hf)
        return
    resolved = resolve_hf_config(parse_config(raw(model={"hf_config": hf}, parallel={})).model.hf_config or {})
    assert json.dumps(hf) == before, "the contents of config.json stay as they are"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(resolved)
    assert set(hub_views(dict(model.named_parameters()))) == expected_hf_names(resolved)
    for layer in model.model.layers:
        assert getattr(layer.self_attn, "sliding_window", None) is None
        assert layer.self_attn.head_dim == head_dim(resolved) == head_width(hf)
    assert all(type(m.act_fn).__name__.lower().startswith("silu") for m in model.modules() if hasattr(m, "act_fn"))
    rope = LlamaRotaryEmbedding(resolved)
    assert rope.attention_scaling == 1.0 and len(rope.inv_freq) == head_width(hf) // 2
    assert resolved.hidden_act == "silu", "the engines know no other name of it"


def test_a_window_that_mistral_has_when_nothing_is_said() -> None:
    hf = {key: value for key, value in config_of("mistral", {}).items() if key != "sliding_window"}
    assert "sliding_window 4096, null would be full" in architecture_faults(hf)[0]
    assert architecture_faults(hf | {"model_type": "qwen2"}) == []


def test_llama_wants_whole_heads_even_where_their_width_is_given() -> None:
    for kind in ARCHITECTURES:
        hf = config_of(kind, {"hidden_size": 34, "head_dim": 8})
        assert bool(architecture_faults(hf)) == (kind == "llama")
        if kind != "llama":
            resolve_hf_config(hf)


@pytest.mark.parametrize(("step", "dense"), list(itertools.product((1, 2, 3), ([], [0], [1, 2]))))
def test_the_layers_with_experts_are_those_of_the_mapping(step: int, dense: list[int]) -> None:
    hf = config_of("qwen3_moe", {"num_hidden_layers": 4, "decoder_sparse_step": step, "mlp_only_layers": dense})
    resolved = resolve_hf_config(hf)
    assert moe_layers(hf) == [layer for layer in range(4) if is_moe_layer(resolved, layer)]


def test_a_router_that_cannot_learn_is_refused() -> None:
    hf = config_of("qwen3_moe", {"num_experts_per_tok": 1, "norm_topk_prob": True})
    assert "one expert a token" in architecture_faults(hf)[0]


class Source:
    def __init__(self, path: object) -> None:
        self.path, self.hf_config = str(path), None


def test_a_wrong_model_path_is_said_in_the_same_words_by_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_rl.convert.weights import open_weights
    from megatron_rl.models.facts import read_hf_config

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
    cached = tmp_path / "hf_home" / "hub" / "models--org--name" / "snapshots" / "abc"
    cached.mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    expected = {
        "nowhere": "nowhere: no such folder here; download the model into it, name another",
        "org/other": "org/other: no such folder here; download.*hf download org/other --local-dir FOLDER",
        "org/name": f"org/name: no such folder here; did you mean {cached}\\?",
        str(cached.parent.parent): f"sub-folder hf; did you mean {cached}\\?",
        "empty": "empty: neither a Hugging Face model .* nor a Megatron checkpoint with its sub-folder hf$",
    }
    for path, text in expected.items():
        fault = model_folder_fault(path) or ""
        asks: list[Callable[[str], Any]] = [
            lambda p: read_hf_config(Source(p)),
            lambda p: require_model(Source(p)),
            open_weights,
        ]
        said = []
        for ask in asks:
            with pytest.raises(ConfigError, match=text) as caught:
                ask(path)
            said.append(str(caught.value).removeprefix("model.path="))
        assert said == [fault] * 3
