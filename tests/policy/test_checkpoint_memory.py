"""A save costs a rank its share of the checkpoint, not the model's: on the disk and in memory, against the plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rl import device
from megatron_rl.config import Config
from megatron_rl.models.facts import read_hf_config
from megatron_rl.plan.memory import host_parts
from megatron_rl.plan.shapes import layout_of, shape_of
from tests.policy.tiny import HF, make_config, policy_of
from tests.worlds import Worlds

MIB = 2**20
# 13 million parameters, so that what is copied stands out from what Python needs
WIDE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "head_dim": 64, "vocab_size": 8192}


def _grown(config: Config, folder: Path) -> tuple[int, int]:
    """Resident bytes that a second save and a load added at their peaks: the first brings Megatron's own imports."""
    from megatron_rl.policy.checkpoint import CheckpointStore

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    with policy_of(config) as policy:
        store = CheckpointStore(folder, policy, policy.groups)
        store.load(store.save(1, {}))
        before = resident()
        device.reset_peak()
        path = store.save(2, {})
        saved, before = device.peak_since_reset() - before, resident()
        device.reset_peak()
        store.load(path)
        return saved, device.peak_since_reset() - before


def test_a_save_takes_a_ranks_share_of_memory(worlds: Worlds, tmp_path: Path) -> None:
    config = make_config(None, model={"hf_config": HF | WIDE, "dtype": "bfloat16"}, parallel={"world_size": 4})
    shape = shape_of(read_hf_config(config.model))
    share = host_parts(config, shape, layout_of(config), 2, ranks=1)["checkpoint"]
    grown = worlds.run(4, _grown, config, tmp_path)
    print(f"share {share / MIB:.0f} MiB, grown {[[round(g / MIB) for g in pair] for pair in grown]}")
    for rank, (saving, loading) in enumerate(grown):
        written = (tmp_path / f"step_00000002/__{rank}_0.distcp").stat().st_size
        assert written == pytest.approx(share, rel=0.1)
        assert saving < share + 10 * MIB and loading < share + 10 * MIB  # gathered: 12 times the share
