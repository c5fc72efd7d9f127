"""model.fused_linear_stats: statistics, one update's weights and its gradient norm are those of the layers apart."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rl.config import parse_config
from tests.policy.tiny import HF, hf_model, make_batch, make_config, policy_of, save, weights_of, worst
from tests.worlds import Worlds

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2": {"tp": 2},
    "tp2_sp": {"tp": 2, "sp": True},
    "cp2": {"cp": 2},
    "pp2_vpp2": {"pp": 2, "vpp": 2},  # the last chunk of the last stage; tied, it has a copy of the embedding
}


def _outcome(folder: Path, parallel: dict[str, Any], fused: str) -> tuple[dict[str, Tensor], float, list[Any], int]:
    """Weights after one update, the gradient norm, statistics before it, and the width of what the model returns."""
    from megatron_rl.algorithms.losses import LOSSES
    from megatron_rl.policy.schedule import run_schedule

    config = make_config(
        folder, parallel=parallel, model={"fused_linear_stats": fused}, loss={"type": "ppo_clip", "entropy_coef": 0.1}
    )
    with policy_of(config) as policy:
        mini_batch = make_batch(config, policy.groups).mini_batches[0]
        stats = policy.stats(mini_batch, with_sum_p2=True)
        with torch.no_grad():
            widths = run_schedule(policy.model, mini_batch, lambda output, _: output.shape[1], forward_only=True)
        result = policy.update(mini_batch, LOSSES[config.loss.type], config.loss)
        values = [(s.logprobs, s.entropy, s.sum_p2, s.sum_p2_logp) for s in stats]
        return weights_of(policy), result.grad_norm, values, max(widths, default=0)


def _outcomes(folders: list[Path], parallel: dict[str, Any]) -> list[Any]:
    return [[_outcome(folder, parallel, fused) for fused in ("off", "on")] for folder in folders]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("fused")
    return [
        save(hf_model(tie_word_embeddings=tied, num_hidden_layers=4), root / f"tied_{tied}") for tied in (False, True)
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_equals_apart(worlds: Worlds, folders: list[Path], layout: str) -> None:
    parallel = LAYOUTS[layout]
    size = math.prod(parallel.get(way, 1) for way in ("tp", "pp", "cp"))
    for rank in worlds.run(size, _outcomes, folders, parallel):
        for apart, fused in rank:
            assert worst(apart[0], fused[0]) < 2e-6
            assert fused[1] == pytest.approx(apart[1], rel=1e-5)
            for want, got in zip(apart[2], fused[2], strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            if apart[3]:  # the last stage
                assert (apart[3], fused[3]) == (-(-HF["vocab_size"] // parallel.get("tp", 1)), HF["hidden_size"])


def test_auto_goes_by_the_size_of_the_logits() -> None:
    """20,000 tokens x 152,064 columns in bfloat16 are 5.7 GiB, and 2.8 GiB at TP 2 or CP 2."""
    from megatron_rl.policy.build import fuses_output_layer

    def fuses(mode: str, **parallel: int) -> bool:
        raw = make_config(None).model_dump()
        raw["model"] |= {"fused_linear_stats": mode, "dtype": "bfloat16"}
        raw["parallel"] |= parallel
        raw["train"] |= {"micro_batch_tokens": 20_000}
        return fuses_output_layer(parse_config(raw), 152_064)

    assert fuses("auto") and fuses("on", tp=2)
    assert not fuses("auto", tp=2) and not fuses("auto", cp=2) and not fuses("off")
