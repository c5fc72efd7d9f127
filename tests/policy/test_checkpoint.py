"""Resuming is exact on one layout, agrees across layouts, and never starts from a damaged or unfinished checkpoint."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megatron_rl.config import Config
from megatron_rl.config_loss import PpoClipLoss
from megatron_rl.errors import UserError
from tests.policy.tiny import HF, hf_model, make_batch, make_config, policy_of, same_bits, save, weights_of, worst
from tests.worlds import Worlds

OPTIMIZER = {"lr": 3e-3, "weight_decay": 0.1, "clip_grad": 0.5, "schedule": "cosine", "warmup_steps": 1, "eps": 1e-5}
EXTRA = {"cursor": {"epoch": 3, "position": 17}, "seed": 1}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(hf_model(tie_word_embeddings=True), tmp_path_factory.mktemp("checkpoint"))


def _config(folder: Path, parallel: dict[str, Any], dtype: str = "float32", **train: Any) -> Config:
    return make_config(folder, parallel=parallel, optimizer=OPTIMIZER, model={"dtype": dtype}, train=train)


def _update(policy: Any, config: Config, updates: range) -> list[tuple[float, float]]:
    """The numbered updates of one fixed batch: (gradient norm, learning rate) of each."""
    from megatron_rl.algorithms.losses import ppo_clip

    batch = make_batch(config, policy.groups)
    results = [policy.update(batch.mini_batches[i], ppo_clip, PpoClipLoss()) for i in updates]
    return [(result.grad_norm, result.learning_rate) for result in results]


def _moments(policy: Any) -> list[torch.Tensor]:
    """All of this rank's optimizer state, in the order of its parameters."""
    state = policy.optimizer.chained_optimizers[0].optimizer.state
    return [value.clone() for of_parameter in state.values() for _, value in sorted(of_parameter.items())]


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
        assert store.newest() is None and store.load_newest() is None
        _update(policy, config, range(2))
        policy.skipped_in_a_row = 2
        _draws()
        path = store.save(2, EXTRA)
        assert store.newest() == (None if config.train.async_save else path)
        found = {"path": path, "weights": weights_of(policy), "moments": _moments(policy), "draws": _draws()}
        found["results"] = _update(policy, config, range(2, 4))
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
        found = {"loaded": store.load_newest(), "weights": weights_of(policy), "moments": _moments(policy)}
        found |= {"draws": _draws(), "skipped": policy.skipped_in_a_row}
        found["results"] = _update(policy, config, range(2, 4))
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
            layout: (_config(model_folder, parallel, dtype, async_save=layout.endswith(ASYNC)), root / layout)
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
    cases = [(_config(model_folder, SAME_LAYOUT[name][1]), folder) for name in loaders]
    for rank in worlds.run(2, _load_each, cases):
        for name, after in zip(loaders, rank, strict=True):
            assert after["loaded"] == (2, EXTRA)
            assert same_bits(before["weights"], after["weights"]), name
            assert after["draws"] != before["draws"]  # of ranks that are not the same
            print(f"{saved_by} -> {name}: {worst(before['end'], after['end']):.1e}")
            assert worst(before["end"], after["end"]) < 5e-6, name
            for (norm, rate), (other_norm, other_rate) in zip(before["results"], after["results"], strict=True):
                assert other_norm == pytest.approx(norm, rel=1e-5) and other_rate == rate


def _killed_while_saving(config: Config, folder: Path) -> dict[str, Any]:
    """The draft of step 9 is left behind; a later run must neither load it nor stumble over it."""
    from megatron_rl.policy.checkpoint import CheckpointStore

    found: dict[str, Any] = {}
    with policy_of(config) as policy:
        store = CheckpointStore(folder, policy, policy.groups)
        _update(policy, config, range(1))
        store.save(8, {"which": "finished"})

        def killed(self: CheckpointStore) -> None:
            raise KeyboardInterrupt  # all is written, but the rename has not happened

        with mock.patch.object(CheckpointStore, "_publish", killed), pytest.raises(KeyboardInterrupt):
            store.save(9, {"which": "draft"})
        found["left behind"] = sorted(path.name for path in folder.iterdir())
        store = CheckpointStore(folder, policy, policy.groups)
        found["newest"], found["loaded"] = store.newest(), store.load_newest()
        store.save(9, {"which": "second try"})
        found["retried"], found["kept"] = store.load_newest(), sorted(path.name for path in folder.iterdir())
        store.save(9, {"which": "same step again"})
        found["again"] = store.load_newest()
        store.save(10, {})
        found["at the end"] = sorted(path.name for path in folder.iterdir())
    return found


