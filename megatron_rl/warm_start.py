"""Supervised steps on the task's own solutions, through the same Megatron policy, before RL; cached as a model
folder."""

import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

import torch

from megatron_rl import __version__, device, launch
from megatron_rl.algorithms.terms import sft
from megatron_rl.config import Config, WarmStartConfig
from megatron_rl.convert.disk import remove
from megatron_rl.convert.save_hf import save_hf
from megatron_rl.convert.weights import open_weights
from megatron_rl.data.countdown import countdown_solutions
from megatron_rl.models.facts import hf_folder
from megatron_rl.packing import Layout, pack_supervised
from megatron_rl.policy.policy import MegatronPolicy
from megatron_rl.types import Prompt


def warm_start(policy: MegatronPolicy, prompts: list[Prompt], layout: Layout, tokenizer: Any) -> None:
    """Train the policy on solutions, or load the cached result. The optimizer starts RL afresh afterwards.

    The cache key covers everything that the result depends on but the layout: layouts agree to float tolerance.
    Raises: UserError, on every rank, when the result cannot be written.
    """
    config, groups = policy.config, policy.groups
    options = config.warm_start
    assert options is not None
    world = groups.all_ranks
    # rank 0's key for all: a node's own copy of the model may have other times
    folder = Path(options.cache_dir) / world.gather_objects(_cache_key(config, len(prompts)))[0]
    # one answer for all ranks, found before any of them writes: another run may publish this folder at any moment
    if world.any(not folder.is_dir()):
        _train(policy, prompts, layout, tokenizer, options)
        draft = folder.with_name(f".{folder.name}.{os.getpid()}")  # rank 0's counts; another run has its own
        save_hf(policy, tokenizer, draft)
        if groups.rank == 0:
            _publish(draft, folder)
        groups.all_ranks.barrier()
    # also after training: RL then starts from the same bits whether or not the cache was warm
    policy.load(open_weights(folder, policy.hf_config).read)
    policy.reset_optimizer()


def _train(
    policy: MegatronPolicy, prompts: list[Prompt], layout: Layout, tokenizer: Any, options: WarmStartConfig
) -> None:
    config, groups = policy.config, policy.groups
    solutions = countdown_solutions(prompts, tokenizer, config.seed)
    pairs = [(prompt.token_ids, solution) for prompt, solution in zip(prompts, solutions, strict=True)]
    rng = random.Random(config.seed)
    for step in range(options.steps):
        mini_batch = pack_supervised(rng.sample(pairs, min(options.batch_size, len(pairs))), layout)
        mini_batch = mini_batch.to(device.device())
        policy.set_learning_rate(options.lr * (1 - step / options.steps))
        zeros = [torch.zeros_like(micro_batch.advantages) for micro_batch in mini_batch.micro_batches]
        result = policy.update(mini_batch.replace_each("old_logprobs", zeros), sft)
        if (step + 1) % max(1, options.steps // 5) == 0:
            # a pipeline's sums are on the host
            total, count = groups.token_ranks.sum(result.sums["loss/nll"].to(device.device())).tolist()
            launch.say(f"warm start  step {step + 1}/{options.steps}  nll {total / count:.3f} nats")


def _cache_key(config: Config, num_prompts: int) -> str:
    parts = {
        "version": __version__,
        "seed": config.seed,
        "model": config.model.model_dump(mode="json", include={"hf_config", "dtype"})
        | {"path": _fingerprint(Path(config.model.path)) if config.model.path is not None else None},
        "data": config.data.model_dump(mode="json"),
        "num_prompts": num_prompts,
        "warm_start": config.warm_start.model_dump(mode="json", exclude={"cache_dir"}) if config.warm_start else None,
        "adam": config.optimizer.model_dump(
            mode="json", include={"beta1", "beta2", "eps", "weight_decay", "clip_grad"}
        ),
        "temperature": config.rollout.temperature,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _fingerprint(model: Path) -> list[tuple[str, int, int]]:
    """(name, bytes, time of the last change in ns) of each file of a model folder, however its path is spelled.

    The weights themselves are not read: a hash of a large model takes minutes. So a copy with other times counts as
    another model, which costs a warm start; a file changed within its size and time goes unnoticed.
    """
    files = [file for folder in {model, hf_folder(model)} for file in folder.iterdir() if file.is_file()]
    stats = [(str(file.relative_to(model)), file.stat()) for file in files]
    return sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def _publish(draft: Path, folder: Path) -> None:
    """Rename the finished draft: a killed warm start leaves no half-written cache."""
    try:
        draft.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        remove(draft)  # another run published the same weights first
