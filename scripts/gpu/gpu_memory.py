"""Peaks of each phase, as torch's allocator counts them, against the planner's formulas and a rehearsal."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from gpu_answer import Answer
from gpu_cases import config_of, join, larger_model, policy_of, small_model, update

from megatron_rl import device
from megatron_rl.config import Config, dump_config
from megatron_rl.models.facts import read_hf_config
from megatron_rl.models.hardware import HARDWARE
from megatron_rl.packing import Layout, pack
from megatron_rl.parallel.groups import Groups
from megatron_rl.plan.memory import Parts, memory_of
from megatron_rl.plan.shapes import layout_of, shape_of
from megatron_rl.policy.checkpoint import CheckpointStore
from megatron_rl.run import hardware_of
from megatron_rl.types import Rollout, TrainBatch

ALLOWED = {"planner": 0.15, "rehearsal": 0.1}  # of the measured peak
_NOT_TORCHS = ("process", "engine process", "engine weights", "KV cache", "sampling")  # the planner's, of other things
PROMPT, RESPONSE = 16, 240


def memory(answer: Answer) -> None:
    """Measure a small and a larger model in both dtypes and with recomputation."""
    models: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("small, float32", small_model(), {}),
        ("larger, bfloat16", larger_model(), {"dtype": "bfloat16"}),
        ("larger, bfloat16, recompute", larger_model(), {"dtype": "bfloat16", "recompute": "full"}),
    ]
    for name, model, options in models if device.ON_GPU else models[:1]:
        with TemporaryDirectory() as folder:
            config = memory_config(Path(folder), model, options)
            measured, predicted = peaks(config), planned(config)
            compare(answer, "planner", name, measured, {phase: sum(p.values()) for phase, p in predicted.items()})
            answer.figure(f"planner's parts, {name}", predicted)
            rehearsed(answer, name, config, measured)


def memory_config(folder: Path, model: dict[str, Any], options: dict[str, Any]) -> Config:
    """Return a config whose micro-batches are full: every sequence is as long as it may be."""
    return config_of(
        folder,
        model={"hf_config": model} | options,
        rollout={"samples_per_prompt": 8, "max_response_tokens": RESPONSE},
        train={"prompts_per_step": 8, "prompts_per_minibatch": 8, "micro_batch_tokens": 32 * (PROMPT + RESPONSE)},
    )


def full_batch(config: Config, groups: Groups) -> TrainBatch:
    """Return a batch of sequences of the longest length."""
    generator = torch.Generator().manual_seed(1)
    vocab, length = read_hf_config(config.model)["vocab_size"], PROMPT + RESPONSE
    rollouts = [
        Rollout(
            prompt_id=number // 8,
            sample_index=number % 8,
            token_ids=torch.randint(0, vocab, (length,), generator=generator),
            rollout_logprobs=torch.zeros(length),
            sampled=torch.arange(length) >= PROMPT,
            finish_reason="length",
            weight_version=0,
        )
        for number in range(64)
    ]
    advantages = torch.randn(64, generator=generator, dtype=torch.float64)
    return pack(rollouts, advantages, Layout.of(config, groups), step=0).to(device.device())


def peaks(config: Config) -> dict[str, float]:
    """Return bytes by phase: on a GPU what torch had allocated, on a CPU what the whole process held."""
    groups = join(config)
    found: dict[str, float] = {}
    policy = policy_of(config, groups)
    batch = full_batch(config, groups)
    update(policy, policy.with_old_logprobs(batch), 0)  # moments are there from here on

    def phase(name: str) -> None:
        found[name] = device.peak_since_reset()
        device.give_back_memory()
        device.reset_peak()

    phase("first step")
    batch = policy.with_old_logprobs(batch)
    phase("old logprobs")
    update(policy, batch, 0)
    phase("training")
    CheckpointStore(config.run_dir / "checkpoints", policy, groups).save(1, {})
    phase("checkpoint")
    del found["first step"]
    return found


def planned(config: Config) -> dict[str, Parts]:
    """Return the planner's parts by phase, of what torch allocates; on a CPU those of an H200."""
    hardware = hardware_of(join(config).all_ranks) if device.ON_GPU else HARDWARE["h200"]
    memory = memory_of(config, shape_of(dict(read_hf_config(config.model))), layout_of(config), hardware)
    return {
        phase: {part: size for part, size in parts.items() if part not in _NOT_TORCHS}
        for phase, parts in memory.phases.items()
    }


def compare(answer: Answer, who: str, name: str, measured: dict[str, float], predicted: dict[str, float]) -> None:
    """Add a line with each phase's error."""
    errors = {phase: predicted[phase] / measured[phase] - 1 for phase in measured}
    answer.figure(f"{who}, {name}", {"measured": measured, "predicted": predicted})
    text = ", ".join(f"{phase} {predicted[phase] / 2**20:.0f} MiB ({error:+.0%})" for phase, error in errors.items())
    if device.ON_GPU:
        # a toy's peak is workspaces that no formula counts
        is_near = max(map(abs, errors.values())) <= ALLOWED[who] or name.startswith("small")
        answer.check(f"{who}, {name}", is_near, text)
    else:
        answer.skip(f"{who}, {name}", f"what is predicted is a GPU's, and this is a CPU's process: {text}")


def rehearsed(answer: Answer, name: str, config: Config, measured: dict[str, float]) -> None:
    """Add a line with the rehearsal's peaks."""
    if importlib.util.find_spec("megatron_rl.rehearse") is None:
        answer.skip(f"rehearsal, {name}", "this release has no megatron_rl.rehearse")
        return
    folder = config.run_dir.parent
    path = folder / "config.yaml"
    path.write_text(dump_config(config))
    command = [sys.executable, "-m", "megatron_rl", "rehearse", str(path), "--full", "--gpu", "h200"]
    done = subprocess.run([*command, "--output", str(folder)], capture_output=True, text=True)
    if not (folder / "rehearsal.json").exists():
        answer.check(f"rehearsal, {name}", False, f"code {done.returncode}: {done.stderr.strip()[-500:]}")
        return
    (rank,) = json.loads((folder / "rehearsal.json").read_text())["ranks"]
    sizes = {p["name"]: sum(v for k, v in p["parts"].items() if k not in _NOT_TORCHS) for p in rank["phases"]}
    updates = max(size for phase, size in sizes.items() if phase.startswith("update"))
    compare(answer, "rehearsal", name, measured, sizes | {"training": updates})
