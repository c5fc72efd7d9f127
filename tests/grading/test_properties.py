"""What holds for all answers: an answer is itself however it is spaced, and another number is another answer."""

from __future__ import annotations

import random
import re

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_rl.grading.equivalence import Policy, equal

EXACT = Policy(rounding_digits=0)
common = settings(derandomize=True, deadline=None, max_examples=120)

integers = st.integers(-999, 999)
naturals = st.integers(1, 60)
fractions = st.builds(lambda a, b: rf"\frac{{{a}}}{{{b}}}", integers, st.integers(2, 97))
decimals = st.builds(lambda a, b: f"{a}.{b:02d}", integers, st.integers(1, 99))
roots = st.builds(lambda a, b, c: rf"{a}+{b}\sqrt{{{c}}}", integers, naturals, st.sampled_from([2, 3, 5, 6, 7, 10]))
powers = st.builds(lambda a, b, c: rf"{a}^{{{b}}}+{c}", st.integers(2, 30), st.integers(2, 400), naturals)
angles = st.builds(lambda a, b: rf"\frac{{{a}\pi}}{{{b}}}", naturals, st.integers(2, 12))
letters = st.sampled_from(["x", "y", "n", "R", "r", "a_1", r"\theta"])
polynomials = st.builds(
    lambda x, y, a, b, c: rf"{a}{x}^{{2}}+{b}{x}{y}-{c}", letters, letters, naturals, naturals, naturals
)
quotients = st.builds(lambda x, y, a, b: rf"\frac{{{x}+{a}}}{{{y}^{{2}}+{b}}}", letters, letters, naturals, naturals)
scalars = st.one_of(integers.map(str), fractions, decimals, roots, powers, angles)
expressions = st.one_of(scalars, polynomials, quotients)
pairs = st.builds(lambda a, b: f"({a},{b})", scalars, scalars)
sets = st.lists(scalars, min_size=2, max_size=4, unique=True)
rays = st.builds(lambda a: rf"[{a},\infty)", scalars)
answers = st.one_of(expressions, pairs, rays, sets.map(lambda items: r"\{" + ",".join(items) + r"\}"))


def spaced(text: str, draw: random.Random) -> str:
    """The text as another writer sets it: spaces, thin spaces, sized brackets, other fractions."""
    text = re.sub(r"([-+,=])", lambda match: match[0] + draw.choice(["", " ", r"\,", r"\; "]), text)
    if draw.random() < 0.5:
        text = re.sub(r"(?<!\\)([(\[])", r"\\left\1", re.sub(r"(?<!\\)([)\]])", r"\\right\1", text))
        text = text.replace(r"\{", r"\left\{").replace(r"\}", r"\right\}")
    text = text.replace(r"\frac", draw.choice([r"\frac", r"\dfrac", r"\tfrac"]))
    return draw.choice(["{}", "${}$", r"\({}\)", " {} ", r"\displaystyle {}", "{}."]).format(text.replace("{}", ""))


@common
@given(answers, st.randoms(use_true_random=False))
def test_an_answer_is_itself_however_it_is_set(answer, draw):
    assert equal(spaced(answer, draw), answer) and equal(answer, spaced(answer, draw))


@common
@given(expressions, expressions)
def test_expressions_are_the_same_both_ways(a, b):
    assert equal(a, b, EXACT) == equal(b, a, EXACT)


@common
@given(sets, sets, st.randoms(use_true_random=False))
def test_a_set_has_no_order(items, others, draw):
    shuffled = draw.sample(items, len(items))
    gold = r"\{" + ", ".join(items) + r"\}"
    assert equal(r"\{" + ",".join(shuffled) + r"\}", gold) and equal(",".join(shuffled), gold)
    other = r"\{" + ",".join(others) + r"\}"
    assert equal(other, gold, EXACT) == equal(gold, other, EXACT)


@common
@given(sets)
def test_a_set_less_one_member_is_another(items):
    assume(len({str(item) for item in items}) == len(items))
    assume(not any(equal(a, b) for i, a in enumerate(items) for b in items[:i]))
    gold = r"\{" + ",".join(items) + r"\}"
    assert not equal(r"\{" + ",".join(items[1:]) + r"\}", gold) and not equal(items[0], gold)


@common
@given(st.lists(st.integers(-99, 99), min_size=4, max_size=6, unique=True), st.integers(0, 1))
def test_a_union_less_one_interval_is_another(ends, dropped):
    ends = sorted(ends)[: len(ends) // 2 * 2]
    members = [f"({a},{b}]" for a, b in zip(ends[::2], ends[1::2], strict=True)]
    gold = r"\cup".join(members)
    assert equal(r" \cup ".join(reversed(members)), gold)
    left = [member for i, member in enumerate(members) if i != dropped]
    assert not equal(r"\cup".join(left), gold) and not equal(gold, r"\cup".join(left))


PLACES = (
    "@", "-@", r"\frac{@}{1009}", r"\frac{1009}{@}", r"@\sqrt{2}", r"\sqrt{@}", "x^2+@", "@x", "x_{@}", "(@,5)",
    "[@,5)", r"(-\infty,@)", "x>@", r"\{-1,@\}", "-1,@", r"@\text{ cm}", r"@\%", r"@^\circ", r"\$@", "10^{40}+@",
    r"2^{@}", "y=2x+@",
    r"\begin{pmatrix}1\\@\end{pmatrix}", r"@!", r"e^{@}", r"\ln @", r"@\pi", r"@:1009", "1@_7", r"@ \pmod{1009}", "@i",
    r"\frac{1}{10^{40}+@}", r"f(x)=x+@", r"\text{Room }@", "@ million",
)  # fmt: skip


@settings(common, max_examples=400)
@given(st.sampled_from(PLACES), st.integers(2, 120), st.integers(2, 120))
def test_another_number_is_another_answer(place, a, b):
    assume(a != b)
    assert not equal(place.replace("@", str(b)), place.replace("@", str(a)))


@common
@given(expressions, st.integers(1, 9))
def test_a_term_more_is_another_answer(expression, more):
    assert not equal(f"{expression}+{more}", expression, EXACT)
    assert not equal(rf"{expression}+10^{{-{50 * more}}}", expression, EXACT)


@common
@given(st.text(st.sampled_from(r"0123456789{}()[]\,;:+-*/^_=<>|!%$ abcxyzRsqrtfrac"), max_size=60), answers)
def test_any_text_gets_a_verdict(text, gold):
    assert equal(text, gold) in (True, False) and equal(gold, text) in (True, False)
