"""optimizer.cpu_offload: where Adam's state lies changes no bit, of updates, of checkpoints, of what goes on from them.

On a CPU both places are host memory; what is proven is which copy is updated, written back, saved and restored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config import parse_config
from megatron_rl.errors import ConfigError
from tests.policy.checkpoint_case import config_of, load_newest, update
from tests.policy.tiny import hf_model, make_config, policy_of, same_bits, save, weights_of
from tests.worlds import Worlds

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {"world_size": 2}),
    "tp2": (2, {"tp": 2}),
}


def _offloading(config: Any) -> Any:
    raw = config.model_dump()
    raw["optimizer"]["cpu_offload"] = True
    return parse_config(raw)


def _ways(config: Any, folder: Path) -> dict[str, bool]:
    """What equals the same updates without offloading, bit for bit."""
    from megatron_rl.policy.checkpoint import CheckpointStore

    def store(name: str, policy: Any) -> CheckpointStore:
        return CheckpointStore(folder / name, policy, policy.groups)

    hosted, found = _offloading(config), {}
    with policy_of(config) as policy:
        update(policy, config, range(2))
        store("plain", policy).save(2, {})
        results, end = update(policy, config, range(2, 4)), weights_of(policy)
    with policy_of(hosted) as policy:
        start = weights_of(policy)
        store("start", policy).save(1, {})
        update(policy, hosted, range(2))
        (chained,) = policy.optimizer.chained_optimizers
        inner = chained.optimizer
        assert type(inner).__name__ == "HybridDeviceOptimizer" and inner.gpu_optimizer is None
        assert inner.gpu_params_map_cpu_copy and not same_bits(start, weights_of(policy))
        store("hosted", policy).save(2, {})
        found["straight"] = update(policy, hosted, range(2, 4)) == results and same_bits(weights_of(policy), end)
    for name, given, checkpoint in (
        ("hosted to hosted", hosted, "hosted"),
        ("hosted to plain", config, "hosted"),
        ("plain to hosted", hosted, "plain"),
    ):
        with policy_of(given) as policy:
            assert load_newest(store(checkpoint, policy)) == (2, {})
            found[name] = update(policy, given, range(2, 4)) == results and same_bits(weights_of(policy), end)
    with policy_of(hosted) as policy:
        assert load_newest(store("start", policy)) == (1, {})
        update(policy, hosted, range(2))
        found["from the start"] = update(policy, hosted, range(2, 4)) == results and same_bits(weights_of(policy), end)
    return found


@pytest.mark.parametrize("layout", ["one", "dp2", pytest.param("tp2", marks=pytest.mark.slow)])
def test_every_way_gives_the_same_bits(worlds: Worlds, tmp_path: Path, layout: str) -> None:
    size, parallel = LAYOUTS[layout]
    config = config_of(save(hf_model(tie_word_embeddings=True), tmp_path / "model"), parallel, "bfloat16")
    for rank in worlds.run(size, _ways, config, tmp_path / "checkpoints"):
        assert len(rank) == 5 and all(rank.values()), rank


def test_what_cannot_be_combined_is_refused_at_load() -> None:
    optimizer, model = {"lr": 1e-3, "cpu_offload": True}, {"dtype": "bfloat16"}
    with pytest.raises(ConfigError, match=r"in float32 Megatron's .* updates views of the weights.*dtype=bfloat16"):
        make_config(None, optimizer=optimizer)
    with pytest.raises(ConfigError, match=r"is for Megatron's distributed optimizer; set parallel.distributed_optim"):
        make_config(None, model=model, optimizer=optimizer, parallel={"distributed_optimizer": False})
    with pytest.raises(ConfigError, match=r"share_memory=true: the latter brings all of the optimizer's state to the"):
        server = {"engine": "sglang", "server": {"share_memory": True}}
        make_config(None, model=model, optimizer=optimizer, rollout=server)
