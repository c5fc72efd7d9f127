"""Duplicates, contradictions, and overlap with evaluation sets.

Three degrees of sameness of two problems:

- *text*: the same characters, but for white space at the ends;
- *spelling*: the same letters, digits and operators in the same order, whatever the spacing, punctuation, case and
  LaTeX around them;
- *near*: at least `threshold` of their word triples in common (Jaccard), the same numbers as often, the same answer.
  Problems that differ in a number are different problems, however alike they read; so no threshold on the text alone
  would do.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from megatron_rl.grading.math_answer import equal
from megatron_rl.prepare.rows import Row

_WORD = re.compile(r"[^\W\d_]+|\d+")
_NUMBER = re.compile(r"\d+")
_DROPPED_BY_SPELLING = re.compile(r"[^\w+\-*/^=<>!]|_")
_SHINGLE = 3  # words


def text_key(row: Row) -> str:
    """Problems of one key are the same text."""
    return row.problem.strip()


def spelling_key(row: Row) -> str:
    """Problems of one key differ in spelling at most."""
    return _DROPPED_BY_SPELLING.sub("", row.problem.casefold())


def overlap_key(row: Row) -> str:
    """Letters and digits alone: coarser than the spelling, because leakage is worse than a problem less."""
    return "".join(character for character in row.problem.lower() if character.isalnum())


@dataclass(frozen=True)
class Removed:
    """What a pass took out."""

    duplicates: tuple[Row, ...]
    contradictory: tuple[Row, ...]  # all copies of a problem that comes with different answers
    contradictory_problems: int


def remove_repeated(rows: Sequence[Row], key: Callable[[Row], str]) -> tuple[list[Row], Removed]:
    """The first copy of each problem, in order; none of a problem whose copies have answers that are not equal."""
    copies: dict[str, list[Row]] = {}
    for row in rows:
        copies.setdefault(key(row), []).append(row)
    contradictory = {k for k, same in copies.items() if not agree([row.answer for row in same])}
    kept, duplicates = [], []
    for same in copies.values():  # in the order of their first copies
        if key(same[0]) not in contradictory:
            kept.append(same[0])
            duplicates += same[1:]
    dropped = tuple(row for k in contradictory for row in copies[k])
    return kept, Removed(tuple(duplicates), tuple(sorted(dropped, key=key)), len(contradictory))


def agree(answers: Iterable[str]) -> bool:
    """Whether all answers are equal, as texts or as mathematics."""
    first, *others = dict.fromkeys(answers)
    return all(equal(other, first) for other in others)


def remove_near(rows: Sequence[Row], threshold: float) -> tuple[list[Row], tuple[Row, ...]]:
    """Without the near duplicates of earlier rows: (kept, removed), both in order.

    Exact, not by hashing: only problems with the same numbers and the same answer are compared.
    """
    blocks: dict[tuple[object, ...], list[frozenset[tuple[str, ...]]]] = {}
    kept, removed = [], []
    for row in rows:
        shingles = _shingles(row.problem)
        block = blocks.setdefault((_numbers(row.problem), row.answer.strip()), [])
        if any(_jaccard(shingles, other) >= threshold for other in block):
            removed.append(row)
        else:
            block.append(shingles)
            kept.append(row)
    return kept, tuple(removed)


@dataclass(frozen=True)
class Overlap:
    """Which problems of one evaluation set the training rows contain."""

    name: str
    size: int  # of the evaluation set
    same: frozenset[int]  # indices into it, by letters and digits
    near: frozenset[int]  # further ones, by numbers and word triples
    training: frozenset[int]  # indices of the training rows in question


class Index:
    """The training rows, to be looked up from evaluation sets."""

    def __init__(self, rows: Sequence[Row], threshold: float) -> None:
        """`threshold`: of near problems; 0: none are sought."""
        self._threshold = threshold
        self._by_key: dict[str, list[int]] = {}
        self._by_numbers: dict[object, list[tuple[int, frozenset[tuple[str, ...]]]]] = {}
        for i, row in enumerate(rows):
            self._by_key.setdefault(overlap_key(row), []).append(i)
            if threshold:
                self._by_numbers.setdefault(_numbers(row.problem), []).append((i, _shingles(row.problem)))

    def overlap(self, name: str, evaluation: Sequence[Row]) -> Overlap:
        """Compare with one evaluation set. Near ones need the same numbers, whatever the answer."""
        same: set[int] = set()
        near: set[int] = set()
        training: set[int] = set()
        for i, row in enumerate(evaluation):
            exact, shingles = self._by_key.get(overlap_key(row), []), _shingles(row.problem)
            candidates = self._by_numbers.get(_numbers(row.problem), [])
            alike = [j for j, other in candidates if _jaccard(shingles, other) >= self._threshold]
            if exact:
                same.add(i)
            elif alike:
                near.add(i)
            training.update(exact, alike)
        return Overlap(name, len(evaluation), frozenset(same), frozenset(near), frozenset(training))


def _shingles(text: str) -> frozenset[tuple[str, ...]]:
    words = _WORD.findall(text.casefold())
    return frozenset(tuple(words[i : i + _SHINGLE]) for i in range(max(1, len(words) - _SHINGLE + 1)))


def _numbers(text: str) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(Counter(_NUMBER.findall(text)).items()))


def _jaccard(a: frozenset[tuple[str, ...]], b: frozenset[tuple[str, ...]]) -> float:
    return len(a & b) / len(a | b)
