"""Whole runs small enough for a test: the countdown game, a policy of two layers and 32 channels, a second or less.

The rewards are functions of the text alone, so that an untrained policy gets a mixture of 0 and 1 and can learn.
"""

from __future__ import annotations

import contextlib
import json
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_rl.config import parse_config
from tests.worlds import leave_layout

HF: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,  # logits wide enough that entropies and covariances of tokens differ
}


def tiny_raw(folder: Path, name: str = "tiny", **sections: dict[str, Any]) -> dict[str, Any]:
    """Two updates a step of 2 prompts x 4 samples, at most 12 response tokens; keywords change options by section."""
    raw: dict[str, Any] = {
        "name": name,
        "seed": 3,
        "model": {"hf_config": HF},
        "parallel": {"tp": 2},
        "data": {"type": "countdown", "num_train": 64, "num_eval": 8, "max_prompt_tokens": 16},
        "rollout": {"samples_per_prompt": 4, "max_response_tokens": 12},
        "reward": {"function": "tests.tiny:mostly_digits", "workers": 0},  # a process would import all of this file
        "loss": {"type": "ppo_clip"},
        "optimizer": {"lr": 1e-3},
        "train": {
            "num_steps": 2,
            "prompts_per_step": 4,
            "prompts_per_minibatch": 2,
            "micro_batch_tokens": 96,
            "save_final": False,
        },
        "logging": {"run_dir": str(folder / "{name}"), "tensorboard": False, "samples_per_step": 0},
    }
    for section, changes in sections.items():
        raw[section] = raw.get(section, {}) | changes if isinstance(changes, dict) else changes
    return raw


def mostly_digits(response: str, answer: str) -> float:
    return float(2 * sum(character.isdigit() for character in response) >= len(response))


def slow_mostly_digits(response: str, answer: str) -> float:
    """A step then takes a tenth of a second or more: time for a signal to arrive in its middle."""
    time.sleep(0.01)
    return mostly_digits(response, answer)


def rows_of(raw: dict[str, Any], file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    path = parse_config(raw).run_dir / file
    return [json.loads(line) for line in path.read_text().splitlines()]


def measured(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what the machine decides: seconds, rates, bytes."""
    return {name: value for name, value in row.items() if not name.startswith(("time/", "throughput/", "memory/"))}


# --- on a rank of `worlds` --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def trained(raw: dict[str, Any]) -> Iterator[Any]:
    """The `Run` after `train.train` on this world; several may follow one another, under different layouts."""
    from megatron_rl import train
    from megatron_rl.parallel.groups import init_groups

    config, runs, set_up = parse_config(raw), [], train.set_up

    def remember(*arguments: Any) -> Any:
        runs.append(set_up(*arguments))
        return runs[-1]

    try:
        with mock.patch.object(train, "set_up", remember):
            train.train(config, init_groups(config.parallel, config.seed))
        yield runs[0]
    finally:
        leave_layout()


def train_each(raws: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    """One run after the other; the final weights of each."""
    weights = []
    for raw in raws:
        try:
            with trained(raw) as run:
                weights.append({name: tensor.clone() for name, tensor in run.policy.hf_weights()})
        except Exception as error:
            error.add_note(f"in the run {raw['name']}")
            raise
    return weights


def errors_of_each(raws: list[dict[str, Any]]) -> list[tuple[str, bool, str]]:
    """(type, whether the user is to mend it, message) of each run's failure on this rank; empty without one."""
    from megatron_rl.errors import UserError

    found = []
    for raw in raws:
        try:
            with trained(raw):
                found.append(("", False, ""))
        except Exception as error:
            message = str(error) if isinstance(error, UserError) else traceback.format_exc()
            found.append((type(error).__name__, isinstance(error, UserError), message))
    return found


def answer_to(request: Any, tokens: list[int], *, weight_version: int = 0, finish_reason: str = "stop") -> Any:
    """The rollout of a stand-in for an engine: `tokens` as the response, all by one version of the weights."""
    from megatron_rl.types import Rollout

    total = len(request.token_ids) + len(tokens)
    return Rollout(
        prompt_id=request.prompt_id,
        sample_index=request.sample_index,
        token_ids=torch.tensor([*request.token_ids, *tokens]),
        rollout_logprobs=torch.zeros(total),
        sampled=torch.arange(total) >= len(request.token_ids),
        finish_reason=finish_reason,
        weight_version=weight_version,
        spans=((weight_version, len(tokens)),),
    )
