"""Kinds of answers, and the judged pairs where the data folder has them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rl.grading.math_answer import math
from tests.grading.kinds import KINDS, RESPONSES

PAIRS = Path(__file__).resolve().parents[3] / "shared" / "data" / "grader_pairs.jsonl"


@pytest.mark.parametrize("kind", KINDS)
def test_answers_of_a_kind(kind):
    wrong = [(gold, answer) for gold, answer, right in KINDS[kind] if math(f"So \\boxed{{{answer}}}.", gold) != right]
    assert wrong == []


def test_what_a_response_answers():
    assert [case for case in RESPONSES if math(case[1], case[0]) != case[2]] == []


@pytest.mark.skipif(not PAIRS.is_file(), reason=f"{PAIRS} with answers judged by hand is absent")
@pytest.mark.parametrize(("judged_in", "least", "most_false"), [(1, 0.99, 6), (2, 0.9, 8)])
def test_judged_pairs(judged_in, least, most_false):
    rows = [json.loads(line) for line in PAIRS.read_text().splitlines()]
    rows = [row for row in rows if row["round"] == judged_in and not row["debatable"]]
    wrong = [row for row in rows if math(row["answer"], row["gold"]) != row["right"]]
    accepted = [row for row in wrong if not row["right"]]
    assert len(rows) > 100 and len(wrong) <= (1 - least) * len(rows), wrong
    assert len(accepted) <= most_false, accepted
