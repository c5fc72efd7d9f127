"""The keys of a config.json that mean something here, with the types of their values.

A YAML file states them as text now and then (`1e-6` is text in YAML 1.1): such numbers are read as numbers. Other keys
pass as they are.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict
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


def _real(value: Any) -> float | None:
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


def _integers(value: Any) -> list[int | None] | None:
    if not isinstance(value, list | tuple | None):
        raise ValueError("expected a list of whole numbers")
    return None if value is None else [_integer(item) for item in value]


def _texts(value: Any) -> list[str | None] | None:
    if not isinstance(value, list | tuple | None):
        raise ValueError("expected a list of texts")
    return None if value is None else [_text(item) for item in value]


def _tokens(value: Any) -> Any:
    return _integers(value) if isinstance(value, list | tuple) else _integer(value)


# each may be null, which stands for the default
Number = Annotated[Any, BeforeValidator(_number)]
Real = Annotated[Any, BeforeValidator(_real)]  # transformers takes no whole number here
Integer = Annotated[Any, BeforeValidator(_integer)]
Flag = Annotated[Any, BeforeValidator(_flag)]
Text = Annotated[Any, BeforeValidator(_text)]
Integers = Annotated[Any, BeforeValidator(_integers)]
Texts = Annotated[Any, BeforeValidator(_texts)]
Tokens = Annotated[Any, BeforeValidator(_tokens)]


class RopeKeys(TypedDict, total=False):
    """Keys of rope_scaling and rope_parameters."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    rope_type: Text
    type: Text
    rope_theta: Number
    factor: Number
    attention_factor: Number
    beta_fast: Number
    beta_slow: Number
    mscale: Number
    mscale_all_dim: Number
    low_freq_factor: Number
    high_freq_factor: Number
    partial_rotary_factor: Number
    original_max_position_embeddings: Integer
    truncate: Flag


class ConfigKeys(TypedDict, total=False):
    """Keys of a config.json."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    model_type: Text
    architectures: Texts
    hidden_size: Integer
    intermediate_size: Integer
    num_hidden_layers: Integer
    num_attention_heads: Integer
    num_key_value_heads: Integer
    head_dim: Integer
    vocab_size: Integer
    max_position_embeddings: Integer
    hidden_act: Text
    rms_norm_eps: Real
    initializer_range: Real
    attention_dropout: Number
    attention_bias: Flag
    mlp_bias: Flag
    tie_word_embeddings: Flag
    use_cache: Flag
    rope_theta: Number
    rope_scaling: RopeKeys | None
    rope_parameters: RopeKeys | None
    partial_rotary_factor: Number
    use_sliding_window: Flag
    sliding_window: Integer
    max_window_layers: Integer
    layer_types: Texts
    num_experts: Integer
    num_local_experts: Integer
    num_experts_per_tok: Integer
    moe_intermediate_size: Integer
    decoder_sparse_step: Integer
    mlp_only_layers: Integers
    norm_topk_prob: Flag
    router_aux_loss_coef: Real
    output_router_logits: Flag
    bos_token_id: Tokens
    eos_token_id: Tokens
    pad_token_id: Tokens
