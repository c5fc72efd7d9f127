"""NCCL on both sides of the group in which weights are broadcast: one setting, one version."""

import os
import subprocess
from pathlib import Path

from megatron_rl import device
from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.rollout.engine import EngineError


def agree_with_engines(rollout: RolloutConfig) -> None:
    """Set NCCL_CUMEM_ENABLE=0, unless it is set, where a group with engines will exist; call it before the first group.

    SGLang does so in its processes, and a group whose members differ hangs or crashes. Servers of the run inherit it.
    Source: `_set_envs_and_config` of sglang.srt.entrypoints.engine.
    """
    if not rollout.is_embedded and rollout.weight_sync.mode == "disaggregated":
        os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")


def check_same_nccl(python: Path, own: str) -> None:
    """Check that an engine's interpreter has the trainer's NCCL, else they cannot join. Raises: EngineError."""
    command = [str(python), "-I", "-c", device.NCCL_VERSION_CODE]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:
        raise EngineError(f"{python} cannot name its NCCL: {answer.stderr.strip().rpartition(chr(10))[2]}")
    if (version := answer.stdout.strip()) != own:
        raise EngineError(
            f"{python} has NCCL {version}, the trainer {own}, and rollout.weight_sync.mode=disaggregated joins them in "
            "one group. Install one torch release in both environments, or set mode to colocated or disk"
        )
