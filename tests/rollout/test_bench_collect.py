"""What scripts/bench_collect.py asks for, and its account."""

from __future__ import annotations

import statistics

from megatron_rl.rollout.engine import Request, SamplingParams
from scripts.bench_collect_task import KEPT, Book, grade, makespan, response_tokens

LIMIT = 480


def test_lengths_are_log_normal_with_a_tail_of_about_eight_times_the_median() -> None:
    lengths = [response_tokens(40.0, LIMIT, 7, prompt, sample) for prompt in range(4000) for sample in range(8)]
    assert statistics.median(lengths) == 40
    deciles = statistics.quantiles(lengths, n=10)
    assert abs(deciles[0] * deciles[-1] / 40**2 - 1) < 0.1  # symmetric in the logarithm
    longest = [max(lengths[i : i + 512]) / 40 for i in range(0, len(lengths), 512)]
    assert 7 < statistics.fmean(longest) < 10
    assert max(lengths) < LIMIT


def test_the_kept_fraction_is_that_of_groups_whose_scores_differ() -> None:
    kept = []
    for prompt in range(3000):
        scores = {
            grade("7" * response_tokens(40.0, LIMIT, 7, prompt, sample), f"answer {prompt}") for sample in range(8)
        }
        kept.append(len(scores) > 1)
    assert abs(statistics.fmean(kept) - KEPT) < 0.03


def test_a_special_token_counts_as_one() -> None:
    answer = next(f"{i}" for i in range(100) if grade("7" * 3, f"{i}") != grade("7" * 4, f"{i}"))
    assert grade("7<eos>7", answer) == grade("777", answer)


def drawn(book: Book, seed: int, prompts: range, samples: int = 8) -> None:
    for prompt in prompts:
        for sample in range(samples):
            request = Request(prompt, sample, (1, 2), SamplingParams(1.0, 1.0, 0, LIMIT, (), seed))
            book.shorten(request)
            assert request.sampling.max_response_tokens == book.groups[seed, prompt].lengths[sample] < LIMIT
            book.answered(request, request.sampling.max_response_tokens)


def test_needed_are_the_groups_used_and_the_whole_ones_before_them_that_teach_nothing() -> None:
    book, answers = Book(40.0, LIMIT), {prompt: str(prompt) for prompt in range(60)}
    drawn(book, 5, range(30))
    drawn(book, 6, range(30, 60))
    teach = [key for key, group in book.groups.items() if group.is_informative(answers[key[1]])]
    first = [key for key in teach if key[0] == 5]
    used = first[:8]
    dull = [key for key in book.groups if key not in teach and key[0] == 5 and key < used[-1]]
    assert 0 < len(dull) < sum(key not in teach for key in book.groups)
    assert sorted([*used, *dull]) == book.needed(used, answers)
    assert book.in_whole() == book.tokens(book.groups)
    group = book.groups[dull[0]]
    group.came[3] -= 1  # that response was aborted
    assert book.in_whole() == book.tokens(book.groups) - group.lengths[3]
    assert dull[0] not in book.needed(used, answers)
    assert book.needed(used, answers) == [key for key in book.groups if key in {*used, *dull[1:]}]


def test_a_continued_request_keeps_what_is_left() -> None:
    book = Book(40.0, LIMIT)
    request = Request(3, 0, (1, 2), SamplingParams(1.0, 1.0, 0, 17, (), 9))
    book.shorten(request)
    assert request.sampling.max_response_tokens == 17 and not book.groups


def test_in_order_each_slot_takes_the_next_response_and_steps_do_not_overlap() -> None:
    assert makespan([5, 3, 4, 2], 2) == 5 + 2 == 3 + 4
    book = Book(40.0, LIMIT)
    drawn(book, 5, range(2), samples=2)
    drawn(book, 6, range(2), samples=2)
    one = makespan([n for key in book.groups if key[0] == 5 for n in book.groups[key].lengths.values()], 3)
    two = makespan([n for key in book.groups if key[0] == 6 for n in book.groups[key].lengths.values()], 3)
    assert book.in_order(book.groups, 3) == one + two
