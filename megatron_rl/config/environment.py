"""Environment variables: those that a config's texts name (`${MEGATRON_RL_NAME:-default}`: where a site keeps its
models, data and runs), and those that a config sets for its ranks."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_rl.config.sections import Config

# one prefix, so that no text of a prompt is taken for a variable
_VARIABLE = re.compile(r"\$\{(MEGATRON_RL_[A-Z0-9_]+)(?::-([^}]*))?\}")


class UnsetVariable(ValueError):
    """A variable without default is not in the environment."""


def expand(value: Any, environment: Mapping[str, str] = os.environ) -> Any:
    """Return `value` with the variables in all its texts replaced; an empty variable counts as unset, as in a shell.

    Raises: UnsetVariable naming it.
    """
    if isinstance(value, dict):
        return {key: expand(item, environment) for key, item in value.items()}
    if isinstance(value, list):
        return [expand(item, environment) for item in value]
    return _VARIABLE.sub(lambda found: _value(found, environment), value) if isinstance(value, str) else value


def _value(found: re.Match[str], environment: Mapping[str, str]) -> str:
    name, default = found.groups()
    value = environment.get(name) or default
    if value is None:
        raise UnsetVariable(
            f"{found[0]}: the environment variable {name} is not set; set it, or write ${{{name}:-default}}"
        )
    return value


def for_libraries(config: Config) -> dict[str, str]:
    """Return what the ranks' libraries shall read when they start, which on a GPU is before its first use."""
    settings = {}
    if config.model.dtype == "float32":
        settings["NVIDIA_TF32_OVERRIDE"] = "0"  # Transformer Engine's products would be TF32: 10 bits
    if config.train.deterministic:
        settings |= {
            "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",  # Transformer Engine's attention
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            "NCCL_ALGO": "Ring",
        }
    return settings
