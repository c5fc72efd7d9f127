"""Triton's interpreter against the torch twin and a dense float64 softmax with autograd."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rl.kernels import vocab_torch
from megatron_rl.parallel.vocab import merge_stacked
from tests.kernels.case import CASES, REAL, inputs, run
from tests.worlds import ROOT

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """In a process of its own: Triton decides at its first import whether it interprets."""
    path = tmp_path_factory.mktemp("triton") / "results.pt"
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1",
        "MEGATRON_RL_DEVICE": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.case", str(path)], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return torch.load(path)


def _tolerance(name: str) -> dict[str, float]:
    exact = CASES[name][0] == torch.float64
    return {"rtol": 1e-12, "atol": 1e-12} if exact else {"rtol": 2e-6, "atol": 2e-6}


def _dense(name: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Logprobs, entropy, sum pi^2, sum pi^2 log pi, and gradients, of the real columns."""
    logits, labels, grad_logprobs, grad_entropy = inputs(name)
    x = logits.double().requires_grad_()
    log_p = torch.log_softmax(x[:, :REAL] / CASES[name][1], 1)
    p, finite = log_p.exp(), log_p.masked_fill(log_p == -torch.inf, 0.0)
    values = [log_p.gather(1, labels[:, None])[:, 0], -(p * finite).sum(1), (p * p).sum(1), (p * p * finite).sum(1)]
    losses = {"logprobs": (values[0] * grad_logprobs).sum(), "entropy": (values[1] * grad_entropy).sum()}
    losses["both"] = losses["logprobs"] + losses["entropy"]
    gradients = {used: torch.autograd.grad(loss, x, retain_graph=True)[0] for used, loss in losses.items()}
    return [value.detach() for value in values], gradients


@pytest.mark.parametrize("name", CASES)
def test_statistics_equal_float64_and_the_twin(interpreted: dict[str, Any], name: str) -> None:
    got, twin = interpreted[name], run(vocab_torch, name)
    assert got["stats"].dtype == twin["stats"].dtype
    torch.testing.assert_close(got["stats"], twin["stats"], rtol=2e-6, atol=2e-6)
    assert torch.equal(got["few"], got["stats"][..., :4])
    merged = merge_stacked(got["stats"], CASES[name][1])[2:]
    for value, want in zip(merged, _dense(name)[0], strict=True):
        torch.testing.assert_close(value.double(), want, **_tolerance(name))


@pytest.mark.parametrize("used", ["both", "logprobs", "entropy"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_float64_and_the_twin(interpreted: dict[str, Any], name: str, used: str) -> None:
    got, twin = interpreted[name]["gradients"][used], run(vocab_torch, name)["gradients"][used]
    dtype = CASES[name][0]
    assert got.dtype == dtype and torch.equal(got[:, REAL:], torch.zeros_like(got[:, REAL:]))
    tolerance = _tolerance(name)
    # computed in float32 and rounded once; a GPU rounds to the nearest bfloat16, the interpreter cuts bits off
    tolerance["rtol"] += torch.finfo(dtype).eps / (1 if dtype == torch.bfloat16 else 2)
    torch.testing.assert_close(got.double(), _dense(name)[1][used], **tolerance)
    tolerance["rtol"] += torch.finfo(dtype).eps / 2
    torch.testing.assert_close(got, twin, **tolerance)


def test_nan_is_not_lost(interpreted: dict[str, Any]) -> None:
    """A maximum drops NaN, and a clamp would: then a broken model would look healthy."""
    assert interpreted["nan"][0].isfinite().all() and interpreted["nan"][1, 1].isnan()
