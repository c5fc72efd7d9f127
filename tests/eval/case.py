"""A model folder of two layers with a byte-level tokenizer, sets of a few problems, and engines that know the answers:
everything but the sampling of tokens is what a real evaluation runs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml

from megatron_rl.config import Config
from megatron_rl.eval.benchmarks import load_benchmarks
from megatron_rl.eval.commands import evaluation_config
from megatron_rl.rollout.build import ENGINES
from megatron_rl.rollout.engine import Place, Request
from megatron_rl.types import Rollout
from tests.tiny import HF, answer_to

EOS = "<|endoftext|>"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}<assistant>"


def byte_tokenizer() -> Any:
    """One token per byte; <|endoftext|> is 256: transformers loads it as a Qwen2Tokenizer, which wants that one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: i for i, word in enumerate([*alphabet, EOS])}
    backend = Tokenizer(models.BPE(vocab=words, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=EOS, unk_token=EOS, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write_model(folder: Path, **changes: Any) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    hf = HF | {"vocab_size": len(tokenizer), "max_position_embeddings": 4096, "eos_token_id": tokenizer.eos_token_id}
    hf |= changes
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_set(path: Path, count: int, name: str = "p") -> Path:
    rows = [{"id": f"{name}-{i}", "problem": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(count)]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_config(folder: Path, **sections: Any) -> Path:
    raw: dict[str, Any] = {
        "name": "t",
        "model": {"path": str(folder / "model")},
        "data": {"type": "jsonl", "train_path": "none.jsonl", "max_prompt_tokens": 2000},
        "rollout": {"max_response_tokens": 8, "batch_size": 6},
        "reward": {"function": "tests.eval.case:boxed_exact", "workers": 0},
        "train": {"micro_batch_tokens": 4096},
        "logging": {"run_dir": str(folder / "runs" / "{name}"), "tensorboard": False},
    }
    for section, changes in sections.items():
        raw[section] = raw.get(section, {}) | changes
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def resolved(path: Path, *overrides: str, out: Path) -> Config:
    return evaluation_config(path, list(overrides), None, out)


def boxed_exact(response: str, answer: str) -> float:
    return float(f"\\boxed{{{answer}}}" in response)


def any_text(response: str, answer: str) -> float:
    """An untrained model then gets a mixture."""
    return float(sum(map(ord, response)) % 3 == 0)


def slow_any_text(response: str, answer: str) -> float:
    time.sleep(float(os.environ.get("GRADE_SECONDS", "0")))
    return any_text(response, answer)


def lone_place() -> Place:
    return Place(0, 1, 0, lambda value: [value])


class KnowingEngine:
    """Answers prompt p, sample i with `answer(gold of p, i)`; takes weights as any engine does."""

    def __init__(self, golds: dict[tuple[int, ...], str], answer: Any, tokenizer: Any) -> None:
        self.golds, self.answer, self.tokenizer = golds, answer, tokenizer
        self.requests: list[Request] = []
        self.weights: dict[str, torch.Size] = {}

    def update_weights(self, stream: Iterable[Any], weight_version: int) -> None:
        self.weights = {name: tensor.shape for name, tensor in stream}

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Rollout]]:
        for index, request in enumerate(requests):
            self.requests.append(request)
            text = self.answer(self.golds[request.token_ids], request.sample_index)
            tokens = [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]
            yield index, answer_to(request, tokens)

    def close(self) -> None:
        pass


def run_knowing(config: Config, answer: Any) -> tuple[list[Any], KnowingEngine | None]:
    """`evaluate_model` in this process with a knowing engine; None when none was started."""
    from megatron_rl.data.tokenizer import build_tokenizer
    from megatron_rl.eval.run import evaluate_model, write_results

    tokenizer, engines = build_tokenizer(config), []
    golds = {p.prompt.token_ids: p.prompt.answer for b in load_benchmarks(config, tokenizer) for p in b.problems}

    def build(config: Any, setup: Any) -> KnowingEngine:
        engines.append(KnowingEngine(golds, answer, tokenizer))
        return engines[-1]

    with mock.patch.dict(ENGINES, {config.rollout.engine: build}):
        results = evaluate_model(config, lone_place())
    write_results(config, results)
    return results, engines[0] if engines else None
