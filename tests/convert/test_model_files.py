"""What stands beside the weights: the source's own bytes, in a form that transformers 4 and 5 read alike."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from megatron_rl.config import Config, parse_config
from megatron_rl.convert.model_files import converted_files, policy_files
from megatron_rl.convert.safetensors_io import TensorInfo
from megatron_rl.convert.to_hf import megatron_to_hf
from megatron_rl.convert.to_megatron import hf_to_megatron
from megatron_rl.convert.weights import open_weights
from megatron_rl.data.tokenizer import build_tokenizer, character_tokenizer
from megatron_rl.models.architecture import resolve_hf_config
from megatron_rl.models.facts import read_hf_config
from megatron_rl.rollout.build import write_model_dir
from tests.policy.tiny import HF, hf_model, save

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# as on the hub, where transformers 4 wrote them; the order and the key `note` are to survive
OLD_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 37,
    "note": "über alles hinweg",
    "hidden_size": 32,
    "intermediate_size": 48,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_scaling": LLAMA3,
    "rope_theta": 500.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.43.0",
    "eos_token_id": [1, 20],
}
SIDE = {
    "generation_config.json": '{"eos_token_id":   [1, 20], "temperature": 0.6}',
    "special_tokens_map.json": '{"eos_token": "<eos>"}',
    "LICENSE": "as it likes",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
    "chat_template.jinja": "{{ messages[0].content }}",
}


@dataclass(frozen=True)
class Description:
    config: Config
    hf_config: PretrainedConfig


def describe(path: Path | None, **sections: Any) -> Description:
    raw: dict[str, Any] = {"model": {"path": str(path)} if path else {"hf_config": HF}, "data": {"type": "countdown"}}
    raw |= sections | {"rollout": {"max_response_tokens": 16}}
    raw["data"] = raw["data"] | {"max_prompt_tokens": 8}
    config = parse_config(raw)
    return Description(config, resolve_hf_config(read_hf_config(config.model)))


def write_source(folder: Path, config: dict[str, Any], **tokenizer: Any) -> Path:
    """A model folder with `config` as its config.json, written as no library would, and these tokenizer options."""
    own = copy.deepcopy(config)  # transformers writes into the dicts of RoPE
    model = hf_model(**{key: value for key, value in own.items() if key not in ("torch_dtype", "dtype")})
    save(model, folder)
    character_tokenizer().save_pretrained(folder)
    options = json.loads((folder / "tokenizer_config.json").read_text()) | tokenizer
    (folder / "tokenizer_config.json").write_text(json.dumps(options, indent=1))
    (folder / "config.json").write_text(json.dumps(config, indent=7, ensure_ascii=False))
    for name, text in SIDE.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def old(tmp_path: Path) -> Path:
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["+", "-"]}
    folder = write_source(tmp_path / "old", OLD_CONFIG, **named)
    (folder / "README.md").write_text("of the source alone")
    return folder


CARRIED = {"config.json", "tokenizer.json", "tokenizer_config.json", *SIDE}


def test_a_source_that_both_read_is_carried_over_byte_for_byte(old: Path, tmp_path: Path) -> None:
    hf_to_megatron(old, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    data = {"type": "jsonl", "train_path": "rows.jsonl"}
    described = describe(old, data=data)
    files = policy_files(described, build_tokenizer(described.config))
    assert files.keys() == CARRIED
    back = {str(p.relative_to(tmp_path / "back")) for p in (tmp_path / "back").rglob("*") if p.is_file()}
    assert back - {"model.safetensors"} == CARRIED
    for name in CARRIED:
        assert files[name] == (old / name).read_bytes() == (tmp_path / "back" / name).read_bytes(), name


def test_the_tokenizer_comes_from_where_the_run_has_it(old: Path, tmp_path: Path) -> None:
    other = write_source(tmp_path / "other", OLD_CONFIG, additional_special_tokens=["*"])
    data = {"type": "jsonl", "train_path": "rows.jsonl", "tokenizer": str(other)}
    of_other = policy_files(describe(old, data=data), object())
    assert b'"*"' in of_other["tokenizer_config.json"] and of_other["config.json"] == (old / "config.json").read_bytes()
    without = policy_files(describe(old), None)
    assert without.keys() == {"config.json", "generation_config.json", "LICENSE"}
    own = policy_files(describe(old), character_tokenizer())  # the game's characters are nobody else's
    assert own.keys() == {*without, "tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize("keys", [("torch_dtype",), ("dtype",), ("torch_dtype", "dtype"), ()], ids=str)
def test_no_statement_of_the_dtype_is_left_behind(tmp_path: Path, keys: tuple[str, ...]) -> None:
    """Transformers reads `dtype` before `torch_dtype`, and before 4.56 the latter alone."""
    rest = {key: value for key, value in OLD_CONFIG.items() if key != "torch_dtype"}
    source = write_source(tmp_path / "in", rest | dict.fromkeys(keys, "float32"))
    hf_to_megatron(source, tmp_path / "out", dtype="bfloat16")
    written = json.loads((tmp_path / "out" / "hf" / "config.json").read_text())
    assert written == rest | dict.fromkeys(keys or ["torch_dtype"], "bfloat16")
    trained = json.loads(
        policy_files(describe(source, model={"path": str(source), "dtype": "bfloat16"}), None)["config.json"]
    )
    assert trained == written


def test_weights_of_several_dtypes_leave_the_config_alone(old: Path) -> None:
    infos = [TensorInfo((1,), torch.float32), TensorInfo((1,), torch.bfloat16)]
    assert converted_files(open_weights(old), infos)["config.json"] == (old / "config.json").read_bytes()


NEW = {key: value for key, value in OLD_CONFIG.items() if key not in ("rope_scaling", "rope_theta")}
BARE = {"rope_type": "default", "rope_theta": 500.0}


@pytest.mark.parametrize(
    ("stated", "added"),
    [
        ({"rope_parameters": BARE}, {"rope_theta": 500.0}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, {"rope_theta": 10000.0}),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 500.0}}, {"rope_theta": 500.0, "rope_scaling": LLAMA3}),
        ({"rope_parameters": BARE, "rope_theta": 500.0}, {}),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 500.0}, "rope_theta": 500.0, "rope_scaling": LLAMA3}, {}),
        # they disagree: what transformers 5 takes is what was trained
        ({"rope_parameters": BARE, "rope_theta": 7.0}, {"rope_theta": 500.0}),
        ({"rope_parameters": BARE, "rope_theta": 7.0, "rope_scaling": None}, {"rope_theta": 500.0}),
    ],
    ids=str,
)
def test_rope_is_written_in_the_old_form_too(tmp_path: Path, stated: dict[str, Any], added: dict[str, Any]) -> None:
    source = write_source(tmp_path / "in", NEW | stated)
    files = policy_files(describe(source), None)
    assert json.loads(files["config.json"]) == NEW | stated | added
    assert (files["config.json"] == (source / "config.json").read_bytes()) == (not added)


def test_the_number_of_experts_is_written_under_both_names(tmp_path: Path) -> None:
    moe = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    source = save(hf_model(**moe), tmp_path / "in")
    assert "num_experts" not in json.loads((source / "config.json").read_text())  # else there is nothing to test
    written = json.loads(policy_files(describe(source), None)["config.json"])
    assert written["num_experts"] == written["num_local_experts"] == 4


def test_the_tokenizer_is_written_as_both_read_it(tmp_path: Path) -> None:
    """Transformers 4 wants a dict under `extra_special_tokens`, and knows no TokenizersBackend."""
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["+", "-"]})
    source = write_source(tmp_path / "in", OLD_CONFIG)
    tokenizer.save_pretrained(source)
    stated = json.loads((source / "tokenizer_config.json").read_text())
    assert stated["extra_special_tokens"] == ["+", "-"] and stated["tokenizer_class"] == "TokenizersBackend"
    hf_to_megatron(source, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "hf" / "tokenizer_config.json").read_text())
    del stated["extra_special_tokens"]
    new = {"additional_special_tokens": ["+", "-"], "tokenizer_class": "PreTrainedTokenizerFast"}
    assert written == stated | new
    again = AutoTokenizer.from_pretrained(tmp_path / "out" / "hf")
    assert again.extra_special_tokens == ["+", "-"] and again.get_vocab() == tokenizer.get_vocab()
    assert again("(1+2)*3<eos>").input_ids == tokenizer("(1+2)*3<eos>").input_ids
    assert again.decode([2, 12, 1], skip_special_tokens=True) == "0"  # + is special


def test_named_special_tokens_stay_a_dict(tmp_path: Path) -> None:
    source = write_source(tmp_path / "in", OLD_CONFIG, extra_special_tokens={"image_token": "+"})
    files = converted_files(open_weights(source), [TensorInfo((1,), torch.float32)])
    assert json.loads(files["tokenizer_config.json"])["extra_special_tokens"] == {"image_token": "+"}


def test_what_has_no_source_is_generated() -> None:
    """Also what transformers' own writer leaves out because it is the default: other readers have other defaults."""
    described = describe(None, model={"hf_config": HF | {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}}})
    files = policy_files(described, character_tokenizer())
    assert files.keys() == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    written = json.loads(files["config.json"])
    assert written["architectures"] == ["Qwen2ForCausalLM"] and written["torch_dtype"] == "float32"
    assert "dtype" not in written and written["hidden_act"] == "silu" and written["num_key_value_heads"] == 2
    assert (written["rope_theta"], written["rope_scaling"]) == (500.0, LLAMA3)
    assert resolve_hf_config(written).to_diff_dict() == described.hf_config.to_diff_dict() | {
        "architectures": ["Qwen2ForCausalLM"],
        "dtype": "float32",
    }


