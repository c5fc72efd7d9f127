"""Resuming is exact on one layout, agrees across layouts, and never starts from a damaged checkpoint."""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megatron_rl.config import Config
from tests.policy.checkpoint_case import EXTRA, OPTIMIZER, config_of, load_errors, load_newest, moments, update
from tests.policy.tiny import HF, hf_model, make_config, policy_of, same_bits, save, weights_of, worst
from tests.worlds import Worlds


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(hf_model(tie_word_embeddings=True), tmp_path_factory.mktemp("checkpoint"))


def _draws() -> list[float]:
    """One number of every generator that a step may draw from."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    drawn = [random.random(), float(np.random.random()), float(torch.rand(()))]
    with get_cuda_rng_tracker().fork():
        return [*drawn, float(torch.rand(()))]


def _writing_waits_for(file: Path) -> Any:
    """In the background process: updates that follow a save then come before its first byte."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    write, rank_process = FileSystemWriterAsync.write_preloaded_data, os.getpid()

    def late(*args: Any) -> None:
        while os.getpid() != rank_process and not file.exists():
            time.sleep(0.01)
        write(*args)

    return mock.patch.object(FileSystemWriterAsync, "write_preloaded_data", late)


def _save_and_go_on(config: Config, folder: Path) -> dict[str, Any]:
    from megatron_rl.policy.checkpoint import CheckpointStore

    updated = folder.with_suffix(".updated")
    with policy_of(config) as policy, _writing_waits_for(updated):
        store = CheckpointStore(folder, policy, policy.groups)
        assert store.newest() is None and load_newest(store) is None
        update(policy, config, range(2))
        policy.skipped_in_a_row = 2
        _draws()
        path = store.save(2, EXTRA)
        assert store.newest() == (None if config.train.async_save else path)
        found = {"path": path, "weights": weights_of(policy), "moments": moments(policy), "draws": _draws()}
        found["results"] = update(policy, config, range(2, 4))
        found["end"] = weights_of(policy)
        store.finish(wait=False)
        assert config.train.async_save == (store.newest() is None)
        updated.touch()
        store.finish()
        assert store.newest() == path
    return found


def _load_and_go_on(config: Config, folder: Path) -> dict[str, Any]:
    from megatron_rl.policy.checkpoint import CheckpointStore

    with policy_of(config) as policy:
        store = CheckpointStore(folder, policy, policy.groups)
        groups = policy.optimizer.param_groups
        for group in groups:
            group["bias_correction"] = True  # Transformer Engine's Adam has options that torch's does not save
        before = [{name: value for name, value in group.items() if name not in ("params", "lr")} for group in groups]
        loaded = load_newest(store)
        for group, own in zip(policy.optimizer.param_groups, before, strict=True):
            assert group.items() >= own.items() and isinstance(group.get("step", 0), int)
        found = {"loaded": loaded, "weights": weights_of(policy), "moments": moments(policy)}
        found |= {"draws": _draws(), "skipped": policy.skipped_in_a_row}
        found["results"] = update(policy, config, range(2, 4))
        found["end"] = weights_of(policy)
    return found


