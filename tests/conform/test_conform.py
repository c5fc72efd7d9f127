"""`megatron-rl conform`: layouts pass, and known parallel bugs do not. More layouts: test_layouts.py."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from megatron_rl import cli
from megatron_rl.config import parse_config
from megatron_rl.conform.commands import reference_of
from megatron_rl.conform.verdicts import Verdict, compare
from megatron_rl.convert.safetensors_io import stored_tensors
from megatron_rl.convert.save_hf import write_shards
from megatron_rl.errors import ConfigError, UserError
from tests.conform.case import LAYOUTS, MOE, conformed, raw_config
from tests.conform.mutations import MUTATIONS, measured
from tests.tiny import HF
from tests.worlds import Worlds, leave_layout

MODELS = {"dense": HF, "moe": MOE}
# how far they move what is compared is within bfloat16's rounding
HIDDEN_IN_BFLOAT16 = ("padding columns counted", "replicated parameters counted by each rank in the clip norm")
SECONDS = 300  # of a world, on a machine that does other things too
QUICK = ("gradients of norms not summed over sequence-parallel ranks", "top-k and means of this rank alone")


class References(dict[tuple[str, str, str], Path]):
    """What one process makes of a model of this kind, loss and dtype, measured when first asked for."""

    def __init__(self, worlds: Worlds, folder: Path) -> None:
        super().__init__()
        self.worlds, self.folder = worlds, folder

    def __missing__(self, key: tuple[str, str, str]) -> Path:
        kind, loss, dtype = key
        path = self[key] = self.folder / "_".join(key)
        raw = raw_config(path, {}, MODELS[kind], loss, dtype=dtype)
        self.worlds.run(1, measured, raw, path, "", False, timeout=SECONDS)
        return path

    def against(self, folder: Path, layout: str, mutation: str = "", dtype: str = "float32") -> list[Verdict]:
        """The verdicts on the layout, which gets `folder`."""
        kind, loss = "moe" if layout == "ep2" else "dense", MUTATIONS[mutation].loss if mutation else "kl_cov"
        raw, run = raw_config(folder, LAYOUTS[layout], MODELS[kind], loss, dtype=dtype), folder / "run"
        self.worlds.run(2, measured, raw, run, mutation, timeout=SECONDS)
        return compare(run, self[kind, loss, dtype], dtype, 1e-3)


@pytest.fixture(scope="module")
def references(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> References:
    return References(worlds, tmp_path_factory.mktemp("references"))


def failed(verdicts: list[Verdict]) -> dict[str, tuple[str, str]]:
    return {v.name: (f"{v.deviation:.2g}", v.place) for v in verdicts if not v.is_ok}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_conforms(references: References, tmp_path: Path, layout: str) -> None:
    assert not failed(references.against(tmp_path, layout))


@pytest.mark.parametrize(
    "mutation", [*QUICK, *(pytest.param(m, marks=pytest.mark.slow) for m in MUTATIONS if m not in QUICK)]
)
def test_a_parallel_bug_is_found(references: References, tmp_path: Path, mutation: str) -> None:
    found = failed(references.against(tmp_path, MUTATIONS[mutation].layout, mutation))
    print(mutation, "->", found)
    assert found


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_conforms_in_bfloat16(references: References, tmp_path: Path, layout: str) -> None:
    verdicts = references.against(tmp_path, layout, dtype="bfloat16")
    print(layout, "->", {v.name: (f"{v.deviation:.2g}", v.tolerance) for v in verdicts})
    assert not failed(verdicts)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_bugs_that_bfloat16_does_not_hide(references: References, tmp_path: Path, mutation: str) -> None:
    found = failed(references.against(tmp_path, MUTATIONS[mutation].layout, mutation, dtype="bfloat16"))
    print(mutation, "->", found)
    assert bool(found) == (mutation not in HIDDEN_IN_BFLOAT16)


def test_a_micro_batch_has_room_for_the_longest_sequence_padded_by_either_layout(tmp_path: Path) -> None:
    from megatron_rl.conform.frozen import frozen_config

    raw = raw_config(tmp_path, {"world_size": 4})
    raw["rollout"]["max_response_tokens"] = 11  # 27 with the prompt
    config = parse_config(raw)
    assert frozen_config(config, 64).train.micro_batch_tokens == 27
    multiple = reference_of(config, "cp=2").parallel.token_multiple
    assert frozen_config(config, 64, multiple).train.micro_batch_tokens == 28


# --- verdicts that a stranger's numbers must not upset ----------------------------------------------------------------


def rewritten(reference: Path, folder: Path, name: str, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a measurement of which the tensors `name` are changed."""
    shutil.copytree(reference, folder)
    tensors = {each: stored.read() for each, stored in stored_tensors(folder / name).items()}
    change(tensors)
    shutil.rmtree(folder / name)
    (folder / name).mkdir()
    write_shards(folder / name, tensors.items(), 10**9)
    return folder


@pytest.mark.parametrize("name", ["gradients", "after"])
def test_one_nan_is_the_largest_deviation(references: References, tmp_path: Path, name: str) -> None:
    reference = references["dense", "kl_cov", "float32"]

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[min(tensors)].fill_(math.nan)
        tensors[max(tensors)] *= 2  # after it in the file, and finite

    verdicts = compare(rewritten(reference, tmp_path / "run", name, change), reference, "float32", 1e-3)
    kind = {"gradients": "gradients", "after": "update"}[name]
    (verdict,) = [each for each in verdicts if each.name == kind]
    assert math.isnan(verdict.deviation) and not verdict.is_ok and verdict.place == "model.embed_tokens.weight"
    assert verdict.as_json()["deviation"] is None


