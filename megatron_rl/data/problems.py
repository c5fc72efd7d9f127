"""Problems: tokenizers, the countdown game, JSON lines, and the order in which prompts are drawn."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_rl.algorithms.hashing import hash64
from megatron_rl.config_checks import hf_folder, read_hf_config
from megatron_rl.errors import UserError
from megatron_rl.types import Prompt

if TYPE_CHECKING:
    from megatron_rl.config import Config, CountdownData, JsonlData

log = logging.getLogger(__name__)

_COUNTDOWN_CHARACTERS = "0123456789+-*/(),=:"
# more given numbers have too many expressions to enumerate
_MAX_SOLVER_NUMBERS = 4


class DataError(ValueError, UserError):
    """The problems, or the tokenizer, cannot be used as configured."""


@dataclass(frozen=True, slots=True)
class Problems:
    """All prompts of a run. A `prompt_id` is the problem's row; evaluation rows count on after the training rows."""

    train: list[Prompt]
    eval: list[Prompt]


def build_tokenizer(config: Config) -> Any:
    """The Hugging Face fast tokenizer of the task: one token per character for countdown, else the configured folder's.

    Raises: DataError when there is no tokenizer folder, or the model's vocabulary is smaller than the tokenizer's.
    """
    if config.data.type == "countdown":
        tokenizer = _character_tokenizer()
    else:
        own = hf_folder(config.model.path) if config.model.path else None
        tokenizer = pretrained_tokenizer(config.data.tokenizer or own)
    hf_vocab_size = read_hf_config(config).get("vocab_size")
    if hf_vocab_size is not None and hf_vocab_size < vocab_size(tokenizer):
        raise DataError(
            f"the model's vocab_size={hf_vocab_size} is below the tokenizer's {vocab_size(tokenizer)} tokens; give the "
            "tokenizer that belongs to the model, or raise model.hf_config.vocab_size"
        )
    return tokenizer


def vocab_size(tokenizer: Any) -> int:
    """Tokens, added ones included: the model's vocabulary where its config gives none. The policy pads it."""
    return len(tokenizer)


def _character_tokenizer() -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *_COUNTDOWN_CHARACTERS]
    # no unknown token: a character outside the game is a bug, and encoding it raises
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    # unk_token: transformers loads a folder with a Qwen2 model and this tokenizer as a Qwen2Tokenizer, which without it
    # adds a token of its own and so outgrows the model's vocabulary. The backend above does not use it.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def pretrained_tokenizer(folder: str | Path | None) -> Any:
    """The tokenizer of a local folder. Raises: DataError when there is none."""
    from transformers import AutoTokenizer

    if folder is None:
        raise DataError("data.tokenizer: model.hf_config brings no tokenizer; give the folder of one")
    if not Path(folder).is_dir():
        raise DataError(f"data.tokenizer: {folder} is no folder; give a local Hugging Face tokenizer folder")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise DataError(f"data.tokenizer: {folder} holds no tokenizer that transformers can load: {error}") from error


def load_prompts(config: Config, tokenizer: Any) -> Problems:
    """All prompts, the same at every call with the same config.

    Raises: DataError for a missing file, a bad line, an empty set, or a prompt that is too long.
    """
    if config.data.type == "countdown":
        return _countdown_problems(config.data, config.seed, tokenizer)
    return _jsonl_problems(config.data, tokenizer)


# --- countdown --------------------------------------------------------------------------------------------------------


def _countdown_problems(data: CountdownData, seed: int, tokenizer: Any) -> Problems:
    """Rows of reasoning-gym, all solvable, in its order. The first `num_eval` distinct problems are held out: no
    training row has the same numbers, in any order, and target. Training rows may repeat, as there are few small
    problems.
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
    row = 0
    while True:
        try:
            metadata = dataset[row]["metadata"]
        except ValueError as error:
            raise DataError(
                f"countdown: reasoning-gym found no expression of {data.num_numbers} numbers with a value in "
                f"[1, {data.max_target}]; raise data.max_target"
            ) from error
        yield metadata["numbers"], metadata["target"]
        row += 1


def countdown_solutions(prompts: Sequence[Prompt], tokenizer: Any, seed: int) -> list[tuple[int, ...]]:
    """One correct response per countdown prompt, as token ids that end with the end-of-sequence token.

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
    """All (text, value, precedence) that use each number once; precedence: 0 for + -, 1 for * /, 2 for a number."""
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


# --- JSON lines -------------------------------------------------------------------------------------------------------


def _jsonl_problems(data: JsonlData, tokenizer: Any) -> Problems:
    train, rows = _read_jsonl(data.train_path, data, tokenizer, first_id=0)
    held_out = [] if data.eval_path is None else _read_jsonl(data.eval_path, data, tokenizer, first_id=rows)[0]
    return Problems(train, held_out)


