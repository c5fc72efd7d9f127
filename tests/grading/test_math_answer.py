from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from megatron_rl.config.reward import RewardConfig
from megatron_rl.grading.math_answer import compared_as_text, math
from megatron_rl.grading.rules import format, regex
from megatron_rl.reward.shape import say_text_only
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


def test_options_decide_what_is_a_matter_of_taste():
    for answer, gold, options in [
        ("3.142", r"\pi", {"rounding_digits": 4}),
        (r"\sum_{k=1}^{10} k", "55", {"unevaluated": True}),
    ]:
        assert (math(boxed(answer), gold), math(boxed(answer), gold, **options)) == (0.0, 1.0)
    assert math(boxed("3.1416"), r"\pi") == 1.0 and math(boxed("3.1416"), r"\pi", rounding_digits=0) == 0.0
    cut = r"\boxed{5} and then \boxed{1"
    assert math(cut, "5") == 0.0 and math(cut, "5", earlier_box=True) == 1.0


def test_a_gold_that_no_reading_understands_is_known_and_right_only_as_text(capsys):
    unread = [r"1 + \frac{1}{2} + \ldots + \frac{1}{7}", r"\frac{1}{2014!^{2014}}", r"\int_0^1 f(x)\,dx", "t(0,4]"]
    read = [
        "42",
        r"\frac{1}{2}",
        "(C)",
        "Evelyn",
        r"(-\infty,2)\cup\{3\}",
        r"\$18.90",
        "y=2x+3",
        r"12\text{ m/s}",
        "2516_8",
    ]
    read += [
        r"The least value is \(248\).",
        "9:30",
        r"x \equiv 3 \pmod 7",
        r"\pm 2",
        r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
    ]
    assert [gold for gold in unread if not compared_as_text(gold)] == []
    assert [gold for gold in read if compared_as_text(gold)] == []
    assert [gold for gold in unread if math(boxed(gold), gold) != 1.0] == [] and math(boxed("0"), unread[1]) == 0.0
    assert math(boxed("248"), read[9]) == 1.0
    say_text_only("the set", [*read, unread[0]], RewardConfig(function="math"))
    said = capsys.readouterr().out
    assert "the set: the verifier reads 1 of 15 gold answers" in said and r"\\ldots" in said


def test_long_texts_take_no_longer_than_their_length():
    start = time.process_time()
    for text in (
        "{" * 20_000,
        "1" * 2_000_000,
        r"\text{" * 3_000,
        "$" * 200_000,
        r"\boxed{" * 5_000,
        "(" * 4_000,
        "5" + "!" * 390,
    ):
        assert math(text, "5") == 0.0 and math(boxed("5"), text) == 0.0 and math(text, text) == 1.0
        assert compared_as_text(text)
    assert time.process_time() - start < 10


def test_an_unbalanced_gold_is_read_as_if_it_were_closed():
    assert math(r"\boxed{\frac{5055}{2^{15}}}", r"\frac{5055}{2^{15}") == 1.0


def test_a_power_or_a_root_takes_a_decimal_that_starts_with_its_point():
    for found, same, other in [
        ("x^.5", r"\sqrt{x}", "x^5"),
        (r"\sqrt.25", "0.5", r"\sqrt{25}"),
        ("e^.5x", r"x\sqrt{e}", "e^5x"),
    ]:
        assert (math(boxed(found), same), math(boxed(found), other)) == (1.0, 0.0)


def test_regex_takes_the_last_match_and_format_looks_for_one():
    assert regex("a=1 a=2", "2", pattern=r"a=(\d)") == 1.0 and regex("a=1 a=2", "1", pattern=r"a=(\d)") == 0.0
    assert regex("no", "2", pattern=r"a=(\d)") == 0.0
    assert regex("Yes", "yes", pattern="(?i)yes|no") == 0.0
    assert regex("Yes", "yes", pattern="(?i)yes|no", ignore_case=True) == 1.0
    pattern = r"\A<think>[^<]*</think>"
    assert format("<think>so</think> 3", "", pattern=pattern) == 1.0 and format("3", "", pattern=pattern) == 0.0
