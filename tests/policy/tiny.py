"""Tiny policies for the tests: Hugging Face folders with weights that hide no mistake, configs, batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_rl.config import Config, parse_config
from megatron_rl.models.facts import read_hf_config
from megatron_rl.packing import Layout, pack
from megatron_rl.types import MiniBatch, Rollout, TrainBatch
from tests.worlds import leave_layout

HF: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 37,  # padded at TP2
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 500.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "initializer_range": 0.15,
}


def hf_model(**changes: Any) -> Any:
    """A float32 transformers model whose biases and norm weights are not the trivial ones of initialisation."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**(HF | changes)), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def save(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def make_config(folder: Path | None, **sections: Any) -> Config:
    """4 mini-batches of 2 prompts x 4 samples a step, at most 24 tokens each, micro-batches of 40 tokens."""
    raw: dict[str, Any] = {
        "model": {"path": str(folder)} if folder else {"hf_config": HF},
        "data": {"type": "countdown", "max_prompt_tokens": 8},
        "rollout": {"samples_per_prompt": 4, "max_response_tokens": 16},
        "train": {"prompts_per_step": 8, "prompts_per_minibatch": 2, "micro_batch_tokens": 40},
        "optimizer": {"lr": 1e-3},
    }
    for name, section in sections.items():
        raw[name] = raw.get(name, {}) | section
    return parse_config(raw)


def make_rollouts() -> list[Rollout]:
    """32 ragged rollouts of 8 prompts, of which each sample takes the first tokens; `rollout_logprobs` are noise around
    log(1/37)."""
    generator = torch.Generator().manual_seed(5)
    prompts = torch.randint(37, (8, 8), generator=torch.Generator().manual_seed(7))
    rollouts = []
    for i in range(32):
        prompt, response = torch.randint(1, 9, (), generator=generator), torch.randint(1, 17, (), generator=generator)
        length = int(prompt + response)
        mask = torch.arange(length) >= prompt
        noise = -3.6 + 0.5 * torch.randn(length, generator=generator)
        token_ids = torch.randint(37, (length,), generator=generator)
        token_ids[:prompt] = prompts[i // 4, :prompt]
        rollouts.append(Rollout(i // 4, i % 4, token_ids, torch.where(mask, noise, 0.0), mask, "stop", 0))
    return rollouts


def make_advantages() -> Tensor:
    return torch.randn(32, generator=torch.Generator().manual_seed(6))


def make_batch(config: Config, groups: Any) -> TrainBatch:
    """This rank's share; the old logprobs are the rollouts' noise, so that ratios spread and the PPO clip bites."""
    batch = pack(make_rollouts(), make_advantages(), Layout.of(config, groups), step=0)
    return TrainBatch(0, tuple(_with_old(mini_batch) for mini_batch in batch.mini_batches))


def _with_old(mini_batch: MiniBatch) -> MiniBatch:
    return mini_batch.replace_each("old_logprobs", [mb.rollout_logprobs for mb in mini_batch.micro_batches])


@contextmanager
def policy_of(config: Config, total_updates: int = 8) -> Iterator[Any]:
    """A fresh MegatronPolicy on this world; several may follow one another, under different layouts."""
    from megatron_rl.parallel.groups import init_groups
    from megatron_rl.policy.policy import MegatronPolicy

    groups = init_groups(config.parallel, config.seed)
    yield MegatronPolicy(
        read_hf_config(config.model),
        config,
        groups,
        total_updates=total_updates,
        fuse_output_layer=config.model.fused_linear_stats == "on",
    )
    leave_layout()


def weights_of(policy: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in policy.hf_weights()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def worst(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest absolute difference."""
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)
