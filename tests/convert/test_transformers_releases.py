"""Every folder that a run writes is the same model under transformers 4 and 5."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from megatron_rl.convert.to_hf import megatron_to_hf
from megatron_rl.data.tokenizer import character_tokenizer
from tests.convert.load_export import TEXT
from tests.policy.tiny import hf_model, save
from tests.tiny import HF, tiny_raw, trained
from tests.worlds import ROOT, Worlds

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

# Each in an environment of its own: the first is that of the tests.
RELEASES = ["5.19.0", "4.57.6"]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rope_theta": 500.0, "rope_scaling": LLAMA3},
    "qwen2": {"model_type": "qwen2", "rope_theta": 300.0},
    "qwen3": {"model_type": "qwen3", "rope_theta": 700.0, "head_dim": 16},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "rope_theta": 300.0,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
        "head_dim": 16,
    },
    "mistral": {"model_type": "mistral", "rope_theta": 300.0, "sliding_window": None},
}


@pytest.fixture(scope="module", params=RELEASES)
def release(request: pytest.FixtureRequest) -> tuple[str, Path]:
    """(version, the Python of its environment), which `make` makes once."""
    if request.param == RELEASES[0]:
        return request.param, Path(sys.executable)
    folder = Path(".engines") / f"transformers-{request.param}"
    subprocess.run(["make", folder / ".installed"], cwd=ROOT, check=True)
    return request.param, ROOT / folder / "bin" / "python"


def _train(raws: dict[str, dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The policy's own logits `[64, V]` after each run, on the tokens of load_export.py."""
    return {name: _logits_after(raw) for name, raw in raws.items()}


def _logits_after(raw: dict[str, Any]) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    from megatron_rl.convert.hf import hub_views

    with trained(raw) as run:
        model = AutoModelForCausalLM.from_config(run.policy.hf_config, dtype=torch.float32).eval()
        views = hub_views(dict(model.named_parameters()))
        with torch.no_grad():
            for name, tensor in run.policy.hf_weights():
                views[name].copy_(tensor)
    with torch.inference_mode():
        return model(torch.arange(2, 66)[None] % 20).logits[0]


@pytest.fixture(scope="module")
def runs(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[torch.Tensor]]:
    """Trained folders of each family, and the logits of their policies: one whose source transformers 5 wrote, with
    special tokens of its own, and one that has no source."""
    root, raws = tmp_path_factory.mktemp("runs"), {}
    for family, own in FAMILIES.items():
        hf = HF | {"vocab_size": 21, "tie_word_embeddings": False} | own
        source = save(hf_model(**hf), root / family / "source")
        tokenizer = character_tokenizer()
        tokenizer.add_special_tokens({"extra_special_tokens": ["+"]})
        tokenizer.save_pretrained(source)
        (root / family / "rows.jsonl").write_text('{"problem": "1+2", "answer": "3"}\n' * 4)
        data = {
            "type": "jsonl",
            "train_path": str(root / family / "rows.jsonl"),
            "num_train": None,
            "num_eval": None,
            "max_prompt_tokens": 8,
        }
        for name, sections in {
            "with source": {"model": {"path": str(source)}, "data": data},
            "without": {"model": {"hf_config": hf}},
        }.items():
            raw = tiny_raw(root / family, name=name.replace(" ", "_"), parallel={"tp": 1}, **sections)
            raw["model"] = sections["model"]
            raw["data"] = {key: value for key, value in raw["data"].items() if value is not None}
            raw["optimizer"] = {"lr": 0.01}
            raw["train"] |= {"num_steps": 1, "save_final": True, "save_hf": True}
            raws[f"{family} {name}"] = raw
    logits = worlds.run(1, _train, raws, timeout=600)[0]
    folders, expected = [], []
    for key, raw in raws.items():
        run = Path(raw["logging"]["run_dir"].format(name=raw["name"]))
        converted = run / "converted"
        megatron_to_hf(run / "checkpoints" / "step_00000001", converted)
        folders += [run / "hf", converted]
        expected += [logits[key]] * 2
    return folders, expected


def test_an_export_is_the_policy_under_both_releases(
    runs: tuple[list[Path], list[torch.Tensor]], release: tuple[str, Path], tmp_path: Path
) -> None:
    version, python = release
    folders, expected = runs
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    script = ROOT / "tests" / "convert" / "load_export.py"
    command = [python, script, tmp_path / "found.pt", *folders]
    subprocess.run(command, check=True, env=environment | {"HF_HUB_OFFLINE": "1"})
    found = torch.load(tmp_path / "found.pt")
    assert found["version"] == version
    for folder, logits in zip(folders, expected, strict=True):
        seen = found[str(folder)]
        worst = (seen["logits"] - logits).abs().max().item()
        print(f"transformers {version}, {folder.parent.parent.name}, {folder}: max |difference| {worst:.1e}")
        assert worst < 1e-5 and logits.abs().max() > 0.1 and seen["dtype"] == "torch.float32"
        tokenizer = AutoTokenizer.from_pretrained(folder)
        plus = "" if "with_source" in folder.parts else "+"  # where it is special
        assert seen["token_ids"] == tokenizer(TEXT).input_ids and seen["eos"] == 1
        assert seen["text"] == TEXT.removesuffix("<eos>").replace("+", plus)
