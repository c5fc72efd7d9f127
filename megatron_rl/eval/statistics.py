"""From the samples of a set to its numbers: avg@n, unbiased pass@k, maj@k, each with an interval. Pure numpy.

`correct [P, n]` bool: problem by sample. Everything is a fraction.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from statistics import NormalDist
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

    classes: `[n]`, equal numbers for equal answers, ABSTAIN for none. correct: `[n]`, the same within a class. Answers
    that tie share the vote: a tie of two with one correct counts 1/2; without any answer 0. Over all subsets of k
    samples, or `_MAX_SUBSETS` random ones.
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
    """Intervals of means over problems, by a bootstrap. The same seed gives the same intervals.

    The scheme. Problems are drawn with replacement and keep their values: the spread of the values over the problems
    holds the noise of the samples already, so the samples are not drawn again. Deviations from the mean are widened by
    what a bootstrap of P problems lacks: sqrt(P / (P - 1)), and the ratio of Student's quantile to the normal one, to
    first order. The interval is the percentiles of these means.

    Two cases in which the problems show less doubt than there is:
    - values that agree more than their samples can vouch for (10 problems of which each has 2 of 4 right): there the
      values are drawn instead, each as the mean of `draws` coin tosses with its own value, if that is the wider one.
      One problem is such a case: its interval is about this problem, since nothing is known of others.
    - all values 0, or all 1: the exact binomial bound over problems (Clopper, Pearson).
    """

    def __init__(self, num_problems: int, *, confidence: float, resamples: int, seed: int) -> None:
        """`confidence`: a fraction, as 0.95."""
        self._rng = np.random.default_rng(seed)
        self._problems = self._rng.integers(num_problems, size=(resamples, num_problems))
        self._tail = (1 - confidence) / 2
        freedom, quantile = max(1, num_problems - 1), NormalDist().inv_cdf(1 - self._tail)
        self._widening = math.sqrt(num_problems / freedom) * (1 + (quantile**2 + 1) / (4 * freedom))

    def of_values(self, values: Floats, draws: int) -> Estimate:
        """Return the mean of `values [P]`, fractions, and its interval.

        `draws`: how many independent samples stand behind each value: n for a mean of n samples, n // k for a value
        over groups of k of them.
        """
        value, count = float(values.mean()), len(values)
        if value in (0, 1):
            doubt = self._rng.random(len(self._problems)) ** (1 / count)  # these carry the doubt into means over sets
            return _percentiles(value, 1 - doubt if value == 0 else doubt, self._tail)
        means = values[self._problems].mean(axis=1)
        replicates = value + (means - value) * self._widening
        if replicates.std() < math.sqrt((values * (1 - values)).sum() / draws) / count:
            replicates = (self._rng.binomial(draws, values, size=self._problems.shape) / draws).mean(axis=1)
        return _percentiles(value, np.clip(replicates, 0, 1), self._tail)


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
    found = {f"avg@{num_samples}": intervals.of_values(correct.mean(axis=1), num_samples)}
    if num_samples == 1:
        return found
    counts = correct.sum(axis=1)
    rng = np.random.default_rng(0)
    for k in ks(num_samples)[1:]:
        found[f"pass@{k}"] = intervals.of_values(pass_at_k(num_samples, counts, k), num_samples // k)
    for k in ks(num_samples)[1:]:
        votes = [majority_at_k(row, right, k, rng) for row, right in zip(classes, correct, strict=True)]
        found[f"maj@{k}"] = intervals.of_values(np.array(votes), num_samples // k)
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
