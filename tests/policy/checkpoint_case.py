"""What the tests of checkpoints share: a policy with a lively optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_rl.algorithms.methods.ppo_clip import PpoClipLoss
from megatron_rl.config import Config
from megatron_rl.errors import UserError
from tests.policy.tiny import make_batch, make_config, policy_of

OPTIMIZER = {"lr": 3e-3, "weight_decay": 0.1, "clip_grad": 0.5, "schedule": "cosine", "warmup_steps": 1, "eps": 1e-5}
EXTRA = {"cursor": {"epoch": 3, "position": 17}, "seed": 1}


def config_of(folder: Path, parallel: dict[str, Any], dtype: str = "float32", **train: Any) -> Config:
    return make_config(folder, parallel=parallel, optimizer=OPTIMIZER, model={"dtype": dtype}, train=train)


def update(policy: Any, config: Config, updates: range) -> list[tuple[float, float]]:
    """The numbered updates of one fixed batch: (gradient norm, learning rate) of each."""

    batch = make_batch(config, policy.groups)
    results = [policy.update(batch.mini_batches[i], PpoClipLoss()) for i in updates]
    return [(result.grad_norm, result.learning_rate) for result in results]


def moments(policy: Any) -> list[torch.Tensor]:
    """All of this rank's optimizer state, in the order of its parameters."""
    state = policy.optimizer.chained_optimizers[0].optimizer.state
    return [value.clone() for of_parameter in state.values() for _, value in sorted(of_parameter.items())]


def load_newest(store: Any) -> tuple[int, dict[str, Any]] | None:
    path = store.newest()
    return None if path is None else store.load(path)


def load_errors(cases: list[tuple[Config, Path]]) -> list[str]:
    from megatron_rl.policy.checkpoint import CheckpointStore

    found = []
    for config, folder in cases:
        with policy_of(config) as policy:
            try:
                load_newest(CheckpointStore(folder, policy, policy.groups))
                found.append("no error")
            except UserError as error:
                found.append(str(error))
    return found
