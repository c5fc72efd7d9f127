"""Problems: tokenizers, the countdown game, JSON lines, and the order in which prompts are drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_rl.data.countdown import _countdown_problems
from megatron_rl.data.tokenizer import encode_prompt
from megatron_rl.errors import DataError
from megatron_rl.launch import say
from megatron_rl.types import Problems, Prompt

if TYPE_CHECKING:
    from megatron_rl.config import Config, JsonlData


def load_prompts(config: Config, tokenizer: Any) -> Problems:
    """All prompts, the same at every call with the same config.

    Raises: DataError for a missing file, a bad line, an empty set, or a prompt that is too long.
    """
    if config.data.type == "countdown":
        return _countdown_problems(config.data, config.seed, tokenizer)
    return _jsonl_problems(config.data, tokenizer)


# --- countdown --------------------------------------------------------------------------------------------------------


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
            record = parse_line(line, f"{path}, line {number}")
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
        say(f"{path}: dropped {dropped} of {rows} prompts above data.max_prompt_tokens={data.max_prompt_tokens}")
    return prompts, rows


def parse_line(line: str, where: str) -> dict[str, Any]:
    """Return one record of a problems' file. Raises: DataError, beginning with `where`, when it is not one."""
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


# --- order ------------------------------------------------------------------------------------------------------------
