"""From the samples of a set to its numbers: avg@n, unbiased pass@k, maj@k, each with an interval. Pure numpy.

`correct [P, n]` bool: problem by sample. Everything is a fraction.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ABSTAIN = -1  # the class of a sample that gives no answer
_MAX_SUBSETS = 512  # of k samples: all of them up to here, else as many random ones


@dataclass(frozen=True, slots=True)
class Estimate:
    """A fraction with its interval. `replicates [B]`: the bootstrap behind it."""

    value: float
    low: float
    high: float
    replicates: Floats


def pass_at_k(num_samples: int, num_correct: Ints, k: int) -> Floats:
    """Unbiased probability `[P]` that one of k samples is correct, from `num_correct [P]` of `num_samples`:
    1 - C(n - c, k) / C(n, k).

    Raises: ValueError for k outside [1, n].
    Source: Chen et al., arXiv 2107.03374, equation 1.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_samples} samples: expected k in [1, {num_samples}]")
    total = math.comb(num_samples, k)
    return np.array([1 - math.comb(num_samples - int(c), k) / total for c in num_correct])


def majority_at_k(classes: Ints, correct: Bools, k: int, rng: np.random.Generator) -> float:
    """Probability that the commonest answer among k of one problem's samples is correct.

    classes: `[n]`, equal numbers for equal answers, ABSTAIN for none. correct: `[n]`; the samples of a class agree, or
    the first decides. Answers that tie share the vote: a tie of two with one correct counts 1/2; without any answer 0.
    Over all subsets of k samples, or `_MAX_SUBSETS` random ones.
    """
    count = len(classes)
    if math.comb(count, k) <= _MAX_SUBSETS:
        subsets = np.array(list(combinations(range(count), k)))
    else:
        subsets = np.argsort(rng.random((_MAX_SUBSETS, count)), axis=1)[:, :k]
    labels, first = np.unique(classes[classes != ABSTAIN], return_index=True)
    if not labels.size:
        return 0.0
    right = correct[classes != ABSTAIN][first]
    votes = (classes[subsets][:, :, None] == labels).sum(axis=1)  # [subsets, labels]
    most = votes.max(axis=1, keepdims=True)
    winners = (votes == most) & (most > 0)
    return float(((winners & right).sum(axis=1) / np.maximum(winners.sum(axis=1), 1)).mean())


def ks(num_samples: int) -> list[int]:
    """Powers of two up to the number of samples, and that number."""
    return sorted({2**i for i in range(num_samples.bit_length()) if 2**i <= num_samples} | {num_samples})


class Intervals:
    """Percentile bootstrap of means over problems. The same seed gives the same intervals."""

    def __init__(self, num_problems: int, *, confidence: float, resamples: int, seed: int) -> None:
        """`confidence`: a fraction, as 0.95."""
        self._rng = np.random.default_rng(seed)
        self._problems = self._rng.integers(num_problems, size=(resamples, num_problems))
        self._tail = (1 - confidence) / 2

    def of_samples(self, correct: Bools) -> Estimate:
        """Of the mean of `correct [P, n]`: problems are drawn anew, and each one's samples within it."""
        num_samples = correct.shape[1]
        rates = correct.mean(axis=1)
        # n draws with replacement from n samples of which c are correct
        redrawn = self._rng.binomial(num_samples, rates[self._problems]) / num_samples
        return self._estimate(rates, redrawn.mean(axis=1))

    def of_problems(self, values: Floats) -> Estimate:
        """Of the mean of `values [P]`: problems are drawn anew, with their samples as they are.

        For pass@k and maj@k: a rare correct sample is lost in a third of all redraws of the samples, which would push
        the whole interval of pass@n below its estimate.
        """
        return self._estimate(values, values[self._problems].mean(axis=1))

    def _estimate(self, values: Floats, replicates: Floats) -> Estimate:
        found = _percentiles(float(values.mean()), replicates, self._tail)
        if found.value not in (0, 1):
            return found
        # where all agree the bootstrap knows no doubt; the exact binomial bound over problems does (Clopper, Pearson),
        # and these replicates carry it into means over sets
        doubt = self._rng.random(len(replicates)) ** (1 / len(values))
        return _percentiles(found.value, 1 - doubt if found.value == 0 else doubt, self._tail)


def mean_of(estimates: list[Estimate], *, confidence: float) -> Estimate:
    """The mean of independent estimates, all with the same number of replicates."""
    value = float(np.mean([estimate.value for estimate in estimates]))
    replicates = np.mean([estimate.replicates for estimate in estimates], axis=0)
    return _percentiles(value, replicates, (1 - confidence) / 2)


def _percentiles(value: float, replicates: Floats, tail: float) -> Estimate:
    low, high = np.quantile(replicates, [tail, 1 - tail])
    return Estimate(value, min(float(low), value), max(float(high), value), replicates)


def summarise(correct: Bools, classes: Ints, intervals: Intervals) -> dict[str, Estimate]:
    """`avg@n`, `pass@k` and `maj@k` for k in powers of two up to n; with one sample these are the same and `avg@1`
    stands alone.

    correct, classes: `[P, n]`.
    """
    num_samples = correct.shape[1]
    found = {f"avg@{num_samples}": intervals.of_samples(correct)}
    if num_samples == 1:
        return found
    counts = correct.sum(axis=1)
    rng = np.random.default_rng(0)
    for k in ks(num_samples)[1:]:
        found[f"pass@{k}"] = intervals.of_problems(pass_at_k(num_samples, counts, k))
    for k in ks(num_samples)[1:]:
        votes = [majority_at_k(row, right, k, rng) for row, right in zip(classes, correct, strict=True)]
        found[f"maj@{k}"] = intervals.of_problems(np.array(votes))
    return found


def label(answers: list[str | None], same: Callable[[str, str], bool]) -> Ints:
    """Classes `[n]` of equal answers, numbered as they appear; None abstains.

    `same` decides on two different texts; it need not be transitive: an answer joins the first class whose first text
    it equals.
    """
    firsts: list[str] = []
    known: dict[str, int] = {}
    labels: list[Any] = []
    for answer in answers:
        if answer is not None and answer not in known:
            found = next((i for i, other in enumerate(firsts) if same(answer, other)), len(firsts))
            if found == len(firsts):
                firsts.append(answer)
            known[answer] = found
        labels.append(ABSTAIN if answer is None else known[answer])
    return np.array(labels, dtype=np.int64)
