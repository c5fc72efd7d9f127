"""Resuming is exact on one layout, agrees across layouts, and never starts from a damaged or unfinished checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rl.config import Config, PpoClipLoss
from megatron_rl.errors import UserError
from tests.policy.tiny import hf_model, make_batch, make_config, policy_of, same_bits, save, weights_of, worst
from tests.worlds import Worlds

OPTIMIZER = {"lr": 3e-3, "weight_decay": 0.1, "clip_grad": 0.5, "schedule": "cosine", "warmup_steps": 1, "eps": 1e-5}
EXTRA = {"cursor": {"epoch": 3, "position": 17}, "seed": 1}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(hf_model(tie_word_embeddings=True), tmp_path_factory.mktemp("checkpoint"))


def _config(folder: Path, parallel: dict[str, Any], dtype: str = "float32") -> Config:
    return make_config(folder, parallel=parallel, optimizer=OPTIMIZER, model={"dtype": dtype})


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


def _save_and_go_on(config: Config, folder: Path) -> dict[str, Any]:
    from megatron_rl.policy.checkpoint import CheckpointStore

    with policy_of(config) as policy:
        store = CheckpointStore(folder, policy, policy.groups)
        assert store.newest() is None and store.load_newest() is None
        _update(policy, config, range(2))
        path = store.save(2, EXTRA)
        found = {"path": path, "weights": weights_of(policy), "moments": _moments(policy)}
        found["results"] = _update(policy, config, range(2, 4))
        found["end"] = weights_of(policy)
    return found


def _load_and_go_on(config: Config, folder: Path) -> dict[str, Any]:
    from megatron_rl.policy.checkpoint import CheckpointStore

    with policy_of(config) as policy:
        store = CheckpointStore(folder, policy, policy.groups)
        found = {"loaded": store.load_newest(), "weights": weights_of(policy), "moments": _moments(policy)}
        found["results"] = _update(policy, config, range(2, 4))
        found["end"] = weights_of(policy)
    return found


def _save_and_load(cases: list[tuple[Config, Path]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [(_save_and_go_on(*case), _load_and_go_on(*case)) for case in cases]


def _load_each(cases: list[tuple[Config, Path]]) -> list[dict[str, Any]]:
    return [_load_and_go_on(*case) for case in cases]


SAME_LAYOUT: dict[str, tuple[int, dict[str, Any], str]] = {
    "one": (1, {}, "float32"),
    "one, without distributed optimizer": (1, {"distributed_optimizer": False}, "float32"),
    "dp2": (2, {"world_size": 2}, "float32"),
    "dp2, without distributed optimizer": (2, {"world_size": 2, "distributed_optimizer": False}, "float32"),
    "tp2": (2, {"tp": 2}, "float32"),
    "pp2": (2, {"pp": 2}, "float32"),
    "dp2, bf16": (2, {"world_size": 2}, "bfloat16"),
    "tp2, bf16, without distributed optimizer": (2, {"tp": 2, "distributed_optimizer": False}, "bfloat16"),
}


@pytest.fixture(scope="module")
def saved(
    worlds: Worlds, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, list[Any]]]:
    """Layout -> (checkpoint folder, per rank what was saved and what came back)."""
    root, found = tmp_path_factory.mktemp("saved"), {}
    for size in (1, 2):
        cases = {
            layout: (_config(model_folder, parallel, dtype), root / layout)
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
            print(f"{saved_by} -> {name}: {worst(before['end'], after['end']):.1e}")
            assert worst(before["end"], after["end"]) < 5e-6, name
            for (norm, rate), (other_norm, other_rate) in zip(before["results"], after["results"], strict=True):
                assert other_norm == pytest.approx(norm, rel=1e-5) and other_rate == rate


def _killed_while_saving(config: Config, folder: Path) -> dict[str, Any]:
    """The draft of step 9 is left behind; a later run must neither load it nor stumble over it."""
    from megatron_rl.policy.checkpoint import CheckpointStore  # before megatron.core, which it prepares

    from megatron.core import dist_checkpointing  # isort: skip

    found: dict[str, Any] = {}
    with policy_of(config) as policy:
        store = CheckpointStore(folder, policy, policy.groups)
        _update(policy, config, range(1))
        store.save(8, {"which": "finished"})
        original = dist_checkpointing.save

        def killed(*args: Any, **options: Any) -> None:
            original(*args, **options)
            raise KeyboardInterrupt  # all is written, but the rename has not happened

        dist_checkpointing.save = killed
        try:
            store.save(9, {"which": "draft"})
        except KeyboardInterrupt:
            found["left behind"] = sorted(path.name for path in folder.iterdir())
        finally:
            dist_checkpointing.save = original
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
    found = worlds.run(1, _killed_while_saving, _config(model_folder, {}), tmp_path)[0]
    assert found["left behind"] == [".step_00000009", "notes.txt", "step_00000008", "step_00000099.bak"]
    assert found["newest"] == tmp_path / "step_00000008" and found["loaded"] == (8, {"which": "finished"})
    assert found["retried"] == (9, {"which": "second try"}) and found["again"] == (9, {"which": "same step again"})
    assert found["kept"] == sorted([*strangers, "step_00000009"])
    assert found["at the end"] == sorted([*strangers, "step_00000010"])


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
        "empty": lambda folder: [path.unlink() for path in folder.iterdir()],
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
