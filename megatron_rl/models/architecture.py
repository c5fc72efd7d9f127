"""The architecture of the policy, with the defaults that transformers fills in."""

from __future__ import annotations

import copy
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from megatron_rl.errors import ConfigError


def resolve_hf_config(raw: dict[str, Any]) -> PretrainedConfig:
    """Fill in the architecture's defaults. Raises: ConfigError for features that the Megatron policy would silently
    drop."""
    options = copy.deepcopy(raw)  # transformers writes into the dicts of RoPE
    # as the config's checks and the plan count them; some of transformers' defaults fit one size of the model alone
    options.setdefault("num_key_value_heads", options.get("num_attention_heads"))
    hf = AutoConfig.for_model(options.pop("model_type"), **options)
    refused = {
        "use_sliding_window": "sliding-window attention",
        "mlp_bias": "biases in the MLP",
    }
    faults = [what for key, what in refused.items() if getattr(hf, key, False)]
    if hf.model_type == "mistral" and hf.sliding_window is not None:
        faults.append(f"sliding-window attention (sliding_window {hf.sliding_window}, null would be full attention)")
    if getattr(hf, "attention_bias", False):
        faults.append("a bias on the attention output (attention_bias)")
    if getattr(hf, "hidden_act", "silu") != "silu":
        faults.append(f"hidden_act {hf.hidden_act!r} (only silu)")
    if hf.model_type == "qwen3_moe" and hf.norm_topk_prob and hf.num_experts_per_tok == 1:
        faults.append("norm_topk_prob and one expert a token (its weight is always 1, so the router cannot learn)")
    if faults:
        raise ConfigError(f"model: {hf.model_type} with {', '.join(faults)} is not supported; choose another model")
    return hf


def head_dim(hf: PretrainedConfig) -> int:
    """Width of one attention head."""
    return getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
