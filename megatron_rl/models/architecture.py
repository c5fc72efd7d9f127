"""The architecture of the policy, with the defaults that transformers fills in."""

from __future__ import annotations

import copy
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from megatron_rl.errors import ConfigError
from megatron_rl.models.facts import architecture_faults


def resolve_hf_config(raw: dict[str, Any]) -> PretrainedConfig:
    """Return the config with the architecture's defaults filled in. Raises: ConfigError for features that the Megatron
    policy would silently drop."""
    faults = architecture_faults(raw)
    if faults:
        raise ConfigError("model: " + "; ".join(faults))
    options = copy.deepcopy(raw)  # transformers fills the rope's options in place
    if options.get("num_key_value_heads") is None:
        # as the config's checks and the plan count them; some of transformers' defaults fit one size of the model alone
        options["num_key_value_heads"] = options["num_attention_heads"]
    if options.get("head_dim") is None:
        options.pop("head_dim", None)  # of null transformers makes no width
    options["hidden_act"] = "silu"  # whose other name the rollout engines do not know
    return AutoConfig.for_model(options.pop("model_type"), **options)


def head_dim(hf: PretrainedConfig) -> int:
    """Return the width of one attention head: facts.head_width of a config whose defaults are filled in."""
    return getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
