"""The problems of a run: files and their rows, the countdown game, tokenizers, and the order of the prompts."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from megatron_rl.errors import DataError

if TYPE_CHECKING:
    from megatron_rl.data.countdown import countdown_solutions
    from megatron_rl.data.cursor import PromptCursor
    from megatron_rl.data.problems import Problems, load_prompts
    from megatron_rl.data.tokenizer import (
        build_tokenizer,
        encode_prompt,
        pretrained_tokenizer,
        stop_token_ids,
        vocab_size,
    )

_MODULES = {
    "countdown_solutions": "countdown",
    "PromptCursor": "cursor",
    "Problems": "problems",
    "load_prompts": "problems",
    "build_tokenizer": "tokenizer",
    "encode_prompt": "tokenizer",
    "pretrained_tokenizer": "tokenizer",
    "stop_token_ids": "tokenizer",
    "vocab_size": "tokenizer",
}
__all__ = [
    "DataError",
    "Problems",
    "PromptCursor",
    "build_tokenizer",
    "countdown_solutions",
    "encode_prompt",
    "load_prompts",
    "pretrained_tokenizer",
    "stop_token_ids",
    "vocab_size",
]


def __getattr__(name: str) -> Any:
    # on demand, so that `data prepare` and `inspect`, which read files alone, need not wait for torch
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