def _save_and_load(cases: list[tuple[Config, Path]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [(_save_and_go_on(*case), _load_and_go_on(*case)) for case in cases]


def _load_each(cases: list[tuple[Config, Path]]) -> list[dict[str, Any]]:
    return [_load_and_go_on(*case) for case in cases]


ASYNC = " in the background"
SAME_LAYOUT: dict[str, tuple[int, dict[str, Any], str]] = {
    "one": (1, {}, "float32"),
    "one, without distributed optimizer": (1, {"distributed_optimizer": False}, "float32"),
    "dp2": (2, {"world_size": 2}, "float32"),
    "dp2, without distributed optimizer": (2, {"world_size": 2, "distributed_optimizer": False}, "float32"),
    "tp2": (2, {"tp": 2}, "float32"),
    "pp2": (2, {"pp": 2}, "float32"),
    "dp2, bf16": (2, {"world_size": 2}, "bfloat16"),
    "tp2, bf16, without distributed optimizer": (2, {"tp": 2, "distributed_optimizer": False}, "bfloat16"),
    "one" + ASYNC: (1, {}, "float32"),
    "dp2" + ASYNC: (2, {"world_size": 2}, "float32"),
    "tp2" + ASYNC: (2, {"tp": 2}, "float32"),
}


@pytest.fixture(scope="module")
def saved(
    worlds: Worlds, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, list[Any]]]:
    """Layout -> (checkpoint folder, per rank what was saved and what came back)."""
    root, found = tmp_path_factory.mktemp("saved"), {}
    for size in (1, 2):
        cases = {
            layout: (config_of(model_folder, parallel, dtype, async_save=layout.endswith(ASYNC)), root / layout)
            for layout, (processes, parallel, dtype) in SAME_LAYOUT.items()
            if processes == size
        }
        ranks = worlds.run(size, _save_and_load, list(cases.values()))
        for i, (layout, (_, folder)) in enumerate(cases.items()):
            found[layout] = folder, [rank[i] for rank in ranks]
    return found


@pytest.mark.parametrize("layout", SAME_LAYOUT)
def test_resuming_is_exact(saved: dict[str, tuple[Path, list[Any]]], layout: str) -> None:
    folder, ranks = saved[layout]
    for before, after in ranks:
        assert before["path"] == folder / "step_00000002"
        assert after["loaded"] == (2, EXTRA)
        assert same_bits(before["weights"], after["weights"])
        assert len(before["moments"]) == len(after["moments"]) > 0
        assert all(torch.equal(a, b) for a, b in zip(before["moments"], after["moments"], strict=True))
        assert before["draws"] == after["draws"] and after["skipped"] == 2
        assert before["results"] == after["results"]
        assert same_bits(before["end"], after["end"])
        assert not same_bits(after["weights"], after["end"])


@pytest.mark.parametrize("saved_by", ["one", "tp2", "dp2", "pp2"])
def test_resuming_under_another_layout(
    worlds: Worlds, saved: dict[str, tuple[Path, list[Any]]], model_folder: Path, saved_by: str
) -> None:
    """The weights are the same bits; two more updates agree within 5e-7 (measured), the learning rates exactly."""
    folder, ranks = saved[saved_by]
    before = ranks[0][0]
    loaders = [name for name in ("tp2", "dp2", "pp2") if name != saved_by]
    cases = [(config_of(model_folder, SAME_LAYOUT[name][1]), folder) for name in loaders]
    for rank in worlds.run(2, _load_each, cases):
        for name, after in zip(loaders, rank, strict=True):
            assert after["loaded"] == (2, EXTRA)
            assert same_bits(before["weights"], after["weights"]), name
            assert after["draws"] != before["draws"]  # of ranks that are not the same
            print(f"{saved_by} -> {name}: {worst(before['end'], after['end']):.1e}")
            assert worst(before["end"], after["end"]) < 5e-6, name
            for (norm, rate), (other_norm, other_rate) in zip(before["results"], after["results"], strict=True):
                assert other_norm == pytest.approx(norm, rel=1e-5) and other_rate == rate


def test_checkpoints_cross_context_parallelism_and_virtual_stages(worlds: Worlds, tmp_path: Path) -> None:
    """Each resumes exactly on its own layout, and on one process with the same weights and moments."""
    model = save(hf_model(tie_word_embeddings=True, num_hidden_layers=4), tmp_path / "model")
    layouts = {"pp2_vpp2": {"pp": 2, "vpp": 2}, "cp2": {"cp": 2}}
    cases = [(config_of(model, parallel), tmp_path / name) for name, parallel in layouts.items()]
    saved = worlds.run(2, _save_and_load, cases)
    for before, after in saved[0]:
        assert same_bits(before["weights"], after["weights"]) and before["results"] == after["results"]
        assert same_bits(before["end"], after["end"]) and not same_bits(after["weights"], after["end"])
    (alone,) = worlds.run(1, _load_each, [(config_of(model, {}), folder) for _, folder in cases])
    for (before, _), after in zip(saved[0], alone, strict=True):
        assert same_bits(before["weights"], after["weights"])
        print(f"{worst(before['end'], after['end']):.1e}")
        assert worst(before["end"], after["end"]) < 5e-6
        for (norm, rate), (other_norm, other_rate) in zip(before["results"], after["results"], strict=True):
            assert other_norm == pytest.approx(norm, rel=1e-5) and other_rate == rate


def _save_before_the_first_update(cases: list[tuple[Config, Path]]) -> None:
    from megatron_rl.policy.checkpoint import CheckpointStore

    for config, folder in cases:
        with policy_of(config) as policy:
            start = weights_of(policy)
            CheckpointStore(folder, policy, policy.groups).save(3, {})
            assert same_bits(start, weights_of(policy))
            straight = update(policy, config, range(3)), weights_of(policy)
        with policy_of(config) as policy:
            assert load_newest(CheckpointStore(folder, policy, policy.groups)) == (3, {})
            assert same_bits(start, weights_of(policy))
            assert update(policy, config, range(3)) == straight[0] and same_bits(weights_of(policy), straight[1])


def test_a_run_whose_updates_were_all_skipped_can_be_saved(worlds: Worlds, model_folder: Path, tmp_path: Path) -> None:
    options = [({}, "float32"), ({"distributed_optimizer": False}, "float32"), ({"tp": 1}, "bfloat16")]
    cases = [(config_of(model_folder, *option), tmp_path / str(i)) for i, option in enumerate(options)]
    worlds.run(1, _save_before_the_first_update, cases)


MOE = {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    "head_dim": 8,
}


def test_experts_resume_under_expert_parallelism_and_refuse_to_leave_it(worlds: Worlds, tmp_path: Path) -> None:
    """Megatron fails with a KeyError, or a count of entries, when the optimizers are not the same."""
    ep2, dp2 = (
        make_config(None, model={"hf_config": HF | MOE}, parallel={"world_size": 2, **own}, optimizer=OPTIMIZER)
        for own in ({"ep": 2}, {})
    )
    for before, after in [pairs[0] for pairs in worlds.run(2, _save_and_load, [(ep2, tmp_path / "ep2")])]:
        assert same_bits(before["weights"], after["weights"]) and before["results"] == after["results"]
        assert same_bits(before["end"], after["end"])
    worlds.run(2, _save_and_load, [(dp2, tmp_path / "dp2")])
    for messages in worlds.run(2, load_errors, [(dp2, tmp_path / "ep2"), (ep2, tmp_path / "dp2")]):
        assert "saved with parallel.ep=2, and here it is 1" in messages[0]
        assert "saved with parallel.ep=1, and here it is 2" in messages[1]


# --- how the ranks share the work -------------------------------------------------------------------------------------


def _save_both_ways(cases: list[tuple[Config, Path]]) -> list[dict[str, Any]]:
    """Megatron's own gathering of the optimizer's state, and a rank's own share of it."""
    from megatron_rl.policy import checkpoint, optimizer_state

    found = []
    for config, folder in cases:
        with policy_of(config) as policy:
            update(policy, config, range(2))
            with mock.patch.object(checkpoint, "share_state"):
                checkpoint.CheckpointStore(folder / "gathered", policy, policy.groups).save(2, EXTRA)
            with mock.patch.object(optimizer_state, "assemble", wraps=optimizer_state.assemble) as assembled:
                checkpoint.CheckpointStore(folder / "shared", policy, policy.groups).save(2, EXTRA)
            found.append({"assembled": assembled.call_count, "weights": weights_of(policy), "moments": moments(policy)})
    return found


def test_a_checkpoint_is_the_one_that_megatron_gathers(worlds: Worlds, model_folder: Path, tmp_path: Path) -> None:
    """The same tensors under the same names, though weights lie on borders between ranks; and either loads."""
    from megatron_rl.convert.torch_dist import TorchDistReader

    layouts = {"dp4": {"world_size": 4}, "tp2_dp2": {"world_size": 4, "tp": 2}}
    cases = [(config_of(model_folder, own, "bfloat16"), tmp_path / name) for name, own in layouts.items()]
    saved = worlds.run(4, _save_both_ways, cases)
    for _, folder in cases:
        gathered, shared = (TorchDistReader(folder / way / "step_00000002") for way in ("gathered", "shared"))
        assert gathered.tensors.keys() == shared.tensors.keys() and len(gathered.tensors) > 30
        for key in gathered.tensors:
            assert torch.equal(gathered.read(key), shared.read(key)), key
    loads = [worlds.run(4, _load_each, [(c, f / way) for c, f in cases]) for way in ("gathered", "shared")]
    for rank, before in enumerate(saved):
        for case, one in enumerate(before):
            assert one["assembled"] > 0
            for after in (loaded[rank][case] for loaded in loads):
                assert same_bits(one["weights"], after["weights"])
                assert all(torch.equal(a, b) for a, b in zip(one["moments"], after["moments"], strict=True))


def test_ranks_with_the_same_weights_write_equal_shares(saved: dict[str, tuple[Path, list[Any]]]) -> None:
    for layout in ("dp2", "dp2, bf16", "dp2, without distributed optimizer"):
        first, second = ((saved[layout][0] / f"step_00000002/__{rank}_0.distcp").stat().st_size for rank in (0, 1))
        assert 0.8 < first / second < 1.25, layout


# --- what a checkpoint holds beside the state -------------------------------------------------------------------------


def test_a_checkpoint_can_be_exported(saved: dict[str, tuple[Path, list[Any]]], model_folder: Path) -> None:
    from transformers import AutoConfig

    from megatron_rl.config import load_config

    folder = saved["tp2"][0] / "step_00000002"
    assert load_config(folder / "config.yaml") == config_of(model_folder, {"tp": 2})
    assert {path.name for path in (folder / "hf").iterdir()} == {"config.json", "generation_config.json"}
    written, given = (AutoConfig.from_pretrained(path) for path in (folder / "hf", model_folder))
    assert written.to_diff_dict() == given.to_diff_dict() and written.architectures == ["Qwen2ForCausalLM"]


# --- damage -----------------------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_named_on_every_rank(
    worlds: Worlds, saved: dict[str, tuple[Path, list[Any]]], model_folder: Path, tmp_path: Path
) -> None:
    def truncate(path: Path) -> None:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    damages: dict[str, Any] = {
        "truncated data": lambda folder: truncate(max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)),
        "lost data": lambda folder: next(iter(sorted(folder.glob("*.distcp")))).unlink(),
        "lost metadata": lambda folder: (folder / ".metadata").unlink(),
        "truncated common state": lambda folder: truncate(folder / "common.pt"),
        "lost common state": lambda folder: (folder / "common.pt").unlink(),
        "empty": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
    }
    source, _ = saved["tp2"]
    config, cases = config_of(model_folder, {"tp": 2}), []
    for what, damage in damages.items():
        shutil.copytree(source, tmp_path / what)
        damage(tmp_path / what / "step_00000002")
        cases.append((config, tmp_path / what))
    wider = save(hf_model(intermediate_size=64, tie_word_embeddings=True), tmp_path / "wider")
    cases.append((config_of(wider, {"tp": 2}), source))
    for messages in worlds.run(2, load_errors, cases):
        for (_, folder), message in zip(cases, messages, strict=True):
            assert f"cannot load the checkpoint {folder / 'step_00000002'}" in message, (folder.name, message)
            assert "train.resume=never" in message and "Traceback" not in message
