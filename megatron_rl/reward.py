"""From response text to reward: the verifiers, their failures, and the penalties on overlong responses."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import json
import math
import numbers
import re
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch

from megatron_rl.errors import UserError
from megatron_rl.types import Prompt, Rollout

if TYPE_CHECKING:
    from megatron_rl.config import Config

RewardFn = Callable[[str, str], float]

# far above any sensible answer (six numbers need 17 characters and a few parentheses); bounds the parser's work and
# depth
_MAX_EXPRESSION = 128
_ARITHMETIC = re.compile(r"[0-9+\-*/() ]+")
# the error text travels to every rank with its rollout
_MAX_ERROR = 2000


class RewardError(RuntimeError, UserError):
    """The reward function cannot be loaded, or failed too often."""


def countdown(response: str, answer: str) -> float:
    """1.0 if the response is an expression that uses each given number exactly once and equals the target, else 0.0.

    Allowed are binary + - * /, parentheses, spaces and decimal integers: no unary sign, no power, no leading zero.
    Exact rational arithmetic, so "1/3*3" is 1. `answer` is JSON {"numbers": [...], "target": n}.

    Raises: ValueError or KeyError when `answer` is not such JSON.
    Source: the rules of reasoning-gym's countdown scorer, made binary.
    """
    problem = json.loads(answer)
    numbers_given, target = Counter(problem["numbers"]), problem["target"]
    if len(response) > _MAX_EXPRESSION or not _ARITHMETIC.fullmatch(response):
        return 0.0
    used: Counter[int] = Counter()
    try:
        value = _evaluate(ast.parse(response.strip(), mode="eval").body, used)
    except (SyntaxError, ZeroDivisionError, RecursionError, MemoryError):
        # what the parser and the arithmetic say to a wrong answer; MemoryError is CPython's word for too deep nesting
        return 0.0
    return float(value == target and used == numbers_given)


def _evaluate(node: ast.expr, used: Counter[int]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used[node.value] += 1
        return Fraction(node.value)
    if not isinstance(node, ast.BinOp):
        raise SyntaxError("not binary arithmetic on integers")
    left, right = _evaluate(node.left, used), _evaluate(node.right, used)
    match node.op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div():
            return left / right
    raise SyntaxError("only + - * /")


def exact(response: str, answer: str) -> float:
    """1.0 if the texts agree but for surrounding white space, else 0.0."""
    return float(response.strip() == answer.strip())


REWARDS: dict[str, RewardFn] = {"countdown": countdown, "exact": exact}


def load_reward(name: str) -> RewardFn:
    """The reward function called `name` in REWARDS, or found at `module:function`.

    Raises: RewardError when the module or the function is missing, it cannot be called, or not with (response, answer).
    """
    if name in REWARDS:
        return REWARDS[name]
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


def grade(
    rollouts: Sequence[Rollout], prompts_by_id: Mapping[int, Prompt], reward_fn: RewardFn, tokenizer: Any
) -> list[Rollout]:
    """The rollouts with `score` set, and `reward` equal to it.

    The function sees the response without the stop token that ended it; any other special token stays visible, so that
    a policy cannot hide text in tokens that decoding drops. A function that raises, or returns anything but a finite
    number, scores 0.0 and leaves its traceback in `error`: `check_failures` decides whether the run may go on.
    """
    graded = []
    for rollout in rollouts:
        token_ids = rollout.token_ids[rollout.loss_mask].tolist()
        if rollout.finish_reason == "stop":
            token_ids = token_ids[:-1]
        score, error = _score(reward_fn, tokenizer.decode(token_ids), prompts_by_id[rollout.prompt_id].answer)
        graded.append(rollout.replace(score=score, reward=score, error=error))
    return graded


def _score(reward_fn: RewardFn, response: str, answer: str) -> tuple[float, str]:
    try:
        value: Any = reward_fn(response, answer)
    except Exception:
        return 0.0, traceback.format_exc()[-_MAX_ERROR:]
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        error = f"the reward function returned {value!r} ({type(value).__name__}), expected a finite number"
        return 0.0, error[:_MAX_ERROR]
    return float(value), ""


def check_failures(rollouts: Sequence[Rollout], config: Config) -> None:
    """Ends the run when too many gradings of one step failed; give it the rollouts of all ranks.

    Raises: RewardError with the number, the first traceback and the remedy.
    """
    failed = [rollout for rollout in rollouts if rollout.error]
    if len(failed) > config.reward.max_failures * len(rollouts):
        first = failed[0]
        raise RewardError(
            f"the reward function {config.reward.function} failed on {len(failed)} of {len(rollouts)} responses, more "
            f"than reward.max_failures={config.reward.max_failures} allows; mend it, or raise that limit (failures "
            f"score 0). First, prompt {first.prompt_id}, sample {first.sample_index}:\n{first.error}"
        )


def shape_rewards(rollouts: Sequence[Rollout], config: Config) -> list[Rollout]:
    """`reward = score + penalty`, with DAPO's soft overlong penalty on the response's length in tokens.

    With L the response limit and b the buffer: 0 up to L - b, then linear to -factor at L. b = 0 turns it off.
    Source: arXiv 2503.14476, equation 13.
    """
    limit, overlong = config.rollout.max_response_tokens, config.algorithm.overlong
    if overlong.penalty_buffer == 0:
        return [rollout.replace(reward=rollout.score) for rollout in rollouts]
    shaped = []
    for rollout in rollouts:
        excess = max(0, rollout.response_length - (limit - overlong.penalty_buffer))
        shaped.append(
            rollout.replace(reward=rollout.score - overlong.penalty_factor * excess / overlong.penalty_buffer)
        )
    return shaped


def filter_overlong(rollouts: Sequence[Rollout], config: Config) -> list[Rollout]:
    """With `overlong.filter`, responses that were cut get an all-False loss mask: no loss, no share of the
    denominators.

    Their rewards stay, so the other samples of the group are still compared with them. `response_length` is 0
    afterwards: take length metrics before.
    """
    if not config.algorithm.overlong.filter:
        return list(rollouts)
    return [
        rollout.replace(loss_mask=torch.zeros_like(rollout.loss_mask)) if rollout.finish_reason == "length" else rollout
        for rollout in rollouts
    ]
