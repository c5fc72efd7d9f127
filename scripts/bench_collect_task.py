"""What bench_collect.py asks engines for: lengths and rewards by hash, the same for every version; and its account of
the groups that were drawn."""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import math
import re
import statistics
from collections.abc import Collection, Iterable
from typing import Any

SIGMA = 0.75  # of the lengths' logarithm: of 512 responses the longest has about 8 times the median
KEPT = 0.6  # of the groups have rewards that differ
PROBE_SEED = 0  # of the request with which rollout/probe.py follows a weight update
Key = tuple[int, int]  # of a group: its step's seed, its prompt


def uniform(*keys: object) -> float:
    """A number in (0, 1) that depends on the keys alone."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=7).digest()
    return min((int.from_bytes(digest, "big") + 0.5) / 2.0**56, 1 - 2.0**-53)


def response_tokens(median: float, limit: int, seed: int, prompt_id: int, sample: int) -> int:
    """A log-normal number of tokens from 1 to limit - 1. `seed`: of the step."""
    normal = statistics.NormalDist().inv_cdf(uniform("length", seed, prompt_id, sample))
    return max(1, min(limit - 1, round(median * math.exp(SIGMA * normal))))


def grade(response: str, answer: str) -> float:
    """0 or 1: in an informative group by the number of tokens, in another by the problem alone."""
    if uniform("informative", answer) >= KEPT:
        return float(uniform("score", answer) < 0.5)
    tokens = len(re.sub(r"<\w+>", ".", response))
    return float(uniform("score", answer, tokens) < 0.5)


def makespan(lengths: Iterable[int], slots: int) -> int:
    """When the last ends, if each of `slots` takes the next one as soon as it has ended its own."""
    ends = [0] * slots
    for length in lengths:
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)


@dataclasses.dataclass
class Group:
    """The responses to one prompt that one step asked for."""

    lengths: dict[int, int] = dataclasses.field(default_factory=dict)  # tokens by sample
    came: dict[int, int] = dataclasses.field(default_factory=dict)  # of those, how many came back

    def tokens(self) -> int:
        return sum(self.lengths.values())

    def whole(self) -> list[int]:
        """The samples that came back whole."""
        return [sample for sample, tokens in self.lengths.items() if self.came.get(sample, 0) >= tokens]

    def is_informative(self, answer: str) -> bool:
        return len({grade("." * tokens, answer) for tokens in self.lengths.values()}) > 1


class Book:
    """The groups asked for, in the order of the draw."""

    def __init__(self, median: float, limit: int) -> None:
        self._median, self._limit = median, limit
        self.groups: dict[Key, Group] = {}
        self.newest: dict[int, Key] = {}  # the key of a prompt's last group

    def needed(self, used: Collection[Key], answers: dict[int, str]) -> list[Key]:
        """The groups `used`, and the whole groups that taught nothing and were drawn before the last of those of the
        same step, in the order of the draw."""
        last = {key[0]: position for position, key in enumerate(self.groups) if key in used}
        keys = []
        for position, (key, group) in enumerate(self.groups.items()):
            taught_nothing = len(group.whole()) == len(group.lengths) and not group.is_informative(answers[key[1]])
            if key in used or (taught_nothing and position < last.get(key[0], -1)):
                keys.append(key)
        return keys

    def tokens(self, keys: Iterable[Key]) -> int:
        return sum(self.groups[key].tokens() for key in keys)

    def answered(self, request: Any, tokens: int) -> None:
        """Take down that an answer to a request, or to the rest of one, brought tokens."""
        if (key := self.newest.get(request.prompt_id)) and request.sampling.seed != PROBE_SEED:
            came = self.groups[key].came
            came[request.sample_index] = came.get(request.sample_index, 0) + tokens

    def in_whole(self) -> int:
        """Tokens of the responses that came back whole."""
        return sum(group.lengths[sample] for group in self.groups.values() for sample in group.whole())

    def in_order(self, keys: Iterable[Key], slots: int) -> int:
        """Token times of the groups when `slots` servers of one request take their responses in this order, and each
        step begins when the one before has ended."""
        steps: dict[int, list[int]] = {}
        for key in keys:
            steps.setdefault(key[0], []).extend(self.groups[key].lengths.values())
        return sum(makespan(lengths, slots) for lengths in steps.values())

    def shorten(self, request: Any) -> None:
        """Give a new training request its length: the only requests with the config's limit are new ones."""
        sampling = request.sampling
        if sampling.max_response_tokens == self._limit:
            key = (sampling.seed, request.prompt_id)
            tokens = response_tokens(self._median, self._limit, *key, request.sample_index)
            self.newest[request.prompt_id] = key
            self.groups.setdefault(key, Group()).lengths[request.sample_index] = tokens
            object.__setattr__(request, "sampling", dataclasses.replace(sampling, max_response_tokens=tokens))
