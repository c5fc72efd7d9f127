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
    from megatron_rl.policy.schedule import run_schedule

    config = make_config(
        folder, parallel=parallel, model={"fused_linear_stats": fused}, loss={"type": "ppo_clip", "entropy_coef": 0.1}
    )
    with policy_of(config) as policy:
        mini_batch = make_batch(config, policy.groups).mini_batches[0]
        stats = policy.stats(mini_batch, with_sum_p2=True)
        with torch.no_grad():
            widths = run_schedule(policy.model, mini_batch, lambda output, _: output.shape[1], forward_only=True)
        result = policy.update(mini_batch, config.loss)
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


def test_auto_goes_by_the_planners_memory() -> None:
    """The state of the model is far below its logits; between the two sums of bytes lies where fusing makes it fit."""
    from megatron_rl.models.hardware import FILL, HARDWARE, with_memory
    from megatron_rl.plan.memory import fuses_output_layer, memory_of
    from megatron_rl.plan.shapes import layout_of, shape_of

    def config(mode: str, **parallel: int) -> Any:
        raw = make_config(None).model_dump()
        raw["model"] |= {"fused_linear_stats": mode, "dtype": "bfloat16"}
        raw["model"]["hf_config"] |= {"vocab_size": 152_064}
        raw["parallel"] |= parallel
        raw["rollout"] |= {"engine": "sglang", "weight_sync": {"mode": "disaggregated"}, "max_response_tokens": 20_000}
        raw["rollout"]["server"] |= {"kv_tokens": 40_000}
        raw["train"] |= {"micro_batch_tokens": 30_000}
        raw["model"]["hf_config"]["max_position_embeddings"] = 30_000
        return parse_config(raw)

    def decides(given: Any, memory: float, on_gpu: bool) -> bool:
        shape = shape_of(given.model.hf_config)
        return fuses_output_layer(given, shape, layout_of(given), with_memory(memory, on_gpu=on_gpu))

    for on_gpu in (True, False):
        shape, hardware = shape_of(config("on").model.hf_config), HARDWARE["h100" if on_gpu else "cpu"]
        apart, fused = (
            memory_of(given, shape, layout_of(given), hardware).peak for given in (config("off"), config("on"))
        )
        assert fused < 0.9 * apart
        for memory, wanted in ((apart * 1.01, False), (apart * 0.99, True), (fused * 0.5, True)):
            assert decides(config("auto"), memory / FILL, on_gpu) == wanted
        assert decides(config("on"), 1e15, on_gpu) and not decides(config("off"), 1.0, on_gpu)
        assert not decides(config("auto", cp=2), apart * 0.99 / FILL, on_gpu)


def _decided(raw: dict[str, Any]) -> bool:
    """With memory that only the second rank is short of."""
    from unittest import mock

    import torch.distributed as dist

    from megatron_rl import device
    from megatron_rl.plan.memory import fuses_output_layer
    from megatron_rl.plan.shapes import layout_of, shape_of
    from megatron_rl.run import hardware_of

    config = parse_config(raw)
    with (
        mock.patch.object(device, "memory_bytes", lambda: 2**40 if dist.get_rank() == 0 else 2**20),
        policy_of(config) as policy,
    ):
        hardware = hardware_of(policy.groups.all_ranks)
        return fuses_output_layer(config, shape_of(config.model.hf_config), layout_of(config), hardware)


def test_all_ranks_decide_alike(worlds: Worlds) -> None:
    raw = make_config(None, model={"fused_linear_stats": "auto"}, parallel={"tp": 2}).model_dump()
    assert worlds.run(2, _decided, raw) == [True, True]
