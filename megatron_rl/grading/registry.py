"""The verifiers by name, and how a user's own is found."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from megatron_rl.errors import UserError
from megatron_rl.grading.math_answer import math
from megatron_rl.grading.remote import remote
from megatron_rl.grading.rules import countdown, exact, format, regex

RewardFn = Callable[[str, str], float]

# keyword arguments are the options in the config's section of the same name
REWARDS: dict[str, Callable[..., float]] = {
    "countdown": countdown,
    "exact": exact,
    "math": math,
    "regex": regex,
    "format": format,
    "remote": remote,
}


class RewardError(RuntimeError, UserError):
    """The reward function cannot be loaded, or failed too often."""


def load_reward(name: str, options: Mapping[str, Any] | None = None) -> RewardFn:
    """The verifier called `name` in REWARDS with its options, or the function found at `module:function`.

    Raises: RewardError when the module or the function is missing, it cannot be called, or not with (response, answer).
    """
    if name == "math":
        _check_math_verify()
    if name in REWARDS:
        return functools.partial(REWARDS[name], **options) if options else REWARDS[name]
    module_name, separator, attribute = name.partition(":")
    if not separator or not module_name or not attribute:
        known = ", ".join(REWARDS)
        raise RewardError(
            f"reward.function={name!r}: expected one of {known}, or module:function such as my_rewards:math"
        )
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise RewardError(
            f"reward.function={name!r}: importing {module_name} failed with {type(error).__name__}: {error}; put the "
            "folder of that module on PYTHONPATH, and see that it imports in this environment"
        ) from error
    function = getattr(module, attribute, None)
    if function is None:
        near = difflib.get_close_matches(attribute, dir(module), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RewardError(f"reward.function={name!r}: module {module_name} has no {attribute!r}{hint}")
    if not callable(function):
        raise RewardError(f"reward.function={name!r}: expected a function, got {type(function).__name__}")
    try:
        inspect.signature(function).bind("response", "answer")
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"reward.function={name!r}: it must be callable with two texts, (response, answer), but: {error}"
        ) from error
    return function


def _check_math_verify() -> None:
    """Import what `math` needs, so that no answer's deadline pays for it. Raises: RewardError when it is missing."""
    try:
        import latex2sympy2_extended  # noqa: F401
        import math_verify  # noqa: F401
    except ImportError as error:
        raise RewardError(
            f"reward.function='math': {error}; install it with: pip install 'math-verify[antlr4_13_2]==0.9.0'"
        ) from error
