"""NCCL on both sides of the group in which weights are broadcast: one setting, one version."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from megatron_rl import device
from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.rollout.engine import EngineError

_SECONDS = 300.0  # for an interpreter to import torch from a cold shared disk


def joins_engines(rollout: RolloutConfig) -> bool:
    """Return whether a run makes a process group with engine servers."""
    return not rollout.is_embedded and rollout.weight_sync.mode == "disaggregated"


def agree_with_engines(rollout: RolloutConfig) -> None:
    """Set NCCL_CUMEM_ENABLE=0, unless it is set, where a group with engines will exist; call it before the first group.

    SGLang does the same in its processes, and members that differ in it hang or crash. Servers of the run inherit it.
    Source: sglang.srt.entrypoints.engine, `_set_envs_and_config`.
    """
    if joins_engines(rollout):
        os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")


def check_same_nccl(python: Path, own_version: str) -> None:
    """Check that an engine's interpreter has the trainer's NCCL: others cannot join one group.

    Raises: EngineError with both versions.
    """
    try:
        answer = subprocess.run(
            [python, "-I", "-c", device.NCCL_VERSION_CODE], capture_output=True, text=True, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"{python} did not name its NCCL within {_SECONDS:g} s") from error
    if answer.returncode:
        raise EngineError(f"{python} cannot name its NCCL: {answer.stderr.strip().splitlines()[-1:]}")
    if (version := answer.stdout.strip()) != own_version:
        raise EngineError(
            f"rollout.weight_sync.mode=disaggregated joins trainer and engine in one NCCL group: {python} has NCCL "
            f"{version}, the trainer {own_version}. Install one torch release in both environments, or set mode to "
            "colocated or disk"
        )
