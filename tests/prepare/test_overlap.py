"""What counts as an evaluation problem within a training row, by hand-made pairs."""

from __future__ import annotations

from typing import Any

from megatron_rl.data.rows import Row
from megatron_rl.prepare.overlap import find_overlaps

STORY = "How many of the first {} positive integers are divisible by neither two nor three nor five"
OTHER = "Find the area of the triangle whose sides have lengths seven eight and nine in the plane of the figure below"


def rows(*problems: str) -> list[Row]:
    return [Row(str(i), problem, "1", "test") for i, problem in enumerate(problems)]


def degrees(evaluation: str, training: str, threshold: float = 0.8) -> str:
    """The degree of a pair, beside rows that have nothing to do with it."""
    (found,) = find_overlaps(rows("Something else", training), [("e", rows("Nothing at all", evaluation))], threshold)
    assert found.size == 2 and found.training == ({1} if found.same | found.contained | found.near else set())
    names = [name for name in ("same", "contained", "near", "partial") if 1 in getattr(found, name)]
    assert len(names) <= 1 and not any(0 in getattr(found, name) for name in ("same", "contained", "near", "partial"))
    return names[0] if names else "none"


def test_degrees_of_overlap() -> None:
    squares = "How many positive perfect squares less than $2023$ are divisible by $5$?"
    assert degrees(squares, squares.upper().replace("$", "")) == "same"
    assert degrees("Find x if x^2 = 2 and x > 0.", "Find x if x² = 2 and x > 0.") == "same"
    for threshold in (0.8, 0.0):  # 0 leaves out what is near, not what is literal
        assert (
            degrees(squares, squares + " Fill in the blank with the number of such squares.", threshold) == "contained"
        )
        assert degrees(squares, "Solve this. " + squares, threshold) == "contained"
    assert degrees(STORY.format(90), STORY.format(90).replace("five", "seven")) == "near"
    assert (
        degrees(STORY.format(90), "We ask: " + STORY.format(90).replace("How", "Then how") + " Go.", 0.0) == "contained"
    )
    assert degrees(STORY.format(90), STORY.format(91)) == "partial"  # another number, another problem
    assert degrees(STORY.format(90), OTHER) == "none"


def test_latex_is_left_out_of_what_is_contained() -> None:
    problem = r"Find $x$ with $\left(x+\frac{1}{2}\right)^2 \leq 9$ and $1, \ldots, n$."
    assert degrees(problem, r"Find \(x\) with \((x + \dfrac12)^2 \le 9\) and \(1,\dots,n\). Give m+n.") == "contained"
    # where commands are nearly all there is, they count
    assert degrees(r"Evaluate $\log_2 64$", r"Please evaluate $\log_2 64$ now") == "contained"
    assert degrees(r"Evaluate $\log_2 64$", r"Please evaluate $\cos_2 64$ now") == "none"
    assert degrees("$1+1=$", "What is $1+1=2$ and 11 more?") == "none"  # too short to mean anything


def test_half_of_the_8_grams_and_all_numbers_make_it_near() -> None:
    evaluation = STORY.format(90) + " and how many of them are odd"  # 21 words, 14 grams
    assert degrees(evaluation, "Tell me. " + STORY.format(90) + " Answer with 1 number.") == "near"
    assert degrees(STORY.format(90), "Tell me. " + STORY.format(80) + " Answer with 1 number.") == "partial"
    assert degrees(f"{OTHER} of 12 points", f"Now tell me. {OTHER} of 13 points") == "partial"  # 15 of 17 grams
    few = "Among 90 boxes those whose labels are positive integers are divisible by neither two nor three remain"
    assert degrees(evaluation, few) == "none"  # 3 of 14 grams


def test_phrases_of_the_genre_are_no_overlap() -> None:
    phrase = "The answer is a fraction in lowest terms with numerator m and denominator n so find the sum of m and n"
    names = ("Ann", "Bob", "Cid", "Dan", "Eve", "Fay", "Gil", "Hal", "Ida", "Jim", "Kim", "Liz", "Max", "Ned", "Oda",
             "Pat", "Ray", "Sue", "Tom", "Uwe", "Vic", "Wim")  # fmt: skip
    evaluation = rows(*(f"{name} walks home alone. {phrase}" for name in names))
    training = rows(f"A die is cast. {phrase}")
    (found,) = find_overlaps(training, [("e", evaluation)], 0.8)
    assert not (found.same or found.contained or found.near or found.partial)
    (found,) = find_overlaps(training, [("e", evaluation[:3])], 0.8)  # of three problems it may be the problem itself
    assert found.near == {0, 1, 2}


def test_sets_and_repeated_problems_are_told_apart() -> None:
    story = "Tell me. " + STORY.format(90) + " Answer with 1 number."
    evaluation = STORY.format(90) + " and how many of them are odd"
    sets: list[Any] = [("a", rows(OTHER)), ("b", rows(*[evaluation] * 32))]
    a, b = find_overlaps(rows(story, OTHER), sets, 0.8)
    assert (a.same, a.near, a.training) == ({0}, set(), {1})
    assert (b.same, b.near, b.training) == (set(), set(range(32)), {0})


def test_earlier_turns_count() -> None:
    turns = ({"role": "user", "content": OTHER}, {"role": "assistant", "content": "Twelve."})
    training = [Row("0", "Are you sure?", "1", "test", turns=turns)]
    (found,) = find_overlaps(training, [("e", rows(OTHER, "Are you sure?"))], 0.8)
    assert found.contained == {0} and not found.same and found.training == {0}
