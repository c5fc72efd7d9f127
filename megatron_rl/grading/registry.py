"""The verifiers by name, and how a user's own is found."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from megatron_rl.algorithms.section import load_named
from megatron_rl.errors import UserError
from megatron_rl.grading.math_answer import compared_as_text, math
from megatron_rl.grading.rules import countdown, exact, format, regex, remote

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

# by verifier: whether a gold answer is understood by none of its readings, so that only the same text can be right
COMPARED_AS_TEXT: dict[str, Callable[[str], bool]] = {"math": compared_as_text}


class RewardError(RuntimeError, UserError):
    """The reward function cannot be loaded, or failed too often."""


def load_reward(name: str, options: Mapping[str, Any] | None = None) -> RewardFn:
    """The verifier called `name` in REWARDS with its options, or the function found at `module:function`.

    Raises: RewardError when the module or the function is missing, it cannot be called, or not with (response, answer).
    """
    if name in REWARDS:
        return functools.partial(REWARDS[name], **options) if options else REWARDS[name]
    where = f"reward.function={name!r}"
    try:
        function = load_named(name, REWARDS, "module:function such as my_rewards:math")
    except ValueError as error:
        raise RewardError(f"{where}: {error}") from error
    try:
        inspect.signature(function).bind("response", "answer")
    except (TypeError, ValueError) as error:
        raise RewardError(f"{where}: it must be callable with two texts, (response, answer), but: {error}") from error
    return function
