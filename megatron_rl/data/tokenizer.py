"""Tokenizers, and how a problem's text becomes the prompt's token ids."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rl.config import Config
from megatron_rl.data.rows import Message
from megatron_rl.errors import DataError
from megatron_rl.models.facts import folder_hint, hf_folder, read_hf_config, require_model

_OPERATORS = frozenset("+-*/^=<>×÷·−±≤≥≠")
_COUNTDOWN_CHARACTERS = "0123456789+-*/(),=:"


def build_tokenizer(config: Config) -> Any:
    """Return the task's Hugging Face fast tokenizer: a token per character for countdown, else the configured folder's.

    Raises: DataError when there is no tokenizer folder, or the model's vocabulary is smaller than the tokenizer's;
    ConfigError when the model is not on this machine.
    """
    if config.data.type == "countdown":
        tokenizer = character_tokenizer()
    else:
        if config.data.tokenizer is None:
            require_model(config.model)
        tokenizer = pretrained_tokenizer(tokenizer_folder(config))
    hf_vocab_size = read_hf_config(config.model).get("vocab_size")
    if hf_vocab_size is not None and hf_vocab_size < vocab_size(tokenizer):
        remedy = "" if config.model.path else ", or raise model.hf_config.vocab_size"
        raise DataError(
            f"the model's vocab_size={hf_vocab_size} is below the tokenizer's {vocab_size(tokenizer)} tokens; give the "
            f"tokenizer that belongs to the model{remedy}"
        )
    return tokenizer


def tokenizer_folder(config: Config) -> Path | None:
    """Return the folder that the tokenizer comes from: data.tokenizer, else the model's; None where there is none."""
    if config.data.type == "countdown":
        return None
    if config.data.tokenizer is not None:
        return Path(config.data.tokenizer)
    return None if config.model.path is None else hf_folder(config.model.path)


def stop_token_ids(config: Config, tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens of which each ends a response: `rollout.stop_token_ids` where it is set, else the tokenizer's
    end-of-sequence token and all those that the folders of the model and the tokenizer name.

    Raises: DataError when there is none, or a folder names something that is no token id.
    """
    if config.rollout.stop_token_ids is not None:
        return config.rollout.stop_token_ids
    eos = tokenizer.eos_token_id
    stops = [] if eos is None else [eos]
    if config.data.type != "countdown":  # its tokens are not those that a model's folder numbers
        model = None if config.model.path is None else hf_folder(config.model.path)
        for folder in dict.fromkeys((model, tokenizer_folder(config))):
            stops += () if folder is None else _end_tokens(folder)
    if not stops:
        raise DataError("the tokenizer has no end-of-sequence token; set rollout.stop_token_ids ([] to stop nowhere)")
    return tuple(dict.fromkeys(stops))


@functools.cache  # what ends a response may not change during a run, whatever becomes of the folder
def _end_tokens(folder: Path) -> tuple[int, ...]:
    """Read `eos_token_id`, one or several: of generation_config.json, or as transformers does of config.json when there
    is no such file. Raises: DataError."""
    paths = [path for path in (folder / "generation_config.json", folder / "config.json") if path.is_file()]
    if not paths:
        return ()
    try:
        stated = json.loads(paths[0].read_bytes()).get("eos_token_id")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{paths[0]} cannot be read: {error}") from error
    ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
    if any(type(token) is not int or token < 0 for token in ids):
        raise DataError(
            f"{paths[0]}: eos_token_id is {stated!r}, expected a token id or a list of them; correct it, or set "
            "rollout.stop_token_ids"
        )
    return tuple(ids)


def vocab_size(tokenizer: Any) -> int:
    """Return the number of tokens, added ones included: the model's vocabulary, not padded, if no config gives it."""
    return len(tokenizer)


@functools.lru_cache(2**18)  # a step asks for each of its tokens again
def token_kind(tokenizer: Any, token_id: int) -> str:
    """Return what a token is by its text: `special`, `space` (nothing else), `number` (digits alone), `operator` (of
    arithmetic), `word` (with a letter) or `sign`, the rest; blanks around the text do not count."""
    text = tokenizer.decode([token_id]).strip()
    if not text:
        return "space"
    if text in tokenizer.all_special_tokens:
        return "special"
    if text.isdecimal():
        return "number"
    if set(text) <= _OPERATORS:
        return "operator"
    return "word" if any(map(str.isalpha, text)) else "sign"


def character_tokenizer() -> Any:
    """Return the countdown game's tokenizer: one token per character."""
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
    """Return the tokenizer of a local folder. Raises: DataError when there is none."""
    from transformers import AutoTokenizer

    if folder is None:
        raise DataError("data.tokenizer: model.hf_config brings no tokenizer; give the folder of one")
    if not Path(folder).is_dir():
        raise DataError(
            f"data.tokenizer: {folder} is no folder{folder_hint(folder)}; give a local Hugging Face tokenizer folder"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises plain Exception for a file that it cannot read
        raise DataError(
            f"data.tokenizer: {folder} holds no tokenizer that transformers can load ({type(error).__name__}: {error})"
        ) from error


def encode_prompt(
    text: str, system_prompt: str | None, tokenizer: Any, turns: Sequence[Message] = (), where: str = "a prompt"
) -> tuple[int, ...]:
    """Return the token ids of a conversation that ends with the user's `text`, ready for the response.

    The tokenizer's chat template renders it. Without a template the prompt is the plain text, behind the tokens that
    the tokenizer puts before a text (BOS); those that it puts behind one (EOS) are left out, as the response goes on.
    Raises: DataError, beginning with `where`, when the tokenizer or its template cannot take the conversation.
    """
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages = [*system, *turns, {"role": "user", "content": text}]
    if tokenizer.chat_template is None and turns:
        raise DataError(
            f"{where}: a conversation of {len(messages)} messages needs a chat template, and the tokenizer has none; "
            "give a tokenizer with one in data.tokenizer"
        )
    try:
        if tokenizer.chat_template is None:
            return _encode_open(f"{system_prompt}\n\n{text}" if system_prompt else text, tokenizer)
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # the template has written the special tokens already
        return tuple(tokenizer.encode(rendered, add_special_tokens=False))
    except Exception as error:  # templates raise what they like, tokenizers plain Exception
        what = "tokenizer's chat template" if type(error).__module__.startswith("jinja2") else "tokenizer"
        raise DataError(
            f"{where}: the {what} cannot take this conversation (roles: "
            f"{', '.join(message['role'] for message in messages)}): {type(error).__name__}: {error}"
        ) from error


def _encode_open(text: str, tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens of a text that goes on: special tokens before it, none behind it."""
    plain, whole = tokenizer.encode(text, add_special_tokens=False), tokenizer.encode(text)
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[: start + len(plain)])
    raise ValueError("its special tokens stand within the text, so the prompt's end cannot be told")
