"""The mini-batch that two layouts are compared on: the config's own prompts, and responses that no engine sampled."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_rl.algorithms.hashing import hash64, hash_uniform
from megatron_rl.config import Config
from megatron_rl.types import MicroBatch, MiniBatch, Prompt, Rollout

LEARNING_RATE = 1e-3  # large enough for an update to show in bfloat16 weights
_MOVED = 0.3  # nats: how far log-probabilities lie apart from their old ones, so that clipping bites
_MISMATCH = 0.05  # nats between trainer and engine
_ROLES = {"length": 1, "tokens": 2, "reward": 3, "old": 4, "rollout": 5, "ref": 6, "given": 7}  # fields of the hashes


def frozen_config(config: Config, tokens: int, multiple: int = 1) -> Config:
    """Return the config with a step of one update of about `tokens` tokens, in at least two micro-batches a rank, and a
    learning rate whose movement is visible. `multiple`: of tokens, to which the reference pads a micro-batch."""
    train, rollout = config.train, config.rollout
    samples = train.prompts_per_minibatch * rollout.samples_per_prompt
    response = max(1, min(rollout.max_response_tokens, 2 * tokens // samples))
    multiple = math.lcm(multiple, config.parallel.token_multiple)
    longest = -(-(config.data.max_prompt_tokens + response) // multiple) * multiple
    budget = min(train.micro_batch_tokens, max(longest, tokens // (2 * config.parallel.dp)))
    step = {"prompts_per_step": train.prompts_per_minibatch, "micro_batch_tokens": budget, "async_save": False}
    adam = {"lr": LEARNING_RATE, "schedule": "constant", "warmup_steps": 0}
    changes: dict[str, Any] = {
        "train": train.model_copy(update=step),
        "rollout": rollout.model_copy(update={"max_response_tokens": response}),
        "optimizer": config.optimizer.model_copy(update=adam),
    }
    return config.model_copy(update=changes)


def frozen_rollouts(config: Config, prompts: Sequence[Prompt]) -> list[Rollout]:
    """Return `samples_per_prompt` rollouts of each prompt: lengths, tokens (those of the prompts) and rewards by hash.

    Some tokens after a response's first are given, as a turn of the environment would be, so that ranks with equally
    many tokens have different numbers of them that count.
    """
    words = torch.tensor([token for prompt in prompts for token in prompt.token_ids])
    most, rollouts = config.rollout.max_response_tokens, []
    for prompt in prompts:
        for sample in range(config.rollout.samples_per_prompt):
            key = (config.seed, prompt.prompt_id, sample)
            length = 1 + int(hash64(*key, _ROLES["length"]).abs() % most)
            drawn = words[hash64(*key, _ROLES["tokens"], torch.arange(length)).abs() % len(words)]
            token_ids = torch.cat([torch.tensor(prompt.token_ids), drawn])
            place = torch.arange(len(token_ids)) - len(prompt.token_ids)
            given = int(hash64(*key, _ROLES["given"]).abs() % length)
            reward = float(hash_uniform(*key, _ROLES["reward"]))
            rollouts.append(
                Rollout(
                    prompt_id=prompt.prompt_id,
                    sample_index=sample,
                    token_ids=token_ids,
                    rollout_logprobs=torch.zeros(len(token_ids)),
                    sampled=(place == 0) | (place > given),
                    finish_reason="stop",
                    weight_version=0,
                    reward=reward,
                )
            )
    return rollouts


def with_old_policies(mini_batch: MiniBatch, seed: int, *, has_reference: bool) -> MiniBatch:
    """Return the mini-batch, which carries statistics, with the log-probabilities of other policies: the current ones
    moved by a hash of the token, so that every layout moves them alike."""
    micro_batches = mini_batch.micro_batches
    mini_batch = mini_batch.replace_each("old_logprobs", [_moved(m, seed, "old", _MOVED) for m in micro_batches])
    mini_batch = mini_batch.replace_each(
        "rollout_logprobs", [_moved(m, seed, "rollout", _MISMATCH) for m in mini_batch.micro_batches]
    )
    if has_reference:
        refs = [_moved(m, seed, "ref", _MOVED) for m in mini_batch.micro_batches]
        mini_batch = mini_batch.replace_each("ref_logprobs", refs)
    return mini_batch


def _moved(micro_batch: MicroBatch, seed: int, role: str, nats: float) -> Tensor:
    noise = 2 * hash_uniform(seed, _ROLES[role], micro_batch.token_ids_global) - 1
    base = micro_batch.computed_stats.logprobs if role != "rollout" else micro_batch.old_logprobs
    assert base is not None
    return torch.where(micro_batch.loss_mask, base + nats * noise.to(base), 0.0).to(base.dtype)
