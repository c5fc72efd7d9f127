"""Which tokens end a response: all that the model's folder names, in training, evaluation and every engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config import Config, parse_config
from megatron_rl.data.tokenizer import build_tokenizer, character_tokenizer, stop_token_ids
from megatron_rl.errors import DataError
from megatron_rl.rollout.collect import sampling_params
from tests.policy.tiny import HF


def model(folder: Path, **files: Any) -> Path:
    character_tokenizer().save_pretrained(folder)  # its <eos> is 1
    for name, contents in ({"config": HF} | files).items():
        (folder / f"{name}.json").write_text(json.dumps(contents))
    return folder


def config_of(path: Path | None, data: dict[str, Any] | None = None, **rollout: Any) -> Config:
    data = {"type": "jsonl", "train_path": "rows.jsonl"} if data is None else data
    section = {"path": str(path)} if path else {"hf_config": HF}
    rollout = {"max_response_tokens": 16} | rollout
    return parse_config({"model": section, "data": data | {"max_prompt_tokens": 8}, "rollout": rollout})


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config": {"eos_token_id": [20, 1, 19]}}, (1, 20, 19)),
        ({"generation_config": {"eos_token_id": 20}}, (1, 20)),
        ({"generation_config": {"eos_token_id": None}}, (1,)),
        ({"generation_config": {}, "config": HF | {"eos_token_id": 9}}, (1,)),
        ({"config": HF | {"eos_token_id": [9, 8]}}, (1, 9, 8)),  # as transformers without a generation_config.json
        ({}, (1,)),
    ],
    ids=str,
)
def test_every_end_token_of_the_model_counts(tmp_path: Path, files: dict[str, Any], expected: tuple[int, ...]) -> None:
    config = config_of(model(tmp_path / "model", **files))
    tokenizer = build_tokenizer(config)
    assert stop_token_ids(config, tokenizer) == expected
    assert sampling_params(config, tokenizer, 0).stop_token_ids == expected


def test_whose_end_tokens(tmp_path: Path) -> None:
    """Those of the tokenizer's folder count too; the countdown game's characters are numbered by nobody else; what the
    config states stands alone."""
    ends = model(tmp_path / "model", generation_config={"eos_token_id": [20]})
    other = model(tmp_path / "tokenizer", generation_config={"eos_token_id": [18, 20]})
    data = {"type": "jsonl", "train_path": "rows.jsonl", "tokenizer": str(other)}
    tokenizer = character_tokenizer()
    assert stop_token_ids(config_of(ends, data), tokenizer) == (1, 20, 18)
    assert stop_token_ids(config_of(None, data), tokenizer) == (1, 18, 20)
    assert stop_token_ids(config_of(ends, {"type": "countdown"}), tokenizer) == (1,)
    assert stop_token_ids(config_of(ends, stop_token_ids=[4]), tokenizer) == (4,)
    assert stop_token_ids(config_of(ends, stop_token_ids=[]), tokenizer) == ()
    tokenizer.eos_token = None
    assert stop_token_ids(config_of(ends), tokenizer) == (20,)
    with pytest.raises(DataError, match="no end-of-sequence token; set rollout.stop_token_ids"):
        stop_token_ids(config_of(None), tokenizer)


def test_they_do_not_change_when_the_folder_goes_away(tmp_path: Path) -> None:
    folder = model(tmp_path / "model", generation_config={"eos_token_id": [20]})
    config, tokenizer = config_of(folder), character_tokenizer()
    before = stop_token_ids(config, tokenizer)
    folder.rename(tmp_path / "moved")
    assert stop_token_ids(config, tokenizer) == before == (1, 20)


@pytest.mark.parametrize("stated", ["</s>", [1, None], [1.0], -1, [True]], ids=str)
def test_what_is_no_token_id_is_refused(tmp_path: Path, stated: Any) -> None:
    config = config_of(model(tmp_path / "model", generation_config={"eos_token_id": stated}))
    with pytest.raises(DataError, match="generation_config.json: eos_token_id is .*, expected a token id or a list"):
        stop_token_ids(config, character_tokenizer())
