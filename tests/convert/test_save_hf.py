"""The final model in Hugging Face format: what transformers loads is what was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import HF, errors_of_each, tiny_raw, train_each
from tests.worlds import Worlds

LIMIT = 280.0
TRAIN = {"prompts_per_step": 4, "prompts_per_minibatch": 2, "micro_batch_tokens": 96}
Weights = dict[str, torch.Tensor]


def _save_hf_in_small_files(raws: list[dict[str, Any]]) -> list[Weights]:
    from megatron_rl.convert import save_hf

    with mock.patch.object(save_hf.save_hf, "__kwdefaults__", {"shard_bytes": 20_000}):
        return train_each(raws)


def test_the_final_model_is_saved_for_transformers(worlds: Worlds, tmp_path: Path) -> None:
    """In one file by TP2; in several by PP2, from a finished run; with tokenizer, and with the weights' own dtype."""
    train = {"num_steps": 1, "save_hf": True, **TRAIN}
    raw = tiny_raw(tmp_path, train=train, model={"hf_config": HF | {"tie_word_embeddings": False}})
    weights = worlds.run(2, train_each, [raw | {"train": train | {"save_final": True}}], timeout=LIMIT)[0][0]
    folder = tmp_path / "tiny" / "hf"
    single = {path.name for path in folder.iterdir()}
    assert "model.safetensors" in single and "tokenizer.json" in single
    _check_model(folder, weights)
    again = raw | {"parallel": {"pp": 2}}
    assert _same_bits(worlds.run(2, _save_hf_in_small_files, [again], timeout=LIMIT)[0][0], weights)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    assert {path.name for path in folder.glob("*.safetensors")} == set(files)
    assert all((folder / file).stat().st_size < 20_000 + 4_000 for file in files)
    assert [path.name for path in folder.parent.glob(".hf*")] == []
    _check_model(folder, weights)


def _check_model(folder: Path, weights: Weights) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32 and model.config.architectures == ["Qwen2ForCausalLM"]
    assert _same_bits(dict(model.state_dict()), weights)
    assert AutoTokenizer.from_pretrained(folder).decode([2, 3, 13, 1]) == "01-<eos>"


def _save_hf_without_disk(raw: dict[str, Any]) -> tuple[str, bool, str]:
    from megatron_rl.convert import save_hf

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with mock.patch.object(save_hf, "write_file", full):
        return errors_of_each([raw])[0]


def test_a_model_that_cannot_be_written_leaves_the_one_before(worlds: Worlds, tmp_path: Path) -> None:
    """Rank 0 fails in the middle of a collective; the other one hears of it."""
    raw = tiny_raw(tmp_path, train={"num_steps": 1, "save_hf": True, **TRAIN})
    (tmp_path / "tiny" / "hf").mkdir(parents=True)
    (tmp_path / "tiny" / "hf" / "older").touch()
    for kind, for_the_user, message in worlds.run(2, _save_hf_without_disk, raw, timeout=LIMIT):
        assert (kind, for_the_user) == ("UserError", True)
        assert f"cannot write the model to {tmp_path}/tiny/hf" in message and "No space left on device" in message
    assert [path.name for path in (tmp_path / "tiny").glob("*hf*/*")] == ["older"]


def _same_bits(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
