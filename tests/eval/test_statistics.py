"""The estimators against enumeration and numbers worked out by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron_rl.eval.answers import answer_of, classes
from megatron_rl.eval.statistics import ABSTAIN, Intervals, ks, label, majority_at_k, mean_of, pass_at_k, summarise
from megatron_rl.grading.math_answer import math
from megatron_rl.grading.verdict import InProcess


def intervals(problems: int, **options: float) -> Intervals:
    return Intervals(problems, **{"confidence": 0.95, "resamples": 4000, "seed": 1} | options)


def test_pass_at_k_is_the_closed_form_and_the_mean_over_all_subsets() -> None:
    """5 samples, 2 correct: of the 10 subsets of 3 one has no correct sample."""
    assert pass_at_k(5, np.array([2]), 3) == pytest.approx([0.9])
    for n, c, k in [(1, 0, 1), (4, 1, 2), (6, 3, 4), (7, 7, 3), (8, 2, 7)]:
        row = [i < c for i in range(n)]
        found = np.mean([any(subset) for subset in itertools.combinations(row, k)])
        assert pass_at_k(n, np.array([c]), k) == pytest.approx([found]), (n, c, k)
    with pytest.raises(ValueError, match=r"k in \[1, 4\]"):
        pass_at_k(4, np.array([1]), 5)


def test_majority_by_hand() -> None:
    rng = np.random.default_rng(0)
    right = np.array([True, True, False, False, False])
    # answers a a b c none: a wins among all five, and loses a third of the ties of b, a, c
    classes = np.array([0, 0, 1, 2, ABSTAIN])
    assert majority_at_k(classes, right, 5, rng) == 1
    assert majority_at_k(classes, right, 1, rng) == pytest.approx(2 / 5)
    # of the 10 pairs: aa 1; ab, ac twice each 1/2; a with none twice 1; bc, b none, c none 0
    assert majority_at_k(classes, right, 2, rng) == pytest.approx((1 + 4 / 2 + 2) / 10)
    assert majority_at_k(np.full(5, ABSTAIN), right, 5, rng) == 0
    # the commonest answer is wrong although more than one sample is right
    assert majority_at_k(np.array([0, 1, 1, 1, 2]), np.array([True, False, False, False, True]), 5, rng) == 0
    # random subsets agree with all of them
    many = np.array([0] * 12 + [1] * 20)
    estimate = majority_at_k(many, many == 0, 3, rng)
    exact = sum(sum(many[list(s)] == 0) >= 2 for s in itertools.combinations(range(32), 3)) / 4960
    assert estimate == pytest.approx(exact, abs=0.06)


def test_labels_follow_the_equivalence() -> None:
    same = {frozenset({"1/2", "0.5"})}
    found = label(["1/2", None, "3", "0.5", "3", "4"], lambda a, b: frozenset({a, b}) in same)
    assert found.tolist() == [0, ABSTAIN, 1, 0, 1, 2]


def test_intervals_are_as_wide_as_the_means_scatter() -> None:
    """300 benchmarks whose true mean is 1/3: the width is that of a normal interval of known variance, and 95% hold."""
    rng = np.random.default_rng(5)
    for problems, samples in [(30, 1), (30, 8), (100, 4)]:
        held, widths = [], []
        for trial in range(300):
            rates = rng.beta(1, 2, size=problems)
            correct = rng.random((problems, samples)) < rates[:, None]
            found = intervals(problems, resamples=500, seed=trial).of_values(correct.mean(axis=1), samples)
            held.append(found.low <= 1 / 3 <= found.high)
            widths.append(found.high - found.low)
        variance = (1 / 18 + (1 / 3 - 1 / 6) / samples) / problems  # of the rates, and of the samples: E[p] - E[p^2]
        assert np.mean(widths) == pytest.approx(2 * 1.96 * variance**0.5, rel=0.07), (problems, samples)
        assert 0.91 <= np.mean(held) <= 0.985, (problems, samples)


def test_values_that_agree_by_chance_leave_doubt() -> None:
    one_rate = np.full(30, 0.5)  # each problem 8 of 16: only samples vary
    found = intervals(30).of_values(one_rate, 16)
    assert found.value == 0.5 and found.high - found.low == pytest.approx(2 * 1.96 * 0.5 / (30 * 16) ** 0.5, rel=0.1)
    half = np.tile([True, True, False, False], (10, 1))
    for estimate in summarise(half, half.astype(int), intervals(10)).values():
        assert estimate.low < estimate.value <= estimate.high and estimate.low < estimate.high
    for estimate in summarise(half[:1], half[:1].astype(int), intervals(1)).values():
        assert estimate.low < estimate.high
    decided = np.repeat([1.0, 0.0], 15)  # a problem is right or wrong: only they vary
    found = intervals(30).of_values(decided, 16)
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.5 / 30**0.5, rel=0.1)
    again = intervals(30).of_values(decided, 16)
    assert (found.low, found.high) == (again.low, again.high)


def test_unanimous_samples_leave_doubt() -> None:
    """0 of 30: 1 - 0.025^(1/30) = 0.1157, here by 4,000 replicates; the doubt reaches the mean over sets."""
    nothing = intervals(30).of_values(np.zeros(30), 4)
    assert (nothing.value, nothing.low) == (0, 0) and nothing.high == pytest.approx(0.1157, rel=0.1)
    everything = intervals(30, seed=2).of_values(np.ones(30), 1)
    assert (everything.value, everything.high) == (1, 1) and everything.low == pytest.approx(1 - 0.1157, rel=0.02)
    mean = mean_of([nothing, everything], confidence=0.95)
    assert mean.value == 0.5 and 0.02 < mean.high - mean.low < 0.116


def test_classes_are_those_that_grading_sees() -> None:
    """Gold 3,5: both boxes are right and the last alone is wrong; two spellings of it are one."""
    grader = InProcess([math])
    responses = [r"\boxed{3}, \boxed{5}", r"\boxed{5}", r"\boxed{5, 3}", r"\boxed{5.0}", "no idea", r"\boxed{7}"]
    accepted = [grader.submit(response, "3,5").result().values[0] == 1 for response in responses]
    assert accepted == [True, False, True, False, False, False]
    found = classes([answer_of(response, by_text=False) for response in responses], accepted, grader)
    assert found.tolist() == [0, 1, 0, 1, 2, 3]
    assert answer_of(responses[0], by_text=False) == "3,5" and answer_of("", by_text=False) is None


def test_summary_names_and_order_of_the_numbers() -> None:
    assert ks(1) == [1] and ks(6) == [1, 2, 4, 6] and ks(32)[-1] == 32
    rng = np.random.default_rng(2)
    correct = rng.random((10, 6)) < 0.4
    found = summarise(correct, correct.astype(int), intervals(10))
    assert list(found) == ["avg@6", "pass@2", "pass@4", "pass@6", "maj@2", "maj@4", "maj@6"]
    assert found["avg@6"].value == pytest.approx(correct.mean())
    assert found["pass@6"].value == pytest.approx(correct.any(axis=1).mean())
    assert found["avg@6"].value < found["pass@2"].value < found["pass@4"].value <= found["pass@6"].value
    assert all(0 <= e.low <= e.value <= e.high <= 1 for e in found.values())
    assert list(summarise(correct[:, :1], correct[:, :1].astype(int), intervals(10))) == ["avg@1"]
    mean = mean_of([found["pass@2"], found["pass@6"]], confidence=0.95)
    assert mean.value == pytest.approx((found["pass@2"].value + found["pass@6"].value) / 2)
    assert mean.low < mean.value < mean.high
