"""The architecture of the policy, with the defaults that transformers fills in."""

import copy
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from megatron_rl.errors import ConfigError
from megatron_rl.models.facts import architecture_faults

# keys whose null says something; of others it stands for the default, which transformers fills in only without the key
_MAY_BE_NULL = {"sliding_window", "bos_token_id", "eos_token_id", "pad_token_id"}


def resolve_hf_config(raw: dict[str, Any]) -> PretrainedConfig:
    """Return the config with the architecture's defaults filled in. Raises: ConfigError for features that the Megatron
    policy would silently drop, and for what transformers refuses."""
    faults = architecture_faults(raw)
    if faults:
        raise ConfigError("model: " + "; ".join(faults))
    options = {key: value for key, value in copy.deepcopy(raw).items() if value is not None or key in _MAY_BE_NULL}
    # as the config's checks and the plan count them; some of transformers' defaults fit one size of the model alone
    options.setdefault("num_key_value_heads", options["num_attention_heads"])
    options["hidden_act"] = "silu"  # whose other name the rollout engines do not know
    try:
        return AutoConfig.for_model(options.pop("model_type"), **options)
    except Exception as error:  # transformers checks each architecture with errors of many types
        raise ConfigError(f"model: config.json is not valid: {error}") from error


def head_dim(hf: PretrainedConfig) -> int:
    """Return the width of one attention head: facts.head_width of a config whose defaults are filled in."""
    return getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