def test_defaults_of_the_policy_that_are_not_those_of_transformers_are_written(tmp_path: Path) -> None:
    """Qwen2 without num_key_value_heads: here as many as heads, there 32."""
    stated = {key: value for key, value in HF.items() if key != "num_key_value_heads"}
    source = save(hf_model(num_key_value_heads=4), tmp_path / "in")
    (source / "config.json").write_text(json.dumps(stated))
    assert json.loads(policy_files(describe(source), None)["config.json"])["num_key_value_heads"] == 4


@pytest.mark.parametrize("loose", [{"rms_norm_eps": 1}, {"hidden_act": None}, {"hidden_act": "swish"}])
def test_what_only_the_policy_reads_is_written_so_that_all_do(tmp_path: Path, loose: dict[str, Any]) -> None:
    """transformers refuses 1 for 1.0 and null; the engines know no `swish`, another name of silu."""
    (tmp_path / "config.json").write_text(json.dumps(HF | {"vocab_size": 37} | loose))
    described = describe(tmp_path)
    written = json.loads(policy_files(described, None)["config.json"])
    understood, expected = AutoConfig.for_model(**written).to_dict(), described.hf_config.to_dict()
    compared = understood.keys() - {"architectures", "dtype", "transformers_version"}
    assert {key: understood[key] for key in compared} == {key: expected[key] for key in compared}
    assert understood["hidden_act"] == "silu"


def test_servers_get_the_same_files_without_end_tokens(old: Path, tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "generation_config.json").write_text("{}")
    described = describe(old, data={"type": "jsonl", "train_path": "rows.jsonl"})
    write_model_dir(tmp_path / "engine", described, build_tokenizer(described.config))
    assert not (tmp_path / "engine" / "generation_config.json").exists()
    assert json.loads((tmp_path / "engine" / "config.json").read_text()) == OLD_CONFIG | {"eos_token_id": None}
    for name in CARRIED - {"config.json", "generation_config.json"}:
        assert (tmp_path / "engine" / name).read_bytes() == (old / name).read_bytes(), name
