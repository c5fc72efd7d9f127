"""`megatron-rl conform` on every layout of the invariance matrix, on four processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import invariance_case
from tests.conform.case import conformed, raw_config
from tests.worlds import Worlds

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
# what of the four processes a layout leaves is data parallelism
MATRIX = {name: parallel | {"world_size": 4} for name, parallel in invariance_case.LAYOUTS.items() if name != "tp1"}


def answer_of(worlds: Worlds, folder: Path, raw: dict[str, Any], *question: Any) -> dict[str, Any]:
    worlds.run(4, conformed, raw, folder, *question, timeout=400)
    answer: dict[str, Any] = json.loads((folder / "conform.json").read_text())
    return answer


@pytest.mark.parametrize("layout", MATRIX)
def test_four_processes_conform(worlds: Worlds, tmp_path: Path, layout: str) -> None:
    is_moe = "ep" in MATRIX[layout] or layout.endswith("allgather")
    hf = invariance_case.MODELS["qwen3_moe" if is_moe else "qwen2"] | {"initializer_range": 0.1}
    del hf["vocab_size"]  # the tokenizer's
    raw = raw_config(tmp_path, MATRIX[layout], hf, megatron=invariance_case.MEGATRON.get(layout, {}))
    answer = answer_of(worlds, tmp_path, raw)
    assert answer["ok"] and answer["layers"] == 4
    names = [verdict["name"] for verdict in answer["verdicts"]]
    # from the run's checkpoint in the run, and in the reference where no experts were dealt out
    assert names.count("resumed update") == (1 if "ep" in MATRIX[layout] else 2)


@pytest.mark.parametrize(
    ("parallel", "against"),
    [
        ({"tp": 2, "pp": 2}, "tp=2,dp=2"),
        ({"world_size": 4}, "cp=2,pp=2"),
        ({"world_size": 4, "tp": 2, "sp": True}, "pp=2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_reference_may_be_parallel_too(
    worlds: Worlds, tmp_path: Path, parallel: dict[str, Any], against: str
) -> None:
    answer = answer_of(worlds, tmp_path, raw_config(tmp_path, parallel), against)
    reference = answer["layouts"]["reference"]
    assert answer["ok"] and all(reference[part[:2]] == int(part[3:]) for part in against.split(",") if part[:2] != "dp")


@pytest.mark.parametrize("parallel", [{"tp": 2, "sp": True}, {"pp": 2}, {"tp": 2, "pp": 2}, {"cp": 2}], ids=str)
def test_bfloat16_conforms(worlds: Worlds, tmp_path: Path, parallel: dict[str, Any]) -> None:
    raw = raw_config(tmp_path, parallel | {"world_size": 4}, dtype="bfloat16")
    answer = answer_of(worlds, tmp_path, raw)
    print(parallel, {each["name"]: (each["deviation"], each["tolerance"]) for each in answer["verdicts"]})
    assert answer["ok"] and answer["dtype"] == "bfloat16"
