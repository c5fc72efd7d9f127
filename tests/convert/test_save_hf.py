"""The final model in Hugging Face format: what transformers loads is what was trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_rl.convert.to_hf import megatron_to_hf
from megatron_rl.data.tokenizer import character_tokenizer
from tests.policy.tiny import hf_model, save
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
    from megatron_rl.convert import safetensors_io

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with mock.patch.object(safetensors_io, "write_file", full):
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


def _save_hf_among_leftovers(raw: dict[str, Any]) -> None:
    rmtree = shutil.rmtree

    def fails(path: Path, *arguments: Any, **options: Any) -> None:
        if Path(path).name in (".hf.draft", ".hf.old"):
            raise OSError(16, "Device or resource busy", str(path))
        rmtree(path, *arguments, **options)

    with mock.patch.object(shutil, "rmtree", fails):
        train_each([raw])


def test_leftovers_of_an_export_do_not_stop_the_next(worlds: Worlds, tmp_path: Path) -> None:
    """What cannot be removed of a killed one neither fails it nor gets into it."""
    run_dir = tmp_path / "tiny"
    for name in ("hf", ".hf.draft", ".hf.old"):
        (run_dir / name).mkdir(parents=True)
        (run_dir / name / "stale").touch()
    worlds.run(
        1,
        _save_hf_among_leftovers,
        tiny_raw(tmp_path, train={"num_steps": 1, "save_hf": True, **TRAIN}, parallel={"tp": 1}),
        timeout=LIMIT,
    )
    assert (run_dir / "hf" / "model.safetensors").is_file() and not (run_dir / "hf" / "stale").exists()
    assert sorted(path.name for path in run_dir.glob(".hf*")) == [".hf.draft", ".hf.old"]


def test_a_run_hands_its_source_on(worlds: Worlds, tmp_path: Path) -> None:
    """The final model, a checkpoint and its conversion: the source's own bytes, but for the weights."""
    source = save(hf_model(**HF | {"vocab_size": 21}), tmp_path / "source")
    character_tokenizer().save_pretrained(source)
    for name, changes in (
        ("config.json", {"rope_theta": 500.0, "note": "kept", "torch_dtype": "float32"}),
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}),
        ("generation_config.json", {"eos_token_id": [1, 20]}),
    ):
        raw = json.loads((source / name).read_text()) | changes
        raw = {key: value for key, value in raw.items() if key not in ("rope_parameters", "dtype")}
        (source / name).write_text(json.dumps(raw, indent=5))
    (tmp_path / "rows.jsonl").write_text('{"problem": "1+2", "answer": "3"}\n' * 4)
    raw = tiny_raw(tmp_path, train={"num_steps": 1, "save_hf": True, "save_final": True, **TRAIN}, parallel={"tp": 1})
    raw["data"] = {"type": "jsonl", "train_path": str(tmp_path / "rows.jsonl"), "max_prompt_tokens": 8}
    raw["model"] = {"path": str(source)}
    worlds.run(1, train_each, [raw], timeout=LIMIT)
    checkpoint = tmp_path / "tiny" / "checkpoints" / "step_00000001"
    megatron_to_hf(checkpoint, tmp_path / "converted")
    for folder in (tmp_path / "tiny" / "hf", checkpoint / "hf", tmp_path / "converted"):
        names = {path.name for path in folder.iterdir()} - {"model.safetensors"}
        assert names == {path.name for path in source.iterdir()} - {"model.safetensors"}
        for name in names:
            assert (folder / name).read_bytes() == (source / name).read_bytes(), folder / name
        assert not (folder / "model.safetensors").exists() or not _same_bits(
            load_file(folder / "model.safetensors"), load_file(source / "model.safetensors")
        )


def _same_bits(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