def test_a_killed_save_is_never_the_newest_and_only_the_newest_is_kept(
    worlds: Worlds, model_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    (tmp_path / "step_00000099.bak").mkdir()
    strangers = ["notes.txt", "step_00000099.bak"]
    found = worlds.run(1, _killed_while_saving, _config(model_folder, {}, keep_checkpoints=1), tmp_path)[0]
    assert found["left behind"] == [".step_00000009", "notes.txt", "step_00000008", "step_00000099.bak"]
    assert found["newest"] == tmp_path / "step_00000008" and found["loaded"] == (8, {"which": "finished"})
    assert found["retried"] == (9, {"which": "second try"}) and found["again"] == (9, {"which": "same step again"})
    assert found["kept"] == sorted([*strangers, "step_00000009"])
    assert found["at the end"] == sorted([*strangers, "step_00000010"])


def _keep(config: Config, folder: Path) -> list[tuple[list[str], str]]:
    """(checkpoints, the best) after each save; the second and the fourth are the best when they are made."""
    from megatron_rl.policy.checkpoint import CheckpointStore

    seen = []
    with policy_of(config) as policy:
        for step in range(1, 7):  # each save with a new store: what is kept is read from the disk
            CheckpointStore(folder, policy, policy.groups).save(step, {}, is_best=step in (2, 4))
            names = sorted(path.name[-1] for path in folder.iterdir() if path.name.startswith("step_"))
            seen.append((names, os.readlink(folder / "best")[-1] if step > 1 else ""))
    return seen


def test_the_newest_and_the_best_are_kept(worlds: Worlds, model_folder: Path, tmp_path: Path) -> None:
    seen = worlds.run(1, _keep, _config(model_folder, {}), tmp_path)[0]
    assert seen == [
        (["1"], ""),
        (["1", "2"], "2"),
        (["2", "3"], "2"),
        (["3", "4"], "4"),
        (["4", "5"], "4"),
        (["4", "5", "6"], "4"),
    ]
    assert (tmp_path / "best" / "metadata.json").is_file()


def _save_before_the_first_update(cases: list[tuple[Config, Path]]) -> None:
    from megatron_rl.policy.checkpoint import CheckpointStore

    for config, folder in cases:
        with policy_of(config) as policy:
            start = weights_of(policy)
            CheckpointStore(folder, policy, policy.groups).save(3, {})
            assert same_bits(start, weights_of(policy))
            straight = _update(policy, config, range(3)), weights_of(policy)
        with policy_of(config) as policy:
            assert CheckpointStore(folder, policy, policy.groups).load_newest() == (3, {})
            assert same_bits(start, weights_of(policy))
            assert _update(policy, config, range(3)) == straight[0] and same_bits(weights_of(policy), straight[1])


def test_a_run_whose_updates_were_all_skipped_can_be_saved(worlds: Worlds, model_folder: Path, tmp_path: Path) -> None:
    options = [({}, "float32"), ({"distributed_optimizer": False}, "float32"), ({"tp": 1}, "bfloat16")]
    cases = [(_config(model_folder, *option), tmp_path / str(i)) for i, option in enumerate(options)]
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
    for messages in worlds.run(2, _load_errors, [(dp2, tmp_path / "ep2"), (ep2, tmp_path / "dp2")]):
        assert "saved with parallel.ep=2, and here it is 1" in messages[0]
        assert "saved with parallel.ep=1, and here it is 2" in messages[1]


# --- what a checkpoint holds beside the state -------------------------------------------------------------------------


def test_a_checkpoint_can_be_exported(saved: dict[str, tuple[Path, list[Any]]], model_folder: Path) -> None:
    from transformers import AutoConfig

    from megatron_rl.config import load_config

    folder = saved["tp2"][0] / "step_00000002"
    assert load_config(folder / "config.yaml") == _config(model_folder, {"tp": 2})
    assert {path.name for path in (folder / "hf").iterdir()} == {"config.json", "generation_config.json"}
    written, given = (AutoConfig.from_pretrained(path) for path in (folder / "hf", model_folder))
    assert written.to_diff_dict() == given.to_diff_dict() and written.architectures == ["Qwen2ForCausalLM"]


# --- disks that are full ----------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """4 MiB. A checkpoint of the tiny policy has about 0.3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs needs root: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def _fill(folder: Path, free: int) -> None:
    """Leave about `free` bytes."""
    count = max(0, shutil.disk_usage(folder).free - free)
    (folder / f"filler{len(list(folder.iterdir()))}").write_bytes(b"x" * count)


def _save_on_a_full_disk(config: Config, disk: Path, estimate: int) -> dict[str, Any]:
    """Save once, then twice on a disk without room: seen before writing, and (believing `estimate`) while writing."""
    from megatron_rl.policy.checkpoint import CheckpointStore

    found: dict[str, Any] = {}
    with policy_of(config) as policy:
        folder = disk / "checkpoints"
        store = CheckpointStore(folder, policy, policy.groups)
        _update(policy, config, range(1))
        store.save(1, {"which": "good"})
        store.finish()
        found["bytes"] = sum(path.stat().st_size for path in (folder / "step_00000001").rglob("*"))
        if policy.groups.rank == 0:
            _fill(disk, 2**17)
        for name, patched in (("before", store._bytes_of), ("while", lambda state: estimate)):
            with mock.patch.object(store, "_bytes_of", patched):
                try:
                    store.save(2, {"which": "too much"})
                    store.finish()
                except UserError as error:
                    found[name] = str(error)
            found[f"left {name}"] = sorted(path.name for path in folder.iterdir())
        found["loaded"] = store.load_newest()
        for path in disk.glob("filler*") if policy.groups.rank == 0 else ():
            path.unlink()
        store.save(2, {"which": "with room"})
        store.finish()
        found["at the end"] = store.load_newest()
    return found


@pytest.mark.parametrize("in_background", [False, True], ids=["sync", "async"])
def test_a_full_disk_keeps_the_last_good_checkpoint(
    worlds: Worlds, model_folder: Path, small_disk: Path, in_background: bool
) -> None:
    config = _config(model_folder, {"tp": 2}, async_save=in_background)
    ranks = worlds.run(2, _save_on_a_full_disk, config, small_disk, 1000)
    path = small_disk / "checkpoints" / "step_00000002"
    for found in ranks:
        for when, reason in (("before", "there is no room for it"), ("while", "No space left on device")):
            assert found[when].startswith(f"cannot save the checkpoint {path}: ") and reason in found[when], found[when]
            assert f"The last good checkpoint is {path.with_name('step_00000001')}" in found[when]
            assert found[f"left {when}"] == ["step_00000001"]
        needed, free = (int(found["before"].split(part)[0].split()[-1].replace(",", "")) for part in (" bytes", " are"))
        assert found["bytes"] <= needed < found["bytes"] + 2**21 and 0 < free <= 2**17
        assert "It needs 1,000 bytes" in found["while"]
        assert found["loaded"] == (1, {"which": "good"}) and found["at the end"] == (2, {"which": "with room"})
    assert ranks[0]["before"] == ranks[1]["before"] and ranks[0]["while"] == ranks[1]["while"]


# --- damage -----------------------------------------------------------------------------------------------------------


def _load_errors(cases: list[tuple[Config, Path]]) -> list[str]:
    from megatron_rl.policy.checkpoint import CheckpointStore

    found = []
    for config, folder in cases:
        with policy_of(config) as policy:
            try:
                CheckpointStore(folder, policy, policy.groups).load_newest()
                found.append("no error")
            except UserError as error:
                found.append(str(error))
    return found


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
    config, cases = _config(model_folder, {"tp": 2}), []
    for what, damage in damages.items():
        shutil.copytree(source, tmp_path / what)
        damage(tmp_path / what / "step_00000002")
        cases.append((config, tmp_path / what))
    wider = save(hf_model(intermediate_size=64, tie_word_embeddings=True), tmp_path / "wider")
    cases.append((_config(wider, {"tp": 2}), source))
    for messages in worlds.run(2, _load_errors, cases):
        for (_, folder), message in zip(cases, messages, strict=True):
            assert f"cannot load the checkpoint {folder / 'step_00000002'}" in message, (folder.name, message)
            assert "train.resume=never" in message and "Traceback" not in message
