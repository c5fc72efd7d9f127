"""One step's rollouts: draw prompts, generate and grade each rank's share, gather, and drop groups that teach nothing.

Every rank draws the same prompts and decides on the same gathered rollouts, so all ranks return the same result and
leave the cursor at the same place. The collective itself comes in as `gather`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_rl.algorithms.hashing import hash64
from megatron_rl.data import PromptCursor
from megatron_rl.errors import UserError
from megatron_rl.reward import RewardFn, check_failures, filter_overlong, grade, shape_rewards
from megatron_rl.rollout.engine import Request, RolloutEngine, SamplingParams
from megatron_rl.types import Prompt, Rollout

if TYPE_CHECKING:
    from megatron_rl.config import Config

# takes this rank's rollouts, returns every rank's, in the order of ranks
Gather = Callable[[list[Rollout]], Sequence[list[Rollout]]]

# separate the seeds of training and evaluation
_TRAIN_STREAM, _EVAL_STREAM = 1, 2


class CollectError(RuntimeError, UserError):
    """A step's rollouts cannot be completed."""


@dataclass(frozen=True, slots=True)
class CollectResult:
    """A step's rollouts, the same on every rank."""

    rollouts: list[Rollout]  # samples_per_prompt per prompt, in the order of the draw, then by sample_index
    prompts_by_id: dict[int, Prompt]  # of those rollouts
    metrics: dict[str, float]  # over everything sampled in the step, dropped groups included


def collect(
    engine: RolloutEngine,
    cursor: PromptCursor,
    reward_fn: RewardFn,
    tokenizer: Any,
    config: Config,
    step: int,
    rank: int,
    world_size: int,
    gather: Gather,
) -> CollectResult:
    """`prompts_per_step` groups of graded rollouts with shaped rewards.

    With dynamic sampling, groups whose rewards are all equal are dropped and another generation batch of
    `prompts_per_step` prompts is drawn until enough are kept, at most `max_batches` times. Groups kept beyond
    `prompts_per_step` are discarded, the last drawn first, and counted in `sampling/surplus_groups`: their prompts
    come again in the next epoch.

    Raises: CollectError when `max_batches` did not suffice; DataError when the data set is too small; RewardError when
        gradings failed too often; EngineError.
    Source: dynamic sampling, arXiv 2503.14476, section 3.2.
    """
    wanted, dynamic = config.train.prompts_per_step, config.algorithm.dynamic_sampling
    sampling = sampling_params(config, tokenizer, step)
    drawn: dict[int, Prompt] = {}
    groups: list[list[Rollout]] = []
    kept: list[list[Rollout]] = []
    num_batches = 0
    while len(kept) < wanted:
        if num_batches == (dynamic.max_batches if dynamic.enabled else 1):
            raise CollectError(_shortage(groups, len(kept), num_batches, config))
        # a prompt that came twice in one step would form one group of equal samples: an epoch's end skips it
        prompts = cursor.take(wanted, exclude=drawn)
        drawn.update((prompt.prompt_id, prompt) for prompt in prompts)
        batch = generate_graded(
            engine, prompts, config.rollout.samples_per_prompt, sampling, reward_fn, tokenizer, rank, world_size, gather
        )
        groups += [shape_rewards(group, config) for group in batch]
        num_batches += 1
        check_failures([rollout for group in groups for rollout in group], config)
        kept = [group for group in groups if _informative(group)] if dynamic.enabled else groups
    metrics = rollout_metrics(groups) | {
        "sampling/num_batches": float(num_batches),
        "sampling/surplus_groups": float(len(kept) - wanted),
    }
    rollouts = filter_overlong([rollout for group in kept[:wanted] for rollout in group], config)
    return CollectResult(rollouts, {r.prompt_id: drawn[r.prompt_id] for r in rollouts}, metrics)


def evaluate_prompts(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    reward_fn: RewardFn,
    tokenizer: Any,
    config: Config,
    rank: int,
    world_size: int,
    gather: Gather,
) -> dict[str, float]:
    """Held-out accuracy with the weights that the engine has: the same on every rank, the same draws at every call.

    Raises: CollectError without prompts; EngineError; RewardError when gradings failed too often.
    """
    if not prompts:
        raise CollectError(
            "evaluation has no held-out problems; set data.num_eval or data.eval_path, or train.eval_every=0"
        )
    train, seed = config.train, _seed(config, _EVAL_STREAM, 0)
    sampling = SamplingParams(
        train.eval_temperature, 1.0, 0, config.rollout.max_response_tokens, stop_token_ids(config, tokenizer), seed
    )
    groups = generate_graded(
        engine, prompts, train.eval_samples, sampling, reward_fn, tokenizer, rank, world_size, gather
    )
    rollouts = [rollout for group in groups for rollout in group]
    check_failures(rollouts, config)
    return {
        "eval/accuracy": _mean([rollout.score for rollout in rollouts]),
        "eval/pass_at_n": _mean([max(rollout.score for rollout in group) for group in groups]),
        "eval/length_mean": _mean([rollout.response_length for rollout in rollouts]),
        "eval/truncated_fraction": _mean([rollout.finish_reason == "length" for rollout in rollouts]),
        "eval/failed_fraction": _mean([bool(rollout.error) for rollout in rollouts]),
    }


