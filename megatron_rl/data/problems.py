"""The training and held-out problems of a run as prompts."""

from collections.abc import Callable
from typing import Any

from megatron_rl.config import Config, JsonlData
from megatron_rl.data.countdown import _countdown_problems
from megatron_rl.data.rows import read_rows, with_suffix
from megatron_rl.data.tokenizer import encode_prompt
from megatron_rl.errors import DataError
from megatron_rl.launch import say
from megatron_rl.types import Problems, Prompt


def load_prompts(config: Config, tokenizer: Any, is_readable: Callable[[str], bool] = lambda answer: True) -> Problems:
    """Return all prompts, the same at every call with the same config.

    `is_readable`: whether the verifier can read a gold answer. Those that it takes as text alone are told.
    Raises: DataError for a missing file, a bad line, an empty set, or a prompt that is too long.
    """
    if config.data.type == "countdown":
        return _countdown_problems(config.data, config.seed, tokenizer)
    data = config.data
    train, rows = _read_prompts(data.train_path, data, tokenizer, is_readable, first_id=0)
    if data.eval_path is None:
        return Problems(train, [])
    return Problems(train, _read_prompts(data.eval_path, data, tokenizer, is_readable, first_id=rows)[0])


def _read_prompts(
    path: str, data: JsonlData, tokenizer: Any, is_readable: Callable[[str], bool], first_id: int
) -> tuple[list[Prompt], int]:
    """Return the prompts of one file and its number of rows, dropped ones included: dropping renumbers nothing.

    A row's own suffix and system prompt, which `megatron-rl data prepare` writes, come before the config's.
    """
    prompts, rows, overlong, unreadable = [], 0, [], []
    for where, row in read_rows(path):
        text = with_suffix(row.problem, data.suffix if row.suffix is None else row.suffix)
        system = data.system_prompt if row.system is None else row.system
        token_ids = encode_prompt(text, system, tokenizer, row.turns, where)
        if len(token_ids) > data.max_prompt_tokens:
            if data.overlong_prompts == "error":
                raise DataError(
                    f"{where}: the prompt has {len(token_ids)} tokens, data.max_prompt_tokens="
                    f"{data.max_prompt_tokens}; raise that limit, or set data.overlong_prompts=drop"
                )
            overlong.append(len(token_ids))
        else:
            prompts.append(Prompt(first_id + rows, token_ids, row.answer, row.source))
            if not is_readable(row.answer):
                unreadable.append(f"{where}: {row.answer!r:.100}")
        rows += 1
    if not prompts:
        raise DataError(
            f"{path}: all {rows} prompts exceed data.max_prompt_tokens={data.max_prompt_tokens} (longest "
            f"{max(overlong)}); raise it"
        )
    if overlong:
        say(f"{path}: dropped {len(overlong)} of {rows} prompts above data.max_prompt_tokens={data.max_prompt_tokens}")
    say_unreadable(path, unreadable, rows)
    return prompts, rows


def say_unreadable(path: object, unreadable: list[str], rows: int) -> None:
    """Tell how many gold answers of a set the verifier takes as text alone, and show the first."""
    if unreadable:
        say(
            f"{path}: the verifier reads {len(unreadable)} of {rows} gold answers in no way but as text, so only "
            f"the same text is right there; rewrite or drop them (docs/grading.md). First: {unreadable[0]}"
        )
