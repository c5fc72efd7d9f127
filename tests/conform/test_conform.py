"""`megatron-rl conform`: every layout passes, and known parallel bugs do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config import parse_config
from megatron_rl.conform.commands import reference_layout
from megatron_rl.conform.verdicts import Verdict, compare
from megatron_rl.errors import ConfigError
from tests.conform.mutations import LAYOUTS, MOE, MUTATIONS, measured, raw_config
from tests.tiny import HF
from tests.worlds import Worlds

QUICK = ("gradients of norms not summed over sequence-parallel ranks", "top-k and means of this rank alone")


@pytest.fixture(scope="module")
def references(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name, model in (("dense", HF), ("moe", MOE)):
        folders[name] = tmp_path_factory.mktemp("reference") / name
        worlds.run(1, measured, raw_config(folders[name], "one", model), folders[name])
    return folders


def verdicts_of(
    worlds: Worlds, references: dict[str, Path], folder: Path, layout: str, mutation: str = ""
) -> list[Verdict]:
    kind, model = ("moe", MOE) if layout == "ep2" else ("dense", HF)
    run, reference = folder / "run", references[kind]
    worlds.run(1 if layout == "one" else 2, measured, raw_config(folder, layout, model), run, mutation)
    if mutation == "moments lost in the checkpoint":  # what another layout makes of the checkpoint
        reference = folder / "reference"
        worlds.run(1, measured, raw_config(folder, "one", model), reference, mutation, run)
    return compare(run, reference, "float32", 1e-3)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "one"])
def test_every_layout_conforms(worlds: Worlds, references: dict[str, Path], tmp_path: Path, layout: str) -> None:
    failed = [verdict for verdict in verdicts_of(worlds, references, tmp_path, layout) if not verdict.is_ok]
    assert not failed


@pytest.mark.parametrize(
    "mutation", [*QUICK, *(pytest.param(m, marks=pytest.mark.slow) for m in MUTATIONS if m not in QUICK)]
)
def test_a_parallel_bug_is_found(worlds: Worlds, references: dict[str, Path], tmp_path: Path, mutation: str) -> None:
    verdicts = verdicts_of(worlds, references, tmp_path, MUTATIONS[mutation][0], mutation)
    failed = {verdict.name: verdict for verdict in verdicts if not verdict.is_ok}
    print(mutation, "->", {name: (f"{v.deviation:.2g}", v.place) for name, v in failed.items()})
    assert failed


def test_the_command_compares_the_run_with_one_process(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import subprocess
    import sys

    import yaml

    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(raw_config(tmp_path, "tp2_sp")))
    command = [sys.executable, "-m", "megatron_rl", "conform", str(config), "--tokens", "256"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads((tmp_path / "tiny" / "conform" / "conform.json").read_text())
    assert answer["ok"] and answer["layers"] == 2
    assert {verdict["name"] for verdict in answer["verdicts"]} >= {"logits", "selected", "gradients", "engine"}


@pytest.mark.parametrize(
    ("against", "message"),
    [
        ("tp=4", "needs 4 processes, and the run has 2"),
        ("tp=x", "expected sizes of"),
        ("tp=2,zp=1", "expected sizes of"),
    ],
)
def test_a_reference_that_cannot_be_is_refused(tmp_path: Path, against: str, message: str) -> None:
    raw: dict[str, Any] = raw_config(tmp_path, "tp2")
    with pytest.raises(ConfigError, match=message):
        reference_layout(parse_config(raw), against)
