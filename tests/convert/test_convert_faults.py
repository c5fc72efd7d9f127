"""What cannot be converted is refused by name, and before anything is written."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_rl.convert import disk
from megatron_rl.convert.quantize import fp8_to_hf, read_texts
from megatron_rl.convert.safetensors_io import write_file
from megatron_rl.convert.to_hf import megatron_to_hf
from megatron_rl.convert.to_megatron import hf_to_megatron
from megatron_rl.data.tokenizer import character_tokenizer
from megatron_rl.errors import UserError
from tests.policy.tiny import hf_model, save


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf` (several shards, tied, with a tokenizer) and `megatron`."""
    root = tmp_path_factory.mktemp("sound")
    source = save(hf_model(tie_word_embeddings=True), root / "hf", max_shard_size="20KB")
    character_tokenizer().save_pretrained(source)
    hf_to_megatron(source, root / "megatron")
    return root


@pytest.fixture
def copies(models: Path, tmp_path: Path) -> Path:
    shutil.copytree(models, tmp_path / "in")
    return tmp_path / "in"


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Rewrite the folder as a single file."""
    tensors = {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_index(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def truncate(path: Path, to: int = -100) -> None:
    path.write_bytes(path.read_bytes()[:to])


def add_token(folder: Path) -> None:
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["model"]["vocab"]["?"] = 37
    path.write_text(json.dumps(raw))


NORM = "model.norm.weight"
HF_FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated shard": (
        lambda f: truncate(sorted(f.glob("*.safetensors"))[1]),
        r"model-00002-of-\d+.safetensors: truncated: [\d,]+ bytes, the header promises",
    ),
    "truncated header": (
        lambda f: truncate(sorted(f.glob("*.safetensors"))[0], 50),
        r"model-00001-of-\d+.safetensors: no safetensors file, or truncated within its header \(50 bytes\)",
    ),
    "missing shard": (
        lambda f: sorted(f.glob("*.safetensors"))[1].unlink(),
        r"index.json: names 1 files that do not exist: model-00002",
    ),
    "index without a tensor": (
        lambda f: edit_index(f, lambda m: m.pop(NORM)),
        r"wrong index: model-0000\d-of-\d+.safetensors holds model.norm.weight, which the index puts into no file",
    ),
    "index with another file": (
        lambda f: edit_index(f, lambda m: m.update({NORM: m["model.embed_tokens.weight"]})),
        r"wrong index: model-0000\d-of-\d+.safetensors holds model.norm.weight, which the index puts into model-00001",
    ),
    "index with a tensor too many": (
        lambda f: edit_index(f, lambda m: m.update({"model.extra": m[NORM]})),
        r"wrong index: model-0000\d-of-\d+.safetensors does not hold model.extra",
    ),
    "index outside the folder": (
        lambda f: edit_index(f, lambda m: m.update({NORM: "../x.safetensors"})),
        r"'../x.safetensors' is not a plain name",
    ),
    "damaged index": (lambda f: truncate(f / "model.safetensors.index.json"), "not an index with a weight_map"),
    "both kinds of file": (
        lambda f: shutil.copyfile(sorted(f.glob("*.safetensors"))[0], f / "model.safetensors"),
        "holds both model.safetensors.index.json and model.safetensors",
    ),
    "unknown tensor": (
        lambda f: edit_tensors(f, lambda t: t.update({"model.layers.0.mlp.gate.bias": torch.zeros(3)})),
        "1 unknown: model.layers.0.mlp.gate.bias",
    ),
    "missing tensor": (lambda f: edit_tensors(f, lambda t: t.pop(NORM)), "1 missing: model.norm.weight"),
    "layers too many": (
        lambda f: edit_json(f / "config.json", num_hidden_layers=1, layer_types=["full_attention"]),
        "12 unknown: model.layers.1",
    ),
    "invalid config": (
        lambda f: edit_json(f / "config.json", num_hidden_layers=1),
        r"layer_types names \d layers, num_hidden_layers=1",
    ),
    "mis-shaped tensor": (
        lambda f: edit_tensors(f, lambda t: t.update({NORM: torch.zeros(31)})),
        r"model.norm.weight has shape \(31,\), expected \(32,\)",
    ),
    "integers": (
        lambda f: edit_tensors(f, lambda t: t.update({NORM: torch.zeros(32, dtype=torch.int8)})),
        "model.norm.weight has dtype I8, expected one of F32, F16, BF16",
    ),
    "tied embeddings that differ": (
        lambda f: edit_tensors(f, lambda t: t.update({"lm_head.weight": torch.zeros(37, 32)})),
        "config.json ties the embeddings, but lm_head.weight and model.embed_tokens.weight differ",
    ),
    "foreign architecture": (
        lambda f: edit_json(f / "config.json", model_type="gpt2"),
        "model_type 'gpt2' is not supported; supported: llama",
    ),
    "unsupported feature": (
        lambda f: edit_json(f / "config.json", use_sliding_window=True),
        r"qwen2 with sliding-window attention \(use_sliding_window\) is not supported",
    ),
    "quantised": (
        lambda f: edit_json(f / "config.json", quantization_config={"quant_method": "fp8"}),
        r"quantised weights \(quantization_config; give the model",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "neither a Hugging Face model .* nor a Megatron checkpoint"),
    "no weights": (
        lambda f: [path.unlink() for path in f.glob("*.safetensors*")],
        "no model.safetensors and no model.safetensors.index.json; give a folder with safetensors weights",
    ),
    "other weights": (
        lambda f: [*(path.unlink() for path in f.glob("*.safetensors*")), (f / "pytorch_model.bin").touch()],
        r"it has .bin files: save the model as safetensors first",
    ),
    "tokenizer of another model": (add_token, "tokenizer mismatch: it has a token 37, the model's vocab_size is 37"),
    "damaged tokenizer": (lambda f: truncate(f / "tokenizer.json"), "the tokenizer cannot be loaded"),
    "tokenizer without a model": (lambda f: (f / "tokenizer.json").write_text("{}"), "the tokenizer cannot be loaded"),
}


@pytest.mark.parametrize("fault", HF_FAULTS)
def test_a_hugging_face_folder_is_refused(fault: str, copies: Path, tmp_path: Path) -> None:
    damage, message = HF_FAULTS[fault]
    damage(copies / "hf")
    with pytest.raises(UserError, match=f"(?s){message}"):
        hf_to_megatron(copies / "hf", tmp_path / "new" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


MEGATRON_FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated data": (lambda f: truncate(f / "__0_0.distcp"), r"__0_0.distcp is truncated: it has [\d,]+ bytes"),
    "missing data": (lambda f: (f / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "missing metadata": (lambda f: (f / ".metadata").unlink(), ".metadata missing; this is no complete Megatron"),
    "truncated metadata": (lambda f: truncate(f / ".metadata"), r"\.metadata cannot be read"),
    "no hf folder": (lambda f: shutil.rmtree(f / "hf"), "its sub-folder hf"),
    "another config": (
        lambda f: edit_json(f / "hf" / "config.json", intermediate_size=64),
        r"decoder.layers.mlp.linear_fc1.weight has shape \(2, 96, 32\), expected \(2, 128, 32\)",
    ),
    "untied": (
        lambda f: edit_json(f / "hf" / "config.json", tie_word_embeddings=False),
        "1 missing: output_layer.weight",
    ),
    "without biases": (
        lambda f: edit_json(f / "hf" / "config.json", model_type="llama"),
        "1 unknown: decoder.layers.self_attention.linear_qkv.bias",
    ),
    "another format": (lambda f: edit_json(f / "metadata.json", sharded_backend="zarr"), "sharded_backend is 'zarr'"),
    "code in the metadata": (
        lambda f: (f / ".metadata").write_bytes(b"cos\nsystem\n(S'true'\ntR."),
        r"os.system is no part of the format",
    ),
    "smaller vocabulary": (
        lambda f: edit_json(f / "hf" / "config.json", vocab_size=10),
        "tokenizer mismatch: it has a token .* vocab_size is 10",
    ),
}


@pytest.mark.parametrize("fault", MEGATRON_FAULTS)
def test_a_checkpoint_is_refused(fault: str, copies: Path, tmp_path: Path) -> None:
    damage, message = MEGATRON_FAULTS[fault]
    damage(copies / "megatron")
    with pytest.raises(UserError, match=f"(?s){message}"):
        megatron_to_hf(copies / "megatron", tmp_path / "new" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_folder_of_checkpoints_points_to_the_newest(models: Path, tmp_path: Path) -> None:
    for step in (1, 2):
        (tmp_path / "run" / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    with pytest.raises(UserError, match="did you mean .*checkpoints/step_00000002"):
        megatron_to_hf(tmp_path / "run", tmp_path / "out")


# --- the target -------------------------------------------------------------------------------------------------------


def test_an_existing_target_stays_unless_forced(models: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    hf_to_megatron(models / "hf", target)
    (target / "mark").touch()
    with pytest.raises(UserError, match="out exists; give another target, or --force to replace it"):
        hf_to_megatron(models / "hf", target)
    assert (target / "mark").exists()
    hf_to_megatron(models / "hf", target, force=True)
    assert not (target / "mark").exists() and (target / "hf" / "config.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_replaces_models_only(models: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    (tmp_path / "link").symlink_to(models / "megatron")
    for name in ("home", "link"):
        with pytest.raises(UserError, match=f"{name} is no model folder: --force does not replace it"):
            hf_to_megatron(models / "hf", tmp_path / name, force=True)
    for target in (models / "hf", models / "hf" / "inner", models):
        with pytest.raises(UserError, match="lie within one another"):
            hf_to_megatron(models / "hf", target, force=True)
    assert (tmp_path / "home" / "thesis.tex").exists() and (models / "hf" / "config.json").exists()


def test_force_spares_a_runs_checkpoint(models: Path, tmp_path: Path) -> None:
    """Without its optimizer the run could not go on. A converted checkpoint has no config.yaml."""
    target = tmp_path / "step_00000004"
    shutil.copytree(models / "megatron", target)
    (target / "config.yaml").touch()
    for convert, source in ((hf_to_megatron, "hf"), (megatron_to_hf, "megatron")):
        with pytest.raises(UserError, match="step_00000004 is a training checkpoint: --force does not replace it"):
            convert(models / source, target, force=True)
    assert (target / "config.yaml").exists() and not list(tmp_path.glob(".*"))


def test_what_is_a_megatron_checkpoint_already_is_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a Megatron checkpoint already; hf-to-megatron takes a Hugging Face model"):
        hf_to_megatron(models / "megatron", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_leftovers_that_cannot_be_removed_do_not_block(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a killed conversion, of a replaced model, and of the model that this one replaces."""
    rmtree, stuck = shutil.rmtree, (".out.old", ".out.draft/hf", ".out.old.1")
    for name in stuck[:2]:
        (tmp_path / name / "file").mkdir(parents=True)
    shutil.copytree(models / "megatron", tmp_path / "out")

    def fails(path: Path, *arguments: Any, **options: Any) -> None:
        if str(path) in [str(tmp_path / name) for name in stuck]:
            raise OSError(16, "Device or resource busy", str(path))
        rmtree(path, *arguments, **options)

    monkeypatch.setattr(disk.shutil, "rmtree", fails)
    hf_to_megatron(models / "hf", tmp_path / "out", force=True)
    assert (tmp_path / "out" / "metadata.json").is_file()
    said = capsys.readouterr().err
    for name in stuck:
        assert f"cannot remove {tmp_path / name} (OSError: [Errno 16]" in said, said
    names = {".out.draft", ".out.old", ".out.old.1", "out"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert [path.name for path in (tmp_path / ".out.draft").iterdir()] == ["hf"]  # what was stuck, and nothing new


def test_a_killed_conversion_is_started_over(models: Path, tmp_path: Path) -> None:
    draft = tmp_path / ".out.draft"
    (draft / "hf").mkdir(parents=True)
    (draft / "model-00009-of-00009.safetensors").touch()
    megatron_to_hf(models / "megatron", tmp_path / "out")
    assert not (tmp_path / "out" / "model-00009-of-00009.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_replacement_killed_between_its_renames_loses_nothing(models: Path, tmp_path: Path) -> None:
    """The old folder is back; with --force it is replaced as before."""
    target, old = tmp_path / "out", tmp_path / ".out.old"
    shutil.copytree(models / "megatron", old)
    with pytest.raises(UserError, match="out exists"):
        hf_to_megatron(models / "hf", target)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    target.rename(old)
    hf_to_megatron(models / "hf", target, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_conversions_to_one_target_do_not_mix(models: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.draft").mkdir()
    lock = os.open(tmp_path / ".out.draft", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another conversion is writing it"):
        hf_to_megatron(models / "hf", tmp_path / "out")
    assert (tmp_path / ".out.draft").exists()
    os.close(lock)
    hf_to_megatron(models / "hf", tmp_path / "out")


def test_a_full_disk_is_seen_before_and_while_writing(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("megatron_rl.convert.to_hf.write_files", fails)
        with pytest.raises(UserError, match="cannot write .*out: .*No space left on device; nothing was left behind"):
            megatron_to_hf(models / "megatron", tmp_path / "out")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    with pytest.raises(UserError, match=r"the result needs 0.1 GB, 0.0 GB are free"):
        megatron_to_hf(models / "megatron", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_tensor_that_is_not_as_announced_is_a_bug(tmp_path: Path) -> None:
    from megatron_rl.convert.safetensors_io import TensorInfo

    infos = {"a": TensorInfo((2, 3), torch.float32)}
    with pytest.raises(ValueError, match="a: announced"):
        write_file(tmp_path / "x", infos, lambda _: torch.zeros(3, 2), lambda _: None)


# --- quantisation -----------------------------------------------------------------------------------------------------


def test_quantisation_without_modelopt_says_how_to_install_it(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "modelopt", None)
    (tmp_path / "texts").write_text("1+2\n")
    with pytest.raises(UserError, match=r"fp8 needs nvidia-modelopt .*pip install 'nvidia-modelopt==0"):
        fp8_to_hf(models / "megatron", tmp_path / "out", calibration=tmp_path / "texts")
    assert not (tmp_path / "out").exists()


def test_calibration_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" one \n\ntwo\n" + "more\n" * 200)
    assert list(read_texts(tmp_path / "a.txt"))[:3] == ["one", "two", "more"]
    assert len(list(read_texts(tmp_path / "a.txt"))) == 128
    (tmp_path / "b.jsonl").write_text('{"id": 1, "problem": "x"}\n{"text": "y"}\n')
    assert list(read_texts(tmp_path / "b.jsonl")) == ["x", "y"]
    # the last two hold no text: half of a surrogate pair, and messages
    for record in ('{"id": 1}', '{"text": "\\ud800"}', '{"prompt": [{"role": "user", "content": "x"}]}'):
        (tmp_path / "b.jsonl").write_text(record + "\n")
        with pytest.raises(UserError, match="b.jsonl:1: expected a JSON object with a text as problem, prompt or text"):
            list(read_texts(tmp_path / "b.jsonl"))
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "\xc3\xbc"}\n')
    assert list(read_texts(tmp_path / "b.jsonl")) == ["\u00fc"]
    for name in ("a.txt", "b.jsonl"):
        (tmp_path / name).write_bytes(b'{"text": "one"}\n{"text": "\xfc"}\n')
        with pytest.raises(UserError, match=f"{name}:2: expected text in UTF-8"):
            list(read_texts(tmp_path / name))
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(UserError, match="the file is empty"):
        list(read_texts(tmp_path / "a.txt"))
    with pytest.raises(UserError, match="no such file"):
        list(read_texts(tmp_path / "c"))
