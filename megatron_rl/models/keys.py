"""The keys of a config.json that mean something here, with the types of their values.

A YAML file states them as text now and then (`1e-6` is text in YAML 1.1): such numbers are read as numbers. Other keys
pass as they are.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, with_config
from typing_extensions import TypedDict


def _number(value: Any) -> int | float | None:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ValueError("expected a number") from None
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        raise ValueError("expected a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("expected a finite number")
    return value


def _real(value: Any) -> float | None:  # transformers takes no whole number here
    number = _number(value)
    return None if number is None else float(number)


def _integer(value: Any) -> int | None:
    number = _number(value)
    if isinstance(number, float) and not number.is_integer():
        raise ValueError("expected a whole number")
    return None if number is None else int(number)


def _flag(value: Any) -> bool | None:
    if isinstance(value, bool | None):
        return value
    named = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    if isinstance(value, str) and value.lower() in named:
        return named[value.lower()]
    raise ValueError("expected true or false")


def _text(value: Any) -> str | None:
    if not isinstance(value, str | None):
        raise ValueError("expected a text")
    return value


def _listed(read: Callable[[Any], Any], items: str, value: Any) -> Any:
    if not isinstance(value, list | tuple | None):
        raise ValueError(f"expected a list of {items}")
    return None if value is None else [read(item) for item in value]


_integers, _texts = partial(_listed, _integer, "whole numbers"), partial(_listed, _text, "texts")


def _tokens(value: Any) -> Any:
    return _integers(value) if isinstance(value, list | tuple) else _integer(value)


def _typed(name: str, keys: dict[Callable[[Any], Any], str], **others: Any) -> Any:
    """Return a TypedDict that reads its `keys`, named by function; each may be null, which stands for the default."""
    types = {key: Annotated[Any, BeforeValidator(read)] for read, names in keys.items() for key in names.split()}
    return with_config(ConfigDict(extra="allow"))(TypedDict(name, types | others, total=False))  # type: ignore[operator]


_ROPE: dict[Callable[[Any], Any], str] = {  # of rope_scaling and rope_parameters
    _text: "rope_type type",
    _number: "rope_theta factor attention_factor beta_fast beta_slow mscale mscale_all_dim low_freq_factor "
    "high_freq_factor partial_rotary_factor",
    _integer: "original_max_position_embeddings",
    _flag: "truncate",
}
_CONFIG: dict[Callable[[Any], Any], str] = {
    _text: "model_type hidden_act",
    _texts: "architectures layer_types",
    _integer: "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "vocab_size max_position_embeddings sliding_window max_window_layers num_experts num_local_experts "
    "num_experts_per_tok moe_intermediate_size decoder_sparse_step",
    _integers: "mlp_only_layers",
    _tokens: "bos_token_id eos_token_id pad_token_id",
    _real: "rms_norm_eps initializer_range router_aux_loss_coef",
    _number: "attention_dropout rope_theta partial_rotary_factor",
    _flag: "attention_bias mlp_bias tie_word_embeddings use_cache use_sliding_window norm_topk_prob "
    "output_router_logits",
}
_RopeKeys = _typed("RopeKeys", _ROPE)
ConfigKeys = _typed("ConfigKeys", _CONFIG, rope_scaling=_RopeKeys | None, rope_parameters=_RopeKeys | None)
