"""From response text to reward: the verifiers, their failures, and the penalties on overlong responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from megatron_rl.data.problems import say_unreadable
from megatron_rl.grading.pool import GradingPool
from megatron_rl.grading.registry import COMPARED_AS_TEXT, RewardError, load_reward
from megatron_rl.grading.verdict import Grader, InProcess, Verdict, Verifier
from megatron_rl.types import Rollout

if TYPE_CHECKING:
    from megatron_rl.config import Config
    from megatron_rl.config.reward import RewardConfig


def build_grader(config: RewardConfig) -> Grader:
    """The grading processes of this rank, or none. Raises: RewardError when a reward function cannot be loaded."""
    verifiers = [Verifier(verifier.function, verifier.options) for verifier in (config, *config.terms)]
    if config.processes == 0:
        return InProcess([load_reward(verifier.function, verifier.options) for verifier in verifiers])
    return GradingPool(
        verifiers,
        workers=config.processes,
        deadline_seconds=config.deadline_seconds,
        memory_gib=config.memory_gib,
    )


def reads_gold(config: RewardConfig) -> Callable[[str], bool]:
    """Return what tells whether the verifier understands a gold answer, or takes it as text alone, so that only a
    response with the same text is right."""
    as_text = COMPARED_AS_TEXT.get(config.function)
    return lambda answer: as_text is None or not as_text(answer)


def say_text_only(where: object, answers: Sequence[str], config: RewardConfig) -> None:
    """Tell how many gold answers of a set the verifier takes as text alone, and show the first."""
    reads = reads_gold(config)
    say_unreadable(where, [repr(answer[:100]) for answer in answers if not reads(answer)], len(answers))


def response_text(rollout: Rollout, tokenizer: Any) -> str:
    """Return what the verifiers see: the response without the stop token that ended it. Other special tokens keep
    their text, so that a policy cannot hide words in tokens that decoding drops. Token ids without a text, as those
    that pad a model's vocabulary beyond its tokenizer's, add nothing: they hide no words either."""
    token_ids = rollout.response_ids.tolist()
    if rollout.finish_reason == "stop":
        token_ids = token_ids[:-1]
    return tokenizer.decode(token_ids)


def graded(rollout: Rollout, verdict: Verdict) -> Rollout:
    """Return the rollout with what the verifiers said; `reward` is the score until `shape_rewards`."""
    score, *terms = verdict.values
    problems = {"error": verdict.error, "unfinished": verdict.unfinished}
    return rollout.replace(score=score, reward=score, terms=tuple(terms), **problems)


def check_failures(rollouts: Sequence[Rollout], config: Config) -> None:
    """Ends the run when too many gradings of one step failed; give it the rollouts of all ranks.

    A response that hangs or crashes the verifier is the policy's doing and costs that response alone, unless every
    response does: then nothing is left to learn from.
    Raises: RewardError with the number, the first traceback and the remedy.
    """
    reward = config.reward
    failed = [rollout for rollout in rollouts if rollout.error]
    if len(failed) > reward.max_failures * len(rollouts):
        first = failed[0]
        raise RewardError(
            f"the reward function {reward.function} failed on {len(failed)} of {len(rollouts)} responses, more "
            f"than reward.max_failures={reward.max_failures} allows; mend it, or raise that limit (failures "
            f"score 0). First, prompt {first.prompt_id}, sample {first.sample_index}:\n{first.error}"
        )
    if rollouts and all(rollout.unfinished for rollout in rollouts):
        crashes = sum(rollout.unfinished == "crash" for rollout in rollouts)
        raise RewardError(
            f"the reward function {reward.function} finished on none of {len(rollouts)} responses: {crashes} times its "
            f"process died, the other times reward.deadline_seconds={reward.deadline_seconds:g} was over; mend it, or "
            "raise that limit or reward.memory_gib"
        )


def shape_rewards(rollouts: Sequence[Rollout], config: Config) -> list[Rollout]:
    """`reward = weight * score + terms + length reward + overlong penalty`, for whole groups of rollouts."""
    reward = config.reward
    lengths = _length_rewards(rollouts) if reward.length_weight else [0.0] * len(rollouts)
    return [
        rollout.replace(
            reward=reward.weight * rollout.score
            + sum(term.weight * value for term, value in zip(reward.terms, rollout.terms, strict=True))
            + reward.length_weight * length
            - _overlong_penalty(rollout, config)
        )
        for rollout, length in zip(rollouts, lengths, strict=True)
    ]


def _length_rewards(rollouts: Sequence[Rollout]) -> list[float]:
    """Return values in [-0.5, 0.5], from the longest response of the prompt to the shortest; at most 0 for wrong ones
    (score below 1). 0 when all are of one length.

    Source: Kimi k1.5, arXiv 2501.12599, section 2.3.3.
    """
    lengths: dict[int, list[int]] = {}
    for rollout in rollouts:
        lengths.setdefault(rollout.prompt_id, []).append(rollout.response_length)
    rewards = []
    for rollout in rollouts:
        shortest, longest = min(lengths[rollout.prompt_id]), max(lengths[rollout.prompt_id])
        value = 0.5 - (rollout.response_length - shortest) / (longest - shortest) if longest > shortest else 0.0
        rewards.append(value if rollout.score >= 1 else min(0.0, value))
    return rewards


def _overlong_penalty(rollout: Rollout, config: Config) -> float:
    """DAPO's soft overlong penalty. With L the response limit and b the buffer: 0 up to L - b tokens, then linear to
    the factor at L. b = 0 turns it off.

    Source: arXiv 2503.14476, equation 13.
    """
    limit, overlong = config.rollout.max_response_tokens, config.algorithm.overlong
    if overlong.penalty_buffer == 0:
        return 0.0
    excess = max(0, rollout.response_length - (limit - overlong.penalty_buffer))
    return overlong.penalty_factor * excess / overlong.penalty_buffer


def filter_overlong(rollouts: Sequence[Rollout], config: Config) -> list[Rollout]:
    """Return the rollouts; with `overlong.filter`, those that were cut no longer count: no loss, no share of the
    denominators.

    Their rewards stay, so the other samples of the prompt are still compared with them.
    """
    if not config.algorithm.overlong.filter:
        return list(rollouts)
    return [rollout.replace(counts=False) if rollout.finish_reason == "length" else rollout for rollout in rollouts]
