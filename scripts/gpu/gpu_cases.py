"""Models, configs and batches of the GPU test's parts: random weights and made-up problems, drawn alike on every
device, small on a CPU."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl import device
from megatron_rl.algorithms.control import LossController
from megatron_rl.config import Config, ParallelConfig, parse_config
from megatron_rl.config.environment import for_libraries
from megatron_rl.conform.frozen import frozen_rollouts
from megatron_rl.data.problems import load_prompts
from megatron_rl.data.tokenizer import build_tokenizer, character_tokenizer
from megatron_rl.models.facts import read_hf_config
from megatron_rl.packing import Layout, pack
from megatron_rl.parallel.groups import Groups, init_groups
from megatron_rl.policy.policy import MegatronPolicy
from megatron_rl.run import build_policy
from megatron_rl.train import advantages
from megatron_rl.types import MiniBatch, TrainBatch, UpdateResult

PROBLEMS = 32
PROMPT_TOKENS = 16
WAITING_SECONDS = 120.0


def small_model(**changes: Any) -> dict[str, Any]:
    """Return a config.json: logits wide enough that tokens differ, a vocabulary that a GPU pads."""
    model = {
        "model_type": "qwen2",
        "vocab_size": 1000,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "initializer_range": 0.1,
    }
    return model | changes


def larger_model(**changes: Any) -> dict[str, Any]:
    """Return one of 0.25e9 parameters on a GPU, whose memory and rounding are no longer those of a toy; on a CPU the
    small one."""
    if not device.ON_GPU:
        return small_model(**changes)
    sizes = {
        "vocab_size": 32_000,
        "hidden_size": 1536,
        "intermediate_size": 4096,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "initializer_range": 0.03,
    }
    return small_model(**sizes | {"max_position_embeddings": 4096} | changes)


def write_problems(folder: Path) -> dict[str, Any]:
    """Write problems and a tokenizer of single characters; return the config's section `data`."""
    folder.mkdir(parents=True, exist_ok=True)
    path, tokenizer = folder / "problems.jsonl", folder / "tokenizer"
    rows = [{"problem": f"{7 + i},{3 * i + 1},{50 - i}={i + 11}:", "answer": str(i)} for i in range(PROBLEMS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    character_tokenizer().save_pretrained(tokenizer)
    return {
        "type": "jsonl",
        "train_path": str(path),
        "eval_path": str(path),
        "tokenizer": str(tokenizer),
        "max_prompt_tokens": PROMPT_TOKENS,
    }


def raw_config(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a run in one process: two updates a step of 4 prompts x 8 samples. Keywords change options
    by section."""
    raw: dict[str, Any] = {
        "name": "test",
        "seed": 5,
        "model": {"hf_config": small_model()},
        "parallel": {"tp": 1},
        "data": write_problems(folder),
        "rollout": {"samples_per_prompt": 8, "max_response_tokens": 64},
        "reward": {"function": "gpu_cases:mostly_digits", "workers": 0},
        "loss": {"type": "ppo_clip"},
        "optimizer": {"lr": 1e-3},
        "train": {
            "num_steps": 4,
            "prompts_per_step": 8,
            "prompts_per_minibatch": 4,
            "micro_batch_tokens": 1024,
            "share_prompts": False,
            "save_final": False,
        },
        "logging": {"run_dir": str(folder / "run"), "tensorboard": False, "samples_per_step": 0},
    }
    for section, changes in sections.items():
        raw[section] = raw[section] | changes if isinstance(raw.get(section), dict) else changes
    return raw


def mostly_digits(response: str, answer: str) -> float:
    """Reward a response of which at least half is digits: an untrained policy gets both 0 and 1."""
    return float(2 * sum(character.isdigit() for character in response) >= len(response))


def config_of(folder: Path, **sections: dict[str, Any]) -> Config:
    """Return `raw_config`, checked."""
    return parse_config(raw_config(folder, **sections))


def join(config: Config) -> Groups:
    """Return the world of this process alone, with the environment that the config's libraries read. Before CUDA."""
    os.environ.update(for_libraries(config))
    return _world(config.seed)


@functools.cache
def _world(seed: int) -> Groups:
    return init_groups(ParallelConfig(), seed, WAITING_SECONDS)


def policy_of(config: Config, groups: Groups) -> MegatronPolicy:
    """Return a fresh policy, as a run builds it."""
    return build_policy(dict(read_hf_config(config.model)), config, groups, total_updates=8)[0]


def batch_of(config: Config, groups: Groups) -> TrainBatch:
    """Return a step's batch on the device: made-up responses and rewards, the same everywhere."""
    prompts = load_prompts(config, build_tokenizer(config), lambda answer: True).train
    rollouts = frozen_rollouts(config, prompts[: config.train.prompts_per_step])
    return pack(rollouts, advantages(rollouts, config), Layout.of(config, groups), step=0).to(device.device())


def update(policy: MegatronPolicy, batch: TrainBatch, number: int) -> UpdateResult:
    """Make the update of mini-batch `number`, counted round the step's, as `run_step` makes it. The batch carries old
    log-probabilities."""
    config, ranks = policy.config, policy.groups.token_ranks
    mini_batch: MiniBatch = batch.mini_batches[number % len(batch.mini_batches)]
    loss = LossController(config.loss, ranks).next_loss(batch)
    mini_batch = policy.with_selection_stats(mini_batch, loss)
    mini_batch = loss.mark(mini_batch, ranks, seed=config.seed, step=0)
    return policy.update(mini_batch, loss)


def state_of(policy: MegatronPolicy) -> list[Tensor]:
    """Return copies of the weights and of all moments, on the host."""
    states = [adam.state for c in policy.optimizer.chained_optimizers if (adam := c.optimizer) is not None]
    moments = [
        value.detach().cpu().clone()
        for state in states
        for of_parameter in state.values()
        for _, value in sorted(of_parameter.items())
        if isinstance(value, Tensor)
    ]
    return [parameter.detach().cpu().clone() for _, parameter in policy.parameters] + moments


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    """Return whether two states have the same tensors, bit for bit."""
    return len(a) == len(b) and all(map(torch.equal, a, b))


def parameter_count(policy: MegatronPolicy) -> int:
    """Return the number of this process's parameters."""
    return sum(parameter.numel() for _, parameter in policy.parameters)
