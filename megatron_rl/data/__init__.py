"""The problems of a run: files and their rows, the countdown game, tokenizers, and the order of the prompts."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from megatron_rl.errors import DataError as DataError

if TYPE_CHECKING:  # `as`: for the files that import them from here
    from megatron_rl.data.countdown import countdown_solutions as countdown_solutions
    from megatron_rl.data.cursor import PromptCursor as PromptCursor
    from megatron_rl.data.problems import load_prompts as load_prompts
    from megatron_rl.data.tokenizer import build_tokenizer as build_tokenizer
    from megatron_rl.data.tokenizer import encode_prompt as encode_prompt
    from megatron_rl.data.tokenizer import pretrained_tokenizer as pretrained_tokenizer
    from megatron_rl.data.tokenizer import stop_token_ids as stop_token_ids
    from megatron_rl.data.tokenizer import vocab_size as vocab_size

_NAMES = {
    "countdown": "countdown_solutions",
    "cursor": "PromptCursor",
    "problems": "load_prompts",
    "tokenizer": "build_tokenizer encode_prompt pretrained_tokenizer stop_token_ids vocab_size",
}


def __getattr__(name: str) -> Any:
    # on demand, so that `data prepare` and `inspect`, which read files alone, need not wait for torch
    for module, names in _NAMES.items():
        if name in names.split():
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