def _read_jsonl(path: str, data: JsonlData, tokenizer: Any, first_id: int) -> tuple[list[Prompt], int]:
    """Prompts of one file, and its number of rows: dropped ones count, so that dropping does not renumber the rest."""
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file; data.train_path and data.eval_path name JSON-lines files")
    prompts, rows, dropped, longest = [], 0, 0, 0
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            record = _parse_line(line, f"{path}, line {number}")
            token_ids = _encode_problem(record, data, tokenizer)
            if len(token_ids) > data.max_prompt_tokens:
                if data.overlong_prompts == "error":
                    raise DataError(
                        f"{path}, line {number}: the prompt has {len(token_ids)} tokens, data.max_prompt_tokens="
                        f"{data.max_prompt_tokens}; raise that limit, or set data.overlong_prompts=drop"
                    )
                dropped, longest = dropped + 1, max(longest, len(token_ids))
            else:
                answer = record["answer"] if isinstance(record["answer"], str) else json.dumps(record["answer"])
                source = str(record.get("source", Path(path).stem))
                prompts.append(Prompt(first_id + rows, token_ids, answer, source))
            rows += 1
    if not rows:
        raise DataError(f"{path}: holds no problem; expected one JSON object per line with `problem` and `answer`")
    if not prompts:
        raise DataError(
            f"{path}: all {rows} prompts exceed data.max_prompt_tokens={data.max_prompt_tokens} (longest {longest}); "
            "raise it"
        )
    if dropped:
        log.warning("%s: dropped %d of %d prompts above %d tokens", path, dropped, rows, data.max_prompt_tokens)
    return prompts, rows


def _parse_line(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error}); expected an object with `problem` and `answer`") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: got {type(record).__name__}, expected an object with `problem` and `answer`")
    missing = [field for field in ("problem", "answer") if record.get(field) is None]
    if missing:
        raise DataError(f"{where}: lacks {' and '.join(missing)}; it has {', '.join(record) or 'no field'}")
    if not isinstance(record["problem"], str) or not record["problem"].strip():
        raise DataError(f"{where}: `problem` must be a text that is not empty, got {record['problem']!r}")
    return record


def _encode_problem(record: dict[str, Any], data: JsonlData, tokenizer: Any) -> tuple[int, ...]:
    """A row's own suffix and system prompt, which `megatron-rl data prepare` writes, come before the config's."""
    suffix, system = record.get("suffix"), record.get("system")
    return encode_prompt(
        record["problem"] + (data.suffix if suffix is None else suffix),
        data.system_prompt if system is None else system,
        tokenizer,
    )


def encode_prompt(text: str, system_prompt: str | None, tokenizer: Any) -> tuple[int, ...]:
    """Token ids of a prompt: by the tokenizer's chat template when it has one, else of the plain text."""
    if tokenizer.chat_template is None:
        return tuple(tokenizer.encode(f"{system_prompt}\n\n{text}" if system_prompt else text))
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages = [*system, {"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # the template has written the special tokens already
    return tuple(tokenizer.encode(rendered, add_special_tokens=False))


# --- order ------------------------------------------------------------------------------------------------------------


class PromptCursor:
    """Where the run is in its endless sequence of prompts: each epoch a new shuffle, fixed by (seed, epoch)."""

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        """Starts at the first epoch. Raises: DataError without prompts."""
        if not prompts:
            raise DataError("no training prompts")
        self._prompts, self._seed = list(prompts), seed
        self._epoch, self._position = 0, 0
        self._order = self._shuffle()

    @property
    def prompts(self) -> list[Prompt]:
        """All of them, in the order of the data."""
        return self._prompts

    def take(self, count: int, exclude: Collection[int] = ()) -> list[Prompt]:
        """The next `count` distinct prompts, passing over those whose prompt_id is in `exclude`.

        Repetition is possible only where an epoch ends within a step; a prompt passed over is not made up for.

        Raises: DataError when fewer than `count` prompts are left to choose from; the cursor then stays.
        """
        available = len(self._prompts)
        if exclude:
            available = sum(prompt.prompt_id not in exclude for prompt in self._prompts)
        if count > available:
            raise DataError(
                f"{count} prompts are wanted, but of the data set's {len(self._prompts)} only {available} have not "
                "been drawn in this step; use more problems, lower train.prompts_per_step, or lower "
                "dynamic_sampling.max_batches"
            )
        taken: dict[int, Prompt] = {}
        while len(taken) < count:
            if self._position == len(self._order):
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._shuffle()
            prompt = self._prompts[self._order[self._position]]
            self._position += 1
            if prompt.prompt_id not in exclude:
                taken.setdefault(prompt.prompt_id, prompt)
        return list(taken.values())

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "seed": self._seed,
            "num_prompts": len(self._prompts),
        }

    def restore(self, state: dict[str, int]) -> None:
        """Continue where `state` was taken. Raises: DataError when the data or the seed are not those of `state`."""
        for name, value in (("seed", self._seed), ("num_prompts", len(self._prompts))):
            if state[name] != value:
                raise DataError(
                    f"the checkpoint's data order has {name}={state[name]}, this run has {value}; resume with the same "
                    "data and seed, or start afresh with train.resume=never"
                )
        self._epoch, self._position = state["epoch"], state["position"]
        self._order = self._shuffle()

    def _shuffle(self) -> list[int]:
        keys = hash64(self._seed, self._epoch, torch.arange(len(self._prompts)))
        return torch.argsort(keys, stable=True).tolist()
