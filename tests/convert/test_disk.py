"""Clean-up frees a name whatever becomes of what had it, and says once what stays."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.convert import disk


def test_a_name_is_free_though_what_had_it_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rmtree, is_busy = shutil.rmtree, True

    def busy(path: Path, *arguments: Any, **options: Any) -> None:
        if is_busy:
            raise OSError(16, "Device or resource busy", str(path))
        rmtree(path, *arguments, **options)

    monkeypatch.setattr(disk.shutil, "rmtree", busy)
    for number in range(3):
        (tmp_path / "weights").mkdir()
        (tmp_path / "weights" / str(number)).touch()
        disk.clear(tmp_path / "weights")
    names = [".weights.removed", ".weights.removed.1", ".weights.removed.2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" (")[0] for line in said] == [f"cannot remove {tmp_path / name}" for name in names]
    is_busy = False
    disk.clear(tmp_path / "weights")  # nothing has the name; the earlier ones go now
    assert not list(tmp_path.iterdir())


def test_a_link_goes_and_what_it_points_to_stays(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    for name in ("link", "broken"):
        disk.clear(tmp_path / name)
    assert disk.remove(tmp_path / "nothing there")
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]