def generate_graded(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    samples_per_prompt: int,
    sampling: SamplingParams,
    reward_fn: RewardFn,
    tokenizer: Any,
    rank: int,
    world_size: int,
    gather: Gather,
) -> list[list[Rollout]]:
    """One group of scored rollouts per prompt, in the prompts' order, the same on every rank.

    This rank generates and grades an equal, contiguous part of the (prompt, sample) pairs, so most groups stay whole
    and share one prefill.
    """
    requests = [Request(p.prompt_id, i, p.token_ids, sampling) for p in prompts for i in range(samples_per_prompt)]
    share = requests[len(requests) * rank // world_size : len(requests) * (rank + 1) // world_size]
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    graded = grade(engine.generate(share), by_id, reward_fn, tokenizer)
    everything = {(r.prompt_id, r.sample_index): r for part in gather(graded) for r in part}
    if len(everything) != len(requests):
        raise CollectError(
            f"gathered {len(everything)} rollouts for {len(requests)} requests: ranks drew other prompts"
        )
    return [[everything[p.prompt_id, i] for i in range(samples_per_prompt)] for p in prompts]


def sampling_params(config: Config, tokenizer: Any, step: int) -> SamplingParams:
    """How training rollouts of RL step `step` are sampled. Raises: CollectError without a stop token."""
    rollout = config.rollout
    stops, seed = stop_token_ids(config, tokenizer), _seed(config, _TRAIN_STREAM, step)
    return SamplingParams(rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_response_tokens, stops, seed)


def stop_token_ids(config: Config, tokenizer: Any) -> tuple[int, ...]:
    """`rollout.stop_token_ids`, or the tokenizer's end-of-sequence token. Raises: CollectError without either."""
    if config.rollout.stop_token_ids is not None:
        return config.rollout.stop_token_ids
    if tokenizer.eos_token_id is None:
        raise CollectError(
            "the tokenizer has no end-of-sequence token; set rollout.stop_token_ids ([] to stop nowhere)"
        )
    return (tokenizer.eos_token_id,)


def rollout_metrics(groups: Sequence[Sequence[Rollout]]) -> dict[str, float]:
    """Plain means over the rollouts, and fractions of the groups; lengths in tokens, fractions in [0, 1].

    `all_correct` groups score at least 1 throughout, `all_wrong` at most 0; the kept fraction is of groups whose
    rewards differ.
    """
    rollouts = [rollout for group in groups for rollout in group]
    rewards, lengths = [r.reward for r in rollouts], [r.response_length for r in rollouts]
    mean = _mean(rewards)
    return {
        "reward/mean": mean,
        "reward/std": math.sqrt(_mean([(reward - mean) ** 2 for reward in rewards])),
        "reward/accuracy": _mean([r.score for r in rollouts]),
        "reward/failed_fraction": _mean([bool(r.error) for r in rollouts]),
        "response/length_mean": _mean(lengths),
        "response/length_max": float(max(lengths)),
        "response/length_min": float(min(lengths)),
        "response/truncated_fraction": _mean([r.finish_reason == "length" for r in rollouts]),
        "sampling/kept_group_fraction": _mean([_informative(group) for group in groups]),
        "sampling/all_correct_fraction": _mean([all(r.score >= 1 for r in group) for group in groups]),
        "sampling/all_wrong_fraction": _mean([all(r.score <= 0 for r in group) for group in groups]),
    }


def _informative(group: Sequence[Rollout]) -> bool:
    return any(rollout.reward != group[0].reward for rollout in group)


def _seed(config: Config, stream: int, step: int) -> int:
    # 63 bits, because engines behind HTTP take no negative seed
    return int(hash64(config.seed, stream, step)) & (2**63 - 1)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _shortage(groups: Sequence[Sequence[Rollout]], kept: int, num_batches: int, config: Config) -> str:
    metrics = rollout_metrics(groups)
    return (
        f"dynamic sampling kept {kept} of {len(groups)} groups after {num_batches} generation batches, "
        f"train.prompts_per_step={config.train.prompts_per_step} are needed: all correct "
        f"{metrics['sampling/all_correct_fraction']:.3f}, all wrong {metrics['sampling/all_wrong_fraction']:.3f} of "
        f"the groups. Raise algorithm.dynamic_sampling.max_batches ({config.algorithm.dynamic_sampling.max_batches}) "
        "or rollout.samples_per_prompt, use problems of fitting difficulty, or turn dynamic sampling off"
    )