@pytest.mark.parametrize("shape", [None, (40, 32)])
def test_a_tensor_of_one_side_alone_is_told(
    references: References, tmp_path: Path, shape: tuple[int, int] | None
) -> None:
    reference = references["dense", "kl_cov", "float32"]

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["model.norm.weight"]
        if shape is not None:
            tensors["model.norm.weight"] = torch.ones(shape)

    verdicts = compare(rewritten(reference, tmp_path / "run", "start", change), reference, "float32", 1e-3)
    assert failed(verdicts) == {
        "weights": ("1", "missing on one side, or of another shape: model.norm.weight"),
    }


def command(folder: Path, raw: dict[str, Any], *options: str) -> subprocess.CompletedProcess[str]:
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(raw))
    words = [sys.executable, "-m", "megatron_rl", "conform", str(config), "--tokens", "256", *options]
    return subprocess.run(words, capture_output=True, text=True)


def test_the_command_compares_the_run_with_one_process(tmp_path: Path) -> None:
    done = command(tmp_path, raw_config(tmp_path, LAYOUTS["tp2_sp"]))
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads((tmp_path / "tiny" / "conform" / "conform.json").read_text())
    assert answer["ok"] and answer["layers"] == 2
    assert {verdict["name"] for verdict in answer["verdicts"]} >= {"logits", "selected", "gradients", "engine"}


# two layers of a width whose weights and optimizer are seen beside what a process takes by itself
WIDE = HF | {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
WIDE["layer_types"] = ["full_attention"] * 4  # as transformers writes it


def room_for(raw: dict[str, Any], layers: int) -> float:
    """Bytes of memory in which the planner has room for that many layers of the reference, and for no more."""
    from megatron_rl.conform.frozen import frozen_config
    from megatron_rl.models.hardware import FILL, HARDWARE
    from megatron_rl.plan.memory import memory_of
    from megatron_rl.plan.shapes import layout_of, shape_of

    reference = frozen_config(reference_of(parse_config(raw), "tp=1"), 256)
    shapes = [shape_of(WIDE | {"num_hidden_layers": n}, vocab=40) for n in (layers, layers + 1)]
    least, most = (memory_of(reference, shape, layout_of(reference), HARDWARE["cpu"]).peak for shape in shapes)
    return (least + most) / 2 / FILL


def test_layers_that_the_reference_has_no_room_for_are_left_out(worlds: Worlds, tmp_path: Path) -> None:
    raw = raw_config(tmp_path, LAYOUTS["pp2"], WIDE)
    printed, _ = worlds.run(2, conformed, raw, tmp_path, "tp=1", None, room_for(raw, 3))
    answer = json.loads((tmp_path / "conform.json").read_text())
    # three would fit, and cannot be dealt to two stages
    assert answer["ok"] and (answer["layers"], answer["of_layers"]) == (2, 4)
    assert "2 of 4 layers, which is what the reference has room for" in " ".join(printed.split())


def test_the_depth_can_be_chosen(worlds: Worlds, tmp_path: Path) -> None:
    raw = raw_config(tmp_path, LAYOUTS["pp2"], WIDE)
    printed, _ = worlds.run(2, conformed, raw, tmp_path, "tp=1", 2)
    answer = json.loads((tmp_path / "conform.json").read_text())
    assert answer["ok"] and answer["layers"] == 2 and "room" not in printed


# --- what cannot be compared ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        (["--against", "tp=4"], {}, "--against tp=4: the reference needs 4 processes, and the run has 2"),
        (["--against", "tp=x"], {}, "got 'tp=x', expected sizes of tp, pp, vpp, cp, dp, ep, each once, as tp=2,dp=2"),
        (["--against", "tp=2,zp=1"], {}, "got 'zp=1', expected sizes of"),
        (["--against", "tp=2,tp=1"], {}, "got 'tp=1', expected sizes of"),
        (
            ["--against", "ep=2,dp=2"],
            {},
            "the config is inconsistent:\n  - parallel.ep=2: qwen2 has no experts",
        ),
        ([], {"path": "/no/model"}, "model.path=/no/model: no such folder here"),
        ([], {"path": "/no/model", "hf_config": None}, "model.path=/no/model: no such folder here"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_a_process_starts(
    tmp_path: Path, options: list[str], changes: dict[str, Any], message: str
) -> None:
    config = tmp_path / "run.yaml"
    raw = raw_config(tmp_path, LAYOUTS["tp2"])
    raw["model"] |= changes
    config.write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError) as refused:
        cli.app(["conform", str(config), *options], standalone_mode=False)
    assert message in str(refused.value)
    assert not (tmp_path / "tiny").exists()


def refusals(raw: dict[str, Any], folder: Path, questions: list[tuple[int | None, float | None]]) -> list[str]:
    """On a rank: why these depths and this memory are refused."""
    messages = []
    for layers, room in questions:
        with pytest.raises(UserError) as refused:
            conformed(raw, folder, "tp=1", layers, room)
        leave_layout()
        messages.append(str(refused.value))
    return messages


def test_a_depth_that_cannot_be_is_refused_on_every_rank(worlds: Worlds, tmp_path: Path) -> None:
    raw = raw_config(tmp_path, LAYOUTS["pp2"], WIDE)
    for odd, many, full in worlds.run(2, refusals, raw, tmp_path, [(3, None), (6, None), (None, 1.0)]):
        assert odd == "--layers 3: the pipeline stages of both layouts can have [2, 4]"
        assert many == "--layers 6: the pipeline stages of both layouts can have [2, 4]"
        assert "not even 2 of 4 layers fit the reference layout's ranks" in full
