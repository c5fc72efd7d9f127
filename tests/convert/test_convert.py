"""Conversion both ways: bit for bit, in Megatron's own format, with everything that belongs to a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_rl import cli
from megatron_rl.convert import torch_dist
from megatron_rl.convert.check import compare_logits, compare_tensors
from megatron_rl.convert.hf import hub_views
from megatron_rl.convert.to_hf import megatron_to_hf, parse_size
from megatron_rl.convert.to_megatron import hf_to_megatron
from megatron_rl.convert.weights import expected_shapes
from megatron_rl.data.tokenizer import character_tokenizer
from megatron_rl.errors import UserError
from megatron_rl.models.facts import read_hf_config
from megatron_rl.models.mapping import model_rows
from tests.policy.tiny import HF, hf_model, make_batch, make_config, policy_of, same_bits, save, weights_of
from tests.worlds import Worlds

MOE = {
    "model_type": "qwen3_moe",
    "head_dim": 16,
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2 tied": {"tie_word_embeddings": True},
    "qwen3 untied": {"model_type": "qwen3", "head_dim": 16},
    "llama": {"model_type": "llama", "num_key_value_heads": 1, "num_attention_heads": 2},
    "qwen3_moe": MOE,
    "qwen3_moe, dense layer 0": MOE | {"mlp_only_layers": [0], "tie_word_embeddings": True},
}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Read by the safetensors library."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Model -> (Hugging Face folder of several shards with a tokenizer, its conversion)."""
    root, found = tmp_path_factory.mktemp("models"), {}
    for name, changes in MODELS.items():
        source = save(hf_model(**changes), root / name / "hf", max_shard_size="40KB")
        assert (source / "model.safetensors.index.json").is_file()
        character_tokenizer().save_pretrained(source)
        (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
        hf_to_megatron(source, root / name / "megatron")
        found[name] = source, root / name / "megatron"
    return found


@pytest.mark.parametrize("changes", [*MODELS.values(), {"model_type": "mistral", "sliding_window": None}], ids=str)
def test_expected_shapes_are_those_of_transformers(changes: dict[str, Any]) -> None:
    hf = AutoConfig.for_model(**(HF | changes))
    with torch.device("meta"):
        views = hub_views(dict(AutoModelForCausalLM.from_config(hf).named_parameters()))
    rows = [
        (name, shape) for row in model_rows(hf) for name, shape in zip(row.hf, expected_shapes(row, hf), strict=True)
    ]
    assert dict(rows) == {name: tuple(view.shape) for name, view in views.items()} and len(rows) == len(views)


@pytest.mark.parametrize("model", MODELS)
def test_a_round_trip_keeps_every_bit(folders: dict[str, tuple[Path, Path]], model: str, tmp_path: Path) -> None:
    source, megatron = folders[model]
    megatron_to_hf(megatron, tmp_path / "back", max_shard_size="20KB")
    assert same_bits(tensors_of(source), tensors_of(tmp_path / "back"))
    files = sorted(path.name for path in (tmp_path / "back").glob("*.safetensors"))
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert set(index["weight_map"].values()) == set(files) and len(files) > 3
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert same_bits(loaded.state_dict(), AutoModelForCausalLM.from_pretrained(source).state_dict())
    found = compare_tensors(source, megatron)
    assert found.differences == () and found.num_tensors == len(tensors_of(source))


@pytest.mark.parametrize("model", ["qwen2 tied", "qwen3_moe"])
def test_what_belongs_to_the_model_travels(folders: dict[str, tuple[Path, Path]], model: str, tmp_path: Path) -> None:
    """The source is as transformers 5 writes it; what transformers 4 reads is added."""
    source, megatron = folders[model]
    megatron_to_hf(megatron, tmp_path / "back")
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (source / name).read_bytes() == (tmp_path / "back" / name).read_bytes(), name
    added = {"rope_theta": 500.0} | ({"num_experts": 4} if model == "qwen3_moe" else {})
    assert read_json(tmp_path / "back" / "config.json") == read_json(source / "config.json") | added
    added = {"tokenizer_class": "PreTrainedTokenizerFast"}
    assert read_json(tmp_path / "back" / "tokenizer_config.json") == read_json(source / "tokenizer_config.json") | added
    assert read_hf_config(make_config(megatron).model) == read_json(tmp_path / "back" / "config.json")
    largest, same, tokens = compare_logits(megatron, tmp_path / "back", "(1+2)*3")
    assert (largest, same, tokens) == (0.0, True, 7)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


# --- Megatron's own reader and writer ---------------------------------------------------------------------------------


def _through_megatron(cases: list[tuple[Path, Path, Path | None, dict[str, Any]]]) -> list[dict[str, Any]]:
    """For (Hugging Face folder, conversion, folder for checkpoints, layout), the weights: that dist_checkpointing.load
    puts into a policy of zeros; after an update and a training checkpoint; of a policy whose model.path is the
    conversion."""
    from megatron_rl.policy.checkpoint import CheckpointStore

    found = []
    for source, megatron, target, layout in cases:
        config, weights = make_config(source, parallel=layout), {}
        with policy_of(config) as policy:
            from megatron.core import dist_checkpointing

            for _, parameter in policy.parameters:
                parameter.data.zero_()
            metadata = {"singleton_local_shards": False, "dp_cp_group": policy.groups.dp_cp}
            wanted = {"model": policy.model.chunks[0].sharded_state_dict(metadata=metadata)}
            state, unread, absent = dist_checkpointing.load(wanted, str(megatron), strict="return_all")
            assert not absent, absent
            assert not [key for key in unread if "_extra_state" not in key and "pre_mlp_layernorm" not in key]
            policy.model.chunks[0].load_state_dict(state["model"])
            weights["loaded"] = weights_of(policy)
            if target is not None:
                policy.reset_optimizer()
                batch = make_batch(config, policy.groups)
                policy.update(batch.mini_batches[0], config.loss)
                weights["trained"] = weights_of(policy)
                CheckpointStore(target, policy, policy.groups).save(1, {})
        with policy_of(make_config(megatron, parallel=layout)) as policy:
            weights["from_path"] = weights_of(policy)
        found.append(weights)
    return found


def test_megatron_loads_a_conversion_and_training_checkpoints_convert(
    worlds: Worlds, folders: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """37 tokens: the vocabulary is padded at TP2, in memory and in the checkpoint that training writes."""
    layouts: list[tuple[str, dict[str, Any], bool]] = [
        ("qwen2 tied", {"tp": 2}, True),
        ("qwen2 tied", {"pp": 2}, False),
        ("qwen3 untied", {"tp": 2}, False),
        ("llama", {"tp": 2}, False),  # one key-value head
        ("qwen3_moe", {"tp": 2, "ep": 2, "sp": True}, True),
        ("qwen3_moe, dense layer 0", {"pp": 2}, True),
    ]
    cases = [
        (*folders[model], tmp_path / str(i) if saves else None, layout)
        for i, (model, layout, saves) in enumerate(layouts)
    ]
    ranks = worlds.run(2, _through_megatron, cases, timeout=280)
    for i, (source, _, target, layout) in enumerate(cases):
        expected = tensors_of(source)
        for rank in ranks:
            assert same_bits(rank[i]["loaded"], expected), (source, layout)
            assert same_bits(rank[i]["from_path"], expected), (source, layout)
        if target is not None:
            trained = ranks[0][i]["trained"]
            assert not same_bits(trained, expected)
            megatron_to_hf(target / "step_00000001", target / "hf")
            assert same_bits(tensors_of(target / "hf"), trained), (source, layout)


def test_large_tensors_are_stored_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of two rows, files of one block: every row comes back to its place, and leading rows can be read alone."""
    monkeypatch.setattr(torch_dist, "_BLOCK_BYTES", 2 * 3 * 4)
    layers = torch.randn(2, 5, 3)
    writer = torch_dist.TorchDistWriter(tmp_path, file_bytes=1)
    for layer in range(2):
        writer.add(["w", "alias"], layers[layer], (layer,), (2,))
    writer.finish()
    assert len(list(tmp_path.glob("*.distcp"))) == 6
    reader = torch_dist.TorchDistReader(tmp_path)
    assert torch.equal(reader.read("w", (1,)), layers[1]) and torch.equal(reader.read("alias", (0,)), layers[0])
    assert torch.equal(reader.read("w", (1,), rows=3), layers[1, :3])
    with pytest.raises(UserError, match=r"15 of 18 elements of w\[1\] are stored"):
        reader.read("w", (1,), rows=6)


# --- options ----------------------------------------------------------------------------------------------------------


def test_dtype_is_that_of_the_weights_and_of_the_config(folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    source, megatron = folders["llama"]
    hf_to_megatron(source, tmp_path / "half", dtype="bfloat16")
    megatron_to_hf(tmp_path / "half", tmp_path / "back")
    megatron_to_hf(megatron, tmp_path / "direct", dtype="bfloat16")
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in tensors_of(source).items()}
    for folder in (tmp_path / "back", tmp_path / "direct"):
        assert same_bits(tensors_of(folder), expected)
        assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_value_beyond_float16_is_refused_and_leaves_nothing(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    source, _ = folders["llama"]
    (tmp_path / "in").mkdir()
    shutil.copyfile(source / "config.json", tmp_path / "in" / "config.json")
    tensors = tensors_of(source)
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    with pytest.raises(UserError, match="model.norm.weight: 1 values are beyond float16's range"):
        hf_to_megatron(tmp_path / "in", tmp_path / "out", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_sizes() -> None:
    assert (parse_size("5GB"), parse_size("300mb")) == (5 * 10**9, 3 * 10**8)
    for text in ("5", "0GB", "5GiB", "-1GB"):
        with pytest.raises(UserError, match="--max-shard-size"):
            parse_size(text)


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    monkeypatch.setattr("sys.argv", ["megatron-rl", "convert", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_the_three_commands(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    source, _ = folders["qwen3 untied"]
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    assert run_cli(monkeypatch, "hf-to-megatron", source, megatron) == 0
    assert run_cli(monkeypatch, "megatron-to-hf", megatron, back) == 0
    assert capsys.readouterr().out.split() == [str(megatron), str(back)]
    assert run_cli(monkeypatch, "check", source, back, "--prompt", "(1+2)") == 0
    out = capsys.readouterr().out
    assert "equal bit for bit" in out and "max |difference| 0, tolerance 0.0001" in out
    assert run_cli(monkeypatch, "hf-to-megatron", source, megatron) == 1
    assert f"{megatron} exists; give another target, or --force" in capsys.readouterr().err
    assert run_cli(monkeypatch, "megatron-to-hf", back, tmp_path / "x") == 2
    assert "is a Hugging Face model already" in capsys.readouterr().err


def test_check_names_every_difference(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    source, megatron = folders["qwen3 untied"]
    shutil.copytree(source, tmp_path / "b", ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = tensors_of(source)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][5, 7] += 0.25
    tensors[name][6, 1] -= 0.5
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.bfloat16).float()
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.bfloat16)
    save_file(tensors, tmp_path / "b" / "model.safetensors")
    assert run_cli(monkeypatch, "check", megatron, tmp_path / "b", "--prompt", "12") == 1
    out = capsys.readouterr().out
    assert f"{name}: 2 elements differ, max |difference| 0.5\n" in out
    assert "lm_head.weight: dtype float32 against bfloat16; " in out
    assert out.count("differs  ") == 3 and "DIFFERENT" in out and "tolerance 0.0001" in out
    other, _ = folders["llama"]
    differences = compare_tensors(source, other).differences
    assert f"model.layers.0.self_attn.q_norm.weight: only in {source}" in differences
    assert "model.layers.0.self_attn.q_proj.weight: shape (64, 32) against (32, 32)" in differences
