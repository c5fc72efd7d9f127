"""The keys of a config.json that mean something here, with the types of their values (assets/keys.yaml).

A YAML file states them as text now and then (`1e-6` is text in YAML 1.1): such numbers are read as numbers. Other keys
pass as they are.
"""

import math
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, with_config
from typing_extensions import TypedDict

from megatron_rl.files import read_asset


def _number(value: Any) -> int | float | None:
    if isinstance(value, str):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        raise ValueError("expected a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("expected a finite number")
    return value


def _tokens(value: Any) -> Any:  # one or several
    return [_number(item) for item in value] if isinstance(value, list) else _number(value)


_Integer = Annotated[int | None, BeforeValidator(_number)]
# each may be null, which stands for the default
_TYPES: dict[str, Any] = {
    "text": str | None,
    "texts": list[str] | None,
    "flag": bool | None,
    "number": Annotated[Any, BeforeValidator(_number)],
    "real": Annotated[float | None, BeforeValidator(_number)],  # transformers takes no whole number here
    "integer": _Integer,
    "integers": list[_Integer] | None,
    "tokens": Annotated[Any, BeforeValidator(_tokens)],
}


def _typed(part: str, **others: Any) -> Any:
    """Return a TypedDict with the keys of a part of keys.yaml."""
    stated = read_asset(__file__, "keys.yaml")[part]
    types = {key: _TYPES[kind] for kind, keys in stated.items() for key in keys}
    return with_config(ConfigDict(extra="allow"))(TypedDict(part, types | others, total=False))  # type: ignore[operator]


_Rope = _typed("rope") | None
ConfigKeys = _typed("config", rope_scaling=_Rope, rope_parameters=_Rope)
