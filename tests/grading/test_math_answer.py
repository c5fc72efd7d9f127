from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rl.grading.math_answer import math
from megatron_rl.grading.rules import format, regex
from tests.grading.answers import DIFFERENT, RESPONSES, SAME

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
# a box around these never closes
UNBALANCED_GOLDS = {"omni-183", "omni-682", "omni-710", "omni-1469"}


def boxed(answer):
    return f"Thus the answer is \\boxed{{{answer}}}."


@pytest.mark.parametrize("kind", SAME)
def test_the_same_answer_written_otherwise(kind):
    assert [pair for pair in SAME[kind] if math(boxed(pair[0]), pair[1]) != 1.0] == []


@pytest.mark.parametrize("kind", DIFFERENT)
def test_another_answer(kind):
    assert [pair for pair in DIFFERENT[kind] if math(boxed(pair[0]), pair[1]) != 0.0] == []


def test_which_part_of_a_response_is_its_answer():
    assert [case for case in RESPONSES if math(case[0], case[1]) != case[2]] == []


def test_strict_wants_a_box_an_integer_a_reduced_fraction_and_no_rounding():
    for answer, gold in [("4/2", "2"), ("2.0", "2"), (r"\frac{2}{4}", r"\frac12"), ("1.4142", r"\sqrt{2}")]:
        assert (math(boxed(answer), gold), math(boxed(answer), gold, strict=True)) == (1.0, 0.0)
    assert math("The answer is 2.", "2") == 1.0 and math("The answer is 2.", "2", strict=True) == 0.0
    assert math(boxed(r"\frac12"), r"\frac{1}{2}", strict=True) == 1.0


def test_bounds_leave_large_true_answers():
    for found, gold in [("(1+1)^{2009}", "2^{2009}"), (r"\sqrt{(1+1)^{2009}-1}", r"\sqrt{2^{2009}-1}")]:
        assert math(boxed(found), gold) == 1.0


@pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} with the evaluation sets is absent")
@pytest.mark.parametrize("name", ["aime24", "aime25", "amc", "math500", "olympiadbench", "minerva", "omni_math_rule"])
def test_every_gold_agrees_with_itself(name):
    wrong = set()
    for line in (DATA / f"eval_{name}.jsonl").read_text().splitlines():
        row = json.loads(line)
        if math(row["answer"], row["answer"]) != 1.0 or math(boxed(row["answer"]), row["answer"]) != 1.0:
            wrong.add(row["id"])
    assert wrong == (UNBALANCED_GOLDS if name == "omni_math_rule" else set())


def test_an_unbalanced_gold_is_read_as_if_it_were_closed():
    assert math(r"\boxed{\frac{5055}{2^{15}}}", r"\frac{5055}{2^{15}") == 1.0


def test_regex_takes_the_last_match_and_format_looks_for_one():
    assert regex("a=1 a=2", "2", pattern=r"a=(\d)") == 1.0 and regex("a=1 a=2", "1", pattern=r"a=(\d)") == 0.0
    assert regex("no", "2", pattern=r"a=(\d)") == 0.0
    assert regex("Yes", "yes", pattern="(?i)yes|no") == 0.0
    assert regex("Yes", "yes", pattern="(?i)yes|no", ignore_case=True) == 1.0
    pattern = r"\A<think>[^<]*</think>"
    assert format("<think>so</think> 3", "", pattern=pattern) == 1.0 and format("3", "", pattern=pattern) == 0.0
