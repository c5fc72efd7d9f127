"""No layout changes the loss: copy this file, and put your own loss in the place of UsualLoss.

`megatron-rl conform` takes a mini-batch of the config's prompts through a layout and through one process: marked
tokens, loss, metrics, every gradient, two updates and a checkpoint must agree up to rounding; else it exits with 1.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from my_method import UsualLoss

from megatron_rl.types import MiniBatch, Ranks

HERE = Path(__file__).resolve().parent
CONFIG = HERE.parent / "configs" / "quickstart.yaml"
LAYOUTS = {"data": "parallel={world_size: 2}", "context": "parallel={cp: 2}", "pipeline": "parallel={pp: 2}"}


class LocalLoss(UsualLoss):
    """What must not be: a mean of this rank's tokens, by which the layout changes the loss."""

    def weights(self, mini_batch: MiniBatch, ranks: Ranks) -> torch.Tensor:
        """Return weights of mean 1 on this rank."""
        sizes = mini_batch.cat("advantages").double().abs()
        return sizes / sizes.mean()


def conform(loss: str, layout: str, folder: Path) -> subprocess.CompletedProcess[str]:
    section = f"loss={{type: '{loss}', width: 0.01}}"  # narrow, as the entropies of an untrained policy are all alike
    options = [section, layout, f"logging.run_dir={folder}/{{name}}", "--no-engine", "--tokens=512"]
    command = [sys.executable, "-m", "megatron_rl", "conform", str(CONFIG), *options]
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]  # every process must find the loss's module
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_layout_changes_the_loss(layout: str, tmp_path: Path) -> None:
    done = conform("my_method:UsualLoss", LAYOUTS[layout], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_loss_that_the_layout_changes_is_found(tmp_path: Path) -> None:
    done = conform("test_my_method:LocalLoss", LAYOUTS["data"], tmp_path)
    assert done.returncode == 1 and "loss" in done.stdout, done.stdout + done.stderr
