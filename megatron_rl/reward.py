"""From response text to reward: the verifiers, their failures, and the penalties on overlong responses."""

from __future__ import annotations

import math
import numbers
import traceback
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from megatron_rl.grading.registry import REWARDS as REWARDS
from megatron_rl.grading.registry import RewardError, RewardFn
from megatron_rl.grading.registry import load_reward as load_reward
from megatron_rl.types import Prompt, Rollout

if TYPE_CHECKING:
    from megatron_rl.config import Config

# the error text travels to every rank with its rollout
_MAX_ERROR = 2000


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
