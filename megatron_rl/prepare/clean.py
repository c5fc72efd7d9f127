"""Duplicates and contradictions.

Three degrees of sameness of two problems:

- *text*: the same characters, but for white space at the ends;
- *spelling*: the same letters, digits and operators in the same order, whatever the spacing, punctuation, case and
  LaTeX around them;
- *near*: at least `threshold` of their word triples in common (Jaccard), the same numbers as often, the same answer.
  Problems that differ in a number are different, however alike they read: no threshold on the text alone would do.

A problem is all that is said of it: earlier turns of a conversation count, system messages and suffixes do not.
"""

import contextlib
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from megatron_rl.data.rows import Row
from megatron_rl.grading.pool import GradingPool
from megatron_rl.grading.verdict import Verifier

Agree = Callable[[Iterable[str]], bool]

_WORD = re.compile(r"[^\W\d_]+|\d+")
_NUMBER = re.compile(r"\d+")
_INTEGER = re.compile(r"[+-]?\d{1,400}")
_DROPPED_BY_SPELLING = re.compile(r"[^\w+\-*/^=<>!]|_")
_SHINGLE = 3  # words
_SECONDS = 10.0  # for two answers to be compared
_VERIFIER = "math"  # compares them


def text_key(row: Row) -> str:
    """Return what problems of the same text share."""
    return row.text.strip()


def spelling_key(row: Row) -> str:
    """Return what problems share that differ in spelling at most."""
    return _DROPPED_BY_SPELLING.sub("", row.text.casefold())


def words(text: str) -> list[str]:
    """Return the runs of letters and the runs of digits, in lower case."""
    return _WORD.findall(text.casefold())


def numbers(text: str) -> tuple[tuple[str, int], ...]:
    """Return (number, how often it occurs) for each run of digits, sorted."""
    return tuple(sorted(Counter(_NUMBER.findall(text)).items()))


@dataclass(frozen=True)
class Removed:
    """What a pass took out."""

    duplicates: tuple[Row, ...]
    contradictory: tuple[Row, ...]  # all copies of a problem that comes with different answers
    contradictory_problems: int


def remove_repeated(
    rows: Sequence[Row], key: Callable[[Row], str], agree: Agree, known: Collection[str] = ()
) -> tuple[list[Row], Removed]:
    """Return the first copy of each problem, in order, and what was removed: further copies, and all copies of a
    problem whose answers do not agree, or whose key is `known` to come with such answers."""
    copies: dict[str, list[Row]] = {}
    for row in rows:
        copies.setdefault(key(row), []).append(row)
    contradictory = {k for k, same in copies.items() if k in known or not agree(row.answer for row in same)}
    kept, duplicates = [], []
    for k, same in copies.items():  # in the order of their first copies
        if k not in contradictory:
            kept.append(same[0])
            duplicates += same[1:]
    dropped = tuple(row for k, same in copies.items() if k in contradictory for row in same)
    return kept, Removed(tuple(duplicates), tuple(sorted(dropped, key=key)), len(contradictory))


@contextlib.contextmanager
def comparing_answers() -> Iterator[Agree]:
    """Give a function that says whether all answers are equal: as texts, as integers, or as mathematics.

    Mathematics may never end, so it is done in a process with a deadline, started when it is first needed; answers that
    reach the deadline do not agree.
    """
    with contextlib.ExitStack() as stack:
        pools: list[GradingPool] = []

        def equal(a: str, b: str) -> bool:
            if _INTEGER.fullmatch(a) and _INTEGER.fullmatch(b):
                return int(a) == int(b)
            if not pools:
                pools.append(GradingPool([Verifier(_VERIFIER, {})], workers=1, deadline_seconds=_SECONDS))
                stack.callback(pools[0].close)
            return pools[0].submit(f"\\boxed{{{a}}}", b).result().values[0] == 1

        def agree(answers: Iterable[str]) -> bool:
            first, *others = dict.fromkeys(answers)
            return all(equal(other, first) for other in others)

        yield agree


def remove_near(rows: Sequence[Row], threshold: float) -> tuple[list[Row], tuple[Row, ...]]:
    """Return (kept, removed), both in order: without the near duplicates of earlier rows."""
    blocks: dict[tuple[object, ...], list[int]] = {}
    for i, row in enumerate(rows):
        blocks.setdefault((numbers(row.text), row.answer.strip()), []).append(i)
    near = set[int]()
    for members in blocks.values():
        index = NearTexts(threshold, [rows[i].text for i in members] if len(members) > 1 else [])
        for place, i in enumerate(members[: len(index.shingles)]):
            if any(True for _ in index.like(index.shingles[place])):
                near.add(i)
            else:
                index.add(place)
    kept = [row for i, row in enumerate(rows) if i not in near]
    return kept, tuple(rows[i] for i in sorted(near))


class NearTexts:
    """Texts to be found by their word triples: exactly those whose Jaccard similarity reaches the threshold.

    Two such texts share one of the rarest triples of each, so only texts that do are compared (prefix filtering:
    Chaudhuri, Ganti and Kaushik, ICDE 2006).
    """

    def __init__(self, threshold: float, texts: Iterable[str]) -> None:
        """Learn what is rare among `texts`; each is found by its place among them, once added. `threshold`: above 0."""
        self._threshold = threshold
        self.shingles = [shingles(text) for text in texts]
        self._counts = Counter(shingle for some in self.shingles for shingle in some)
        self._by_shingle: dict[str, list[int]] = {}

    def add(self, place: int) -> None:
        """Let a text be found from now on."""
        for shingle in self._rarest(self.shingles[place]):
            self._by_shingle.setdefault(shingle, []).append(place)

    def like(self, given: frozenset[str]) -> Iterator[int]:
        """Yield the places of the texts that are near one of these triples."""
        compared: set[int] = set()
        for shingle in self._rarest(given):
            for place in self._by_shingle.get(shingle, ()):
                if place not in compared:
                    compared.add(place)
                    if _jaccard(given, self.shingles[place]) >= self._threshold:
                        yield place

    def _rarest(self, given: frozenset[str]) -> list[str]:
        # near texts share threshold * len of them or more, so at least one of these; 0.7 * 10 is 7.000000000000001
        count = len(given) - math.ceil(self._threshold * len(given) - 1e-9) + 1
        return sorted(given, key=lambda shingle: (self._counts[shingle], shingle))[:count]


def shingles(text: str) -> frozenset[str]:
    """Return the triples of successive words; of a shorter text all its words as one."""
    tokens = words(text)
    return frozenset(" ".join(tokens[i : i + _SHINGLE]) for i in range(max(1, len(tokens) - _SHINGLE + 1)))


def _jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)
