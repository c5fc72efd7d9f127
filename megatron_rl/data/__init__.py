"""The problems of a run: tokenizers, the countdown game, JSON lines, and the order in which prompts are drawn."""

from megatron_rl.data.countdown import countdown_solutions
from megatron_rl.data.cursor import PromptCursor
from megatron_rl.data.problems import Problems, load_prompts
from megatron_rl.data.tokenizer import (
    DataError,
    build_tokenizer,
    encode_prompt,
    pretrained_tokenizer,
    stop_token_ids,
    vocab_size,
)

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
