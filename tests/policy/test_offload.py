"""What makes room for an engine comes back as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_rl.config import Config
from tests.policy.checkpoint_case import config_of, moments, update
from tests.policy.tiny import hf_model, policy_of, same_bits, save, weights_of
from tests.worlds import Worlds


def _gradient_bytes(policy: Any) -> int:
    return sum(buffer.grad_data.untyped_storage().size() for ddp in policy.model.ddp for buffer in ddp.buffers)


def _saved_while_offloaded(config: Config, folder: Path) -> dict[str, Any]:
    """Two offloads, one before the first update made moments; a save within the second, as a rescue's."""
    from megatron_rl.policy.checkpoint import CheckpointStore

    found: dict[str, Any] = {}
    with policy_of(config) as policy:
        found["straight"] = update(policy, config, range(4)), weights_of(policy)
    with policy_of(config) as policy:
        store = CheckpointStore(folder, policy, policy.groups)
        policy.offload()
        policy.reload()
        kept = policy._host_copies._memory
        start = update(policy, config, range(2))
        before, full = moments(policy), _gradient_bytes(policy)
        policy.offload()
        found["kept"] = policy._host_copies._memory is kept
        state = policy.optimizer.chained_optimizers[0].optimizer.state
        ends = kept.data_ptr(), kept.data_ptr() + kept.nbytes
        found["in it"] = all(ends[0] <= s["exp_avg"].data_ptr() < ends[1] for s in state.values())
        found["gradients"] = [_gradient_bytes(policy)]
        store.save(2, {})
        found["gradients"].append(_gradient_bytes(policy))  # a rescue's engine may have their memory
        policy.reload()
        found["gradients"].append(_gradient_bytes(policy) - full)
        kept.fill_(255)  # whoever still reads there sees it
        found["moments"] = all(map(torch.equal, before, moments(policy)))
        found["offloaded"] = start + update(policy, config, range(2, 4)), weights_of(policy)
        store.save(4, {})
        found["gradients"].append(_gradient_bytes(policy) - full)
        store.load(store.path(2))
        found["loaded"] = all(map(torch.equal, before, moments(policy)))
    return found


def test_offloading_and_a_save_within_it_change_no_bit(worlds: Worlds, tmp_path: Path) -> None:
    model = save(hf_model(tie_word_embeddings=True), tmp_path / "model")
    config = config_of(model, {"world_size": 2}, "bfloat16")
    for found in worlds.run(2, _saved_while_offloaded, config, tmp_path / "checkpoints"):
        assert found["kept"] and found["in it"] and found["moments"] and found["loaded"]
        assert found["gradients"] == [0, 0, 0, 0]
        assert found["offloaded"][0] == found["straight"][0]
        assert same_bits(found["offloaded"][1], found["straight"][1])
