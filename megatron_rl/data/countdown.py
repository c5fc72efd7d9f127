"""The countdown game: its problems, and the solutions that a warm start learns from."""

import json
import random
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cache
from itertools import combinations, count
from typing import Any

from megatron_rl.algorithms.hashing import hash64
from megatron_rl.config import CountdownData
from megatron_rl.errors import DataError
from megatron_rl.types import Problems, Prompt

# more given numbers have too many expressions to enumerate
_MAX_SOLVER_NUMBERS = 4


def _countdown_problems(data: CountdownData, seed: int, tokenizer: Any) -> Problems:
    """Return rows of reasoning-gym, all solvable, in its order. The first `num_eval` distinct problems are held out: no
    training row has the same numbers, in any order, and target. Training rows may repeat, as there are few small
    problems. Raises: DataError when too few distinct ones are found, or a prompt is too long.
    """
    held_out: dict[tuple[Any, ...], tuple[list[int], int]] = {}
    train: list[tuple[list[int], int]] = []
    rows = _countdown_rows(data, seed)
    limit = 1000 + 20 * (data.num_train + data.num_eval)
    for _ in range(limit):
        if len(train) == data.num_train:
            break
        numbers, target = next(rows)
        key = (*sorted(numbers), target)
        if key in held_out:
            continue
        if len(held_out) < data.num_eval:
            held_out[key] = (numbers, target)
        else:
            train.append((numbers, target))
    else:
        raise DataError(
            f"countdown: {limit} draws gave {len(held_out)} held-out problems and {len(train)} others, "
            f"data.num_eval={data.num_eval} and data.num_train={data.num_train} were asked for; lower num_eval, or "
            "raise max_number or max_target"
        )
    everything = [*train, *held_out.values()]
    texts = [f"{','.join(map(str, numbers))}={target}:" for numbers, target in everything]
    prompts = []
    for i, (text, (numbers, target)) in enumerate(zip(texts, everything, strict=True)):
        token_ids = tuple(tokenizer.encode(text, add_special_tokens=False))
        if len(token_ids) > data.max_prompt_tokens:
            raise DataError(
                f"countdown: {text!r} has {len(token_ids)} tokens, {data.max_prompt_tokens=}; raise that limit"
            )
        answer = json.dumps({"numbers": numbers, "target": target})
        prompts.append(Prompt(i, token_ids, answer, "countdown"))
    return Problems(prompts[: len(train)], prompts[len(train) :])


def _countdown_rows(data: CountdownData, seed: int) -> Iterator[tuple[list[int], int]]:
    from reasoning_gym.games.countdown import CountdownConfig, CountdownDataset

    # reasoning-gym seeds row i with seed + i, so neighbouring seeds would share all rows but one
    base_seed = int(hash64(seed)) & (2**62 - 1)
    dataset = CountdownDataset(
        CountdownConfig(
            min_numbers=data.num_numbers,
            max_numbers=data.num_numbers,
            min_value=1,
            max_value=data.max_number,
            min_target=1,
            max_target=data.max_target,
            seed=base_seed,
        )
    )
    for row in count():
        try:
            metadata = dataset[row]["metadata"]
        except ValueError as error:
            raise DataError(
                f"countdown: reasoning-gym found no expression of {data.num_numbers} numbers with a value in "
                f"[1, {data.max_target}]; raise data.max_target"
            ) from error
        yield metadata["numbers"], metadata["target"]


def countdown_solutions(prompts: Sequence[Prompt], tokenizer: Any, seed: int) -> list[tuple[int, ...]]:
    """Return one correct response per countdown prompt, as token ids that end with the end-of-sequence token.

    Drawn uniformly among all distinct solutions (expressions in minimal parentheses), so that a policy fitted to them
    keeps its entropy. The draw depends on `seed` and the prompt alone. About 0.1 ms a prompt.

    Raises: DataError for more than four numbers, and for a prompt without solution.
    """
    solutions = []
    for prompt in prompts:
        problem = json.loads(prompt.answer)
        numbers = tuple(sorted(problem["numbers"]))
        if len(numbers) > _MAX_SOLVER_NUMBERS:
            raise DataError(
                f"countdown: solutions of {len(numbers)} numbers are too many to enumerate; set data.num_numbers to at "
                f"most {_MAX_SOLVER_NUMBERS}, or remove warm_start"
            )
        found = _expressions_by_target(numbers).get(problem["target"], ())
        if not found:
            raise DataError(f"countdown: prompt {prompt.prompt_id} {prompt.answer} has no solution")
        choice = random.Random(f"{seed}:{prompt.prompt_id}").choice(found)
        solutions.append((*tokenizer.encode(choice, add_special_tokens=False), tokenizer.eos_token_id))
    return solutions


@cache
def _expressions_by_target(numbers: tuple[int, ...]) -> dict[Fraction, tuple[str, ...]]:
    found: dict[Fraction, set[str]] = {}
    for text, value, _ in _expressions(numbers):
        found.setdefault(value, set()).add(text)
    return {value: tuple(sorted(texts)) for value, texts in found.items()}


@cache
def _expressions(numbers: tuple[int, ...]) -> tuple[tuple[str, Fraction, int], ...]:
    """Return all (text, value, precedence) that use each number once. Precedence: 0 of + -, 1 of * /, 2 of a number."""
    if len(numbers) == 1:
        return ((str(numbers[0]), Fraction(numbers[0]), 2),)
    found: dict[str, tuple[str, Fraction, int]] = {}
    for size in range(1, len(numbers)):
        for chosen in combinations(range(len(numbers)), size):
            rest = tuple(n for i, n in enumerate(numbers) if i not in chosen)
            for left in _expressions(tuple(numbers[i] for i in chosen)):
                for right in _expressions(rest):
                    found.update((joined[0], joined) for joined in _join(left, right))
    return tuple(found.values())


def _join(left: tuple[str, Fraction, int], right: tuple[str, Fraction, int]) -> Iterator[tuple[str, Fraction, int]]:
    (a, x, left_rank), (b, y, right_rank) = left, right
    yield f"{a}+{b}", x + y, 0
    yield f"{a}-{_wrap(b, right_rank < 1)}", x - y, 0
    a = _wrap(a, left_rank < 1)
    yield f"{a}*{_wrap(b, right_rank < 1)}", x * y, 1
    if y:
        yield f"{a}/{_wrap(b, right_rank < 2)}", x / y, 1


def _wrap(text: str, parentheses: bool) -> str:
    return f"({text})" if parentheses else text
