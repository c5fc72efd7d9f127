"""What a step's rollouts were like, and what they cost: the metrics of rollout/collect.py."""

import itertools
import math
from collections.abc import Sequence
from statistics import fmean

from megatron_rl.rollout.engine import Cost
from megatron_rl.rollout.window import Group
from megatron_rl.types import Rollout

_MOST = 0.9  # of the responses: what comes after them is the tail


def rollout_metrics(groups: Sequence[Sequence[Rollout]]) -> dict[str, float]:
    """Plain means over the rollouts, and fractions of the groups; lengths in tokens, fractions in [0, 1].

    `all_correct` groups score at least 1 throughout, `all_wrong` at most 0; the kept fraction is of groups whose
    rewards differ.
    """
    rollouts = [rollout for group in groups for rollout in group]
    rewards, lengths = [r.reward for r in rollouts], [r.response_length for r in rollouts]
    mean = fmean(rewards)
    return {
        "reward/mean": mean,
        "reward/std": math.sqrt(fmean([(reward - mean) ** 2 for reward in rewards])),
        "reward/accuracy": fmean([r.score for r in rollouts]),
        "reward/failed_fraction": fmean([bool(r.error) for r in rollouts]),
        "reward/unfinished_fraction": fmean([bool(r.unfinished) for r in rollouts]),
        "response/length_mean": fmean(lengths),
        "response/length_max": float(max(lengths)),
        "response/length_min": float(min(lengths)),
        "response/truncated_fraction": fmean([r.finish_reason == "length" for r in rollouts]),
        "sampling/kept_group_fraction": fmean([is_informative(group) for group in groups]),
        "sampling/all_correct_fraction": fmean([all(r.score >= 1 for r in group) for group in groups]),
        "sampling/all_wrong_fraction": fmean([all(r.score <= 0 for r in group) for group in groups]),
    }


def staleness_metrics(rollouts: Sequence[Rollout], step: int, num_stale: int) -> dict[str, float]:
    """Age of the weights that sampled the step's tokens, in steps; means over tokens or rollouts.

    `interrupted_fraction`: rollouts that a weight update met half-way; `discarded`: rollouts asked for again because
    they began too long ago.
    """
    ages = [(step - version, count) for rollout in rollouts for version, count in rollout.spans]
    return {
        "staleness/mean": sum(age * count for age, count in ages) / sum(count for _, count in ages),
        "staleness/max": float(max(age for age, _ in ages)),
        "staleness/interrupted_fraction": fmean([len(rollout.spans) > 1 for rollout in rollouts]),
        "staleness/discarded": float(num_stale),
    }


def cost_metrics(costs: Sequence[Cost], groups: Sequence[Group], began: float, ended: float) -> dict[str, float]:
    """Return what the servers did for all ranks between two times, time.time(), on which the nodes' clocks must agree;
    nothing without servers.

    `idle_seconds`: in which a server had no request of this run, mean over servers; `tail_seconds`: after 90% of the
    step's responses had come; `prefix_hit_fraction`: of the prompts' tokens, with keys and values at hand.
    """
    idle = [ended - began - _length(stretches, began, ended) for stretches in busy_times(costs).values()]
    arrived = sorted(itertools.chain(*(group.arrived for group in groups)))
    if not idle or not arrived:
        return {}
    cached, prompts = (sum(tokens) for tokens in zip(*((c.cached_tokens, c.prompt_tokens) for c in costs), strict=True))
    return {
        "rollout/idle_seconds": fmean(idle),
        "rollout/tail_seconds": arrived[-1] - arrived[math.ceil(_MOST * len(arrived)) - 1],
        "rollout/prefix_hit_fraction": cached / max(1, prompts),
    }


def busy_times(costs: Sequence[Cost]) -> dict[str, list[tuple[float, float]]]:
    """Return the stretches of time in which a server had a request of some rank, in order and apart, by address."""
    busy: dict[str, list[tuple[float, float]]] = {}
    for address in dict.fromkeys(address for cost in costs for address in cost.busy):
        apart: list[tuple[float, float]] = []
        for start, end in sorted(itertools.chain(*(cost.busy.get(address, ()) for cost in costs))):
            if apart and start <= apart[-1][1]:
                apart[-1] = apart[-1][0], max(end, apart[-1][1])
            else:
                apart.append((start, end))
        busy[address] = apart
    return busy


def _length(stretches: Sequence[tuple[float, float]], began: float, ended: float) -> float:
    return sum(max(0.0, min(end, ended) - max(start, began)) for start, end in stretches)


def is_informative(group: Sequence[Rollout]) -> bool:
    """Tell whether the rewards of a group differ: else all its advantages are 0."""
    return any(rollout.reward != group[0].reward for rollout in group)
