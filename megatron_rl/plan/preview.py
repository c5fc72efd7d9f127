"""What the policy will be asked, for `megatron-rl train --check`: the first prompt, token by token as training encodes
it, and what ends a response.

Imports transformers, and torch with it: a few seconds, after the plan that needs neither.
"""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from megatron_rl.config import Config
from megatron_rl.data import build_tokenizer, load_prompts, stop_token_ids
from megatron_rl.models.facts import model_folder_fault


def preview_table(config: Config) -> Table:
    """Return the preview as a table for the terminal. Raises: DataError as training would."""
    table = Table(title="what the policy is asked", show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in preview_rows(config):
        table.add_row(name, Text(text))
    return table


def preview_rows(config: Config) -> list[tuple[str, str]]:
    """Read all problems and return (what, value) in reading order. A recipe can be checked where its model is not: then
    the one row says so.

    Raises: DataError when the tokenizer, its template or a problem cannot be used.
    """
    data, path = config.data, config.model.path
    if data.type == "jsonl" and data.tokenizer is None and path is not None and (fault := model_folder_fault(path)):
        return [("prompt", f"not shown, and the data not read: model.path={fault}")]
    tokenizer = build_tokenizer(config)
    problems, stops = load_prompts(config, tokenizer), stop_token_ids(config, tokenizer)
    first = problems.train[0]
    return [
        ("problems", f"{len(problems.train):,} for training, {len(problems.eval):,} held out"),
        (f"prompt ({len(first.token_ids)} tokens)", _decode(tokenizer, first.token_ids)),
        ("answer", first.answer),
        ("a response ends at", ", ".join(f"{_decode(tokenizer, [stop])} ({stop})" for stop in stops) or "its limit"),
    ]


def _decode(tokenizer: Any, token_ids: Any) -> str:
    return tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
