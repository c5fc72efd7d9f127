"""The recipes, rehearsed at their true sizes, and the planner's bytes of them: each phase within 3%."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config import load_config
from megatron_rl.rehearse.kept import kept_verdict
from tests.test_cli import megatron_rl

CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs"
RECIPES = sorted(path for path in CONFIGS.glob("*.yaml") if path.stem[0].isdigit())

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def rehearsed(recipe: Path, folder: Path, *arguments: str) -> dict[str, Any]:
    config = shutil.copy(recipe, folder)
    result = megatron_rl("rehearse", config, "--output", str(folder / "out"), *arguments, cwd=folder, seconds=3600)
    assert (result.returncode, result.stderr) == (0, "")
    found: dict[str, Any] = json.loads((folder / "out" / "rehearsal.json").read_text())
    return found


# of other processes, which no rehearsal sees; and the one weight that a save puts together at a time, by the rehearsal
# ("checkpoint") one that lies on a border between two ranks' shares, by the planner the largest that might
ELSEWHERE = ("process", "engine process", "engine weights", "KV cache", "checkpoint", "border weight")


def planners_errors(phases: list[dict[str, Any]]) -> dict[str, float]:
    """By phase; a first selection, and one without statistics, runs no pass."""
    errors = {}
    for phase in phases:
        if phase["planned"] and (phase["flops"] or not phase["name"].startswith("select")):
            kinds = phase["parts"], phase["planned"]
            seen, planned = (sum(size for name, size in parts.items() if name not in ELSEWHERE) for parts in kinds)
            errors[phase["name"]] = planned / seen - 1
    return errors


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_fits_its_gpus(recipe: Path, tmp_path: Path) -> None:
    found = rehearsed(recipe, tmp_path)
    assert found["fits"] and found["depths"] == [4, 8] and found["layers"] in (28, 64)
    config = load_config(tmp_path / recipe.name)
    assert isinstance(kept_verdict(config, tmp_path / recipe.name), dict)
    errors = planners_errors(found["ranks"][0]["phases"])
    assert {"old logprobs", "update 2", "weight sync", "generation", "checkpoint"} <= errors.keys()
    assert all(abs(error) <= 0.03 for error in errors.values()), errors


def test_two_shallow_models_say_what_all_layers_do(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    recipe = CONFIGS / "7b_kl_cov.yaml"
    quick, full = rehearsed(recipe, tmp_path), rehearsed(recipe, tmp_path / "full", "--full")
    assert full["depths"] == [28]
    for ours, theirs in zip(quick["ranks"][0]["phases"], full["ranks"][0]["phases"], strict=True):
        name = ours["name"]
        if name == "checkpoint":  # what lies on a border between ranks is another weight at another depth
            assert theirs["total"] <= ours["total"] * 1.01 <= theirs["total"] * 1.1
            continue
        assert ours["total"] == pytest.approx(theirs["total"], rel=0.002), name
        sent, all_sent = ({tuple(row[:3]): row[4] for row in phase["collectives"]} for phase in (ours, theirs))
        assert sent == pytest.approx(all_sent, rel=0.002), name
