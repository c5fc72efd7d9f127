"""Which checkpoints are kept, also when a save fails: killed, or on a full disk."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_rl import launch
from megatron_rl.config import Config
from megatron_rl.errors import UserError
from tests.policy import test_checkpoint
from tests.policy.checkpoint_case import config_of, load_newest, update
from tests.policy.tiny import policy_of
from tests.worlds import Worlds

model_folder = test_checkpoint.model_folder  # the fixture


def _killed_while_saving(config: Config, folder: Path) -> dict[str, Any]:
    """The draft of step 9 is left behind; a later run must neither load it nor stumble over it."""
    from megatron_rl.policy.checkpoint import CheckpointStore

    found: dict[str, Any] = {}
    with policy_of(config) as policy:
        store = CheckpointStore(folder, policy, policy.groups)
        update(policy, config, range(1))
        store.save(8, {"which": "finished"})

        def killed(self: CheckpointStore) -> None:
            raise KeyboardInterrupt  # all is written, but the rename has not happened

        with mock.patch.object(CheckpointStore, "_publish", killed), pytest.raises(KeyboardInterrupt):
            store.save(9, {"which": "draft"})
        found["left behind"] = sorted(path.name for path in folder.iterdir())
        store = CheckpointStore(folder, policy, policy.groups)
        found["newest"], found["loaded"] = store.newest(), load_newest(store)
        store.save(9, {"which": "second try"})
        found["retried"], found["kept"] = load_newest(store), sorted(path.name for path in folder.iterdir())
        store.save(9, {"which": "same step again"})
        found["again"] = load_newest(store)
        store.save(10, {})
        found["at the end"] = sorted(path.name for path in folder.iterdir())
    return found


def test_a_killed_save_is_never_the_newest_and_only_the_newest_is_kept(
    worlds: Worlds, model_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    (tmp_path / "step_00000099.bak").mkdir()
    strangers = ["notes.txt", "step_00000099.bak"]
    found = worlds.run(1, _killed_while_saving, config_of(model_folder, {}, keep_checkpoints=1), tmp_path)[0]
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
    seen = worlds.run(1, _keep, config_of(model_folder, {}), tmp_path)[0]
    assert seen == [
        (["1"], ""),
        (["1", "2"], "2"),
        (["2", "3"], "2"),
        (["3", "4"], "4"),
        (["4", "5"], "4"),
        (["4", "5", "6"], "4"),
    ]
    assert (tmp_path / "best" / "metadata.json").is_file()


# --- what cannot be removed -------------------------------------------------------------------------------------------


def _save_among_leftovers(config: Config, folder: Path) -> dict[str, Any]:
    """Two starts. What is named STUCK cannot be removed, as files that another machine of an NFS holds open."""
    from megatron_rl.policy.checkpoint import CheckpointStore

    rmtree, said, found = shutil.rmtree, [], {}

    def fails(path: Path, *arguments: Any, **options: Any) -> None:
        if Path(path).name in STUCK:
            raise OSError(16, "Device or resource busy", str(path))
        rmtree(path, *arguments, **options)

    say = mock.patch.object(launch, "say", lambda text, **options: said.append(text))
    with policy_of(config) as policy, mock.patch.object(shutil, "rmtree", fails), say:
        for steps in ((1, 2, 2, 3), (4,)):
            store = CheckpointStore(folder, policy, policy.groups)
            for step in steps:
                store.save(step, {"step": step})
        found["loaded"] = load_newest(store)
    return found | {"said": said, "left": sorted(path.name for path in folder.iterdir())}


STUCK = (".step_00000001.removed", ".step_00000004", ".step_00000002.removed")


def test_what_cannot_be_removed_is_said_once_and_worked_around(
    worlds: Worlds, model_folder: Path, tmp_path: Path
) -> None:
    """An old checkpoint, the same step's, and the draft that a killed save of the last step left."""
    (tmp_path / ".step_00000004").mkdir()
    config = config_of(model_folder, {"tp": 2}, keep_checkpoints=1)
    first, second = worlds.run(2, _save_among_leftovers, config, tmp_path)
    assert first["loaded"] == second["loaded"] == (4, {"step": 4})
    assert first["left"] == sorted([*STUCK, "step_00000004"])
    assert second["said"] == []
    assert len(first["said"]) == len(STUCK)
    for name in STUCK:
        (text,) = [text for text in first["said"] if f"cannot remove {tmp_path / name} (" in text]
        assert "busy" in text and "remove it yourself" in text


def _save_three(config: Config, folder: Path, elsewhere: Path) -> list[str]:
    from megatron_rl.policy.checkpoint import CheckpointStore

    with policy_of(config) as policy:
        store = CheckpointStore(folder, policy, policy.groups)
        store.save(1, {})
        store.path(1).rename(elsewhere)
        store.path(1).symlink_to(elsewhere)
        (folder / ".step_00000009").touch()
        for step in (2, 3):
            store.save(step, {})
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_that_was_moved_behind_a_link_loses_the_link_alone(
    worlds: Worlds, model_folder: Path, tmp_path: Path
) -> None:
    """Beside it a leftover that is a file."""
    config, elsewhere = config_of(model_folder, {}, keep_checkpoints=2), tmp_path / "elsewhere"
    assert worlds.run(1, _save_three, config, tmp_path / "own", elsewhere)[0] == ["step_00000002", "step_00000003"]
    assert (elsewhere / "metadata.json").is_file()


def _save_after(config: Config, folder: Path, harm: Any) -> tuple[str, list[str]]:
    from megatron_rl.policy.checkpoint import CheckpointStore

    with policy_of(config) as policy:
        store = CheckpointStore(folder, policy, policy.groups)
        harm()
        try:
            path = store.save(1, {})
        except UserError as error:
            return str(error), []
        return "", sorted(file.name for file in (path / "hf").iterdir())


def test_a_model_folder_that_goes_away_stops_no_save(worlds: Worlds, model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    away = partial(shutil.rmtree, tmp_path / "model")
    problem, names = worlds.run(1, _save_after, config_of(tmp_path / "model", {}), tmp_path / "out", away)[0]
    assert (problem, names) == ("", ["config.json", "generation_config.json"])


def test_a_folder_that_cannot_be_made_is_named(worlds: Worlds, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "checkpoints"
    config = config_of(model_folder, {"tp": 2})
    for problem, _ in worlds.run(2, _save_after, config, folder, list):
        assert problem.startswith(f"cannot save the checkpoint {folder}/step_00000001: "), problem
        assert "There is no earlier checkpoint" in problem


# --- full disks -------------------------------------------------------------------------------------------------------


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
        update(policy, config, range(1))
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
        found["loaded"] = load_newest(store)
        for path in disk.glob("filler*") if policy.groups.rank == 0 else ():
            path.unlink()
        store.save(2, {"which": "with room"})
        store.finish()
        found["at the end"] = load_newest(store)
    return found


@pytest.mark.parametrize("in_background", [False, True], ids=["sync", "async"])
def test_a_full_disk_keeps_the_last_good_checkpoint(
    worlds: Worlds, model_folder: Path, small_disk: Path, in_background: bool
) -> None:
    config = config_of(model_folder, {"tp": 2}, async_save=in_background)
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
