"""Warm starts: cached bit for bit, keyed by what they depend on, never half-written, the same under every layout."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_rl.algorithms.methods.ppo_clip import PpoClipLoss
from megatron_rl.config import Config, ModelConfig
from megatron_rl.convert.to_megatron import hf_to_megatron
from megatron_rl.data.problems import load_prompts
from megatron_rl.data.tokenizer import build_tokenizer
from megatron_rl.errors import UserError
from tests.policy.tiny import HF, hf_model, make_batch, make_config, policy_of, same_bits, save, weights_of, worst
from tests.worlds import Worlds, leave_layout

STEPS = 5


def _config(cache: Path, **sections: Any) -> Config:
    sections["warm_start"] = {"steps": STEPS, "batch_size": 8, "lr": 2e-3, "cache_dir": str(cache)} | sections.get(
        "warm_start", {}
    )
    sections["data"] = {"num_train": 24, "num_eval": 4, "max_prompt_tokens": 24} | sections.get("data", {})
    sections["train"] = {"micro_batch_tokens": 80} | sections.get("train", {})
    return make_config(None, **sections)


def _warm(config: Config, *, updates: int = 0) -> dict[str, Any]:
    from megatron_rl.packing import Layout
    from megatron_rl.warm_start import warm_start

    tokenizer = build_tokenizer(config)
    prompts = load_prompts(config, tokenizer).train
    with policy_of(config) as policy:
        before = weights_of(policy)
        warm_start(policy, prompts, Layout.of(config, policy.groups), tokenizer)
        found = {"before": before, "weights": weights_of(policy)}
        batch = make_batch(config, policy.groups)
        results = [policy.update(batch.mini_batches[i], PpoClipLoss()) for i in range(updates)]
        found["rates"], found["after updates"] = [r.learning_rate for r in results], weights_of(policy)
    return found


def _cold_then_cached(configs: list[Config]) -> list[list[dict[str, Any]]]:
    """Twice each; the second call must not train at all."""
    import megatron_rl.warm_start as module

    found, train = [], module._train
    for config in configs:
        first = _warm(config, updates=2)
        module._train = None
        second = _warm(config, updates=2)
        module._train = train
        found.append([first, second])
    return found


LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2": {"tp": 2},
    "dp2": {"world_size": 2},
    "pp2": {"pp": 2},
}


@pytest.fixture(scope="module")
def warmed(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[Any]]]:
    """Layout -> (its cache folder, per rank the two calls' outcomes)."""
    root = tmp_path_factory.mktemp("warm")
    found = {}
    for size in (1, 2):
        names = [name for name in LAYOUTS if (name != "tp1") + 1 == size]
        configs = [_config(root / name, parallel=LAYOUTS[name]) for name in names]
        ranks = worlds.run(size, _cold_then_cached, configs)
        found |= {name: (root / name, [rank[i] for rank in ranks]) for i, name in enumerate(names)}
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_cached_warm_start_is_the_cold_one(warmed: dict[str, tuple[Path, list[Any]]], layout: str) -> None:
    folder, ranks = warmed[layout]
    for cold, cached in ranks:
        assert same_bits(cold["before"], cached["before"])
        assert worst(cold["before"], cold["weights"]) > 1e-3
        assert same_bits(cold["weights"], cached["weights"])
        # the optimizer starts afresh: neither moments nor the schedule remember the supervised steps
        assert cold["rates"] == cached["rates"] == [1e-3, 1e-3]
        assert same_bits(cold["after updates"], cached["after updates"])
    (cache,) = folder.iterdir()  # no draft is left
    stored = AutoModelForCausalLM.from_pretrained(cache).state_dict()
    assert all((stored[name] == tensor).all() for name, tensor in ranks[0][0]["weights"].items())
    assert AutoTokenizer.from_pretrained(cache).encode("1+2")


def test_layouts_agree(warmed: dict[str, tuple[Path, list[Any]]]) -> None:
    """Weights agree within 1.2e-7 (measured) where they move by 6e-3."""
    one = warmed["tp1"][1][0][0]["weights"]
    for layout, (_, ranks) in warmed.items():
        for cold, _ in ranks:
            print(f"{layout}: {worst(one, cold['weights']):.1e} of {worst(one, cold['before']):.1e}")
            assert worst(one, cold["weights"]) < 5e-6, layout


def test_the_cache_key_covers_what_the_result_depends_on(tmp_path: Path) -> None:
    from megatron_rl.warm_start import _cache_key

    def key(num_prompts: int = 24, **sections: Any) -> str:
        return _cache_key(_config(tmp_path, **sections), num_prompts)

    other_model = {"hf_config": HF | {"intermediate_size": 64}}
    changes: list[dict[str, Any]] = [
        {"model": other_model},
        {"model": {"dtype": "bfloat16"}},
        {"warm_start": {"steps": 6}},
        {"warm_start": {"lr": 1e-3}},
        {"data": {"max_target": 40}},
        {"optimizer": {"weight_decay": 0.1}},
        {"rollout": {"temperature": 0.9}},
    ]
    keys = [key(), key(23), _cache_key(_config(tmp_path).model_copy(update={"seed": 2}), 24)]
    keys += [key(**change) for change in changes]
    assert len(set(keys)) == len(keys)
    same = [
        {"parallel": {"tp": 2}},
        {"model": {"recompute": "full"}},
        {"optimizer": {"lr": 0.1}},
        {"warm_start": {"cache_dir": "x"}},
    ]
    assert {key(**change) for change in same} == {key()}


def test_the_cache_key_follows_the_files_of_the_model_not_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_rl.warm_start import _cache_key

    def key(path: str | Path) -> str:
        config = _config(tmp_path)
        return _cache_key(config.model_copy(update={"model": ModelConfig(path=str(path))}), 24)

    folder = save(hf_model(), tmp_path / "model")
    (tmp_path / "link").symlink_to(folder)
    shutil.copytree(folder, tmp_path / "same", copy_function=shutil.copy2)
    (folder / "a_run_in_it").mkdir()
    monkeypatch.chdir(tmp_path)
    first = key(folder)
    assert {key(path) for path in ("model", "./model/", tmp_path / "link", "same/../model", "same")} == {first}

    hf_to_megatron(folder, tmp_path / "megatron")
    keys = [first, key("megatron")]
    for file in ("megatron/hf/config.json", "megatron/.metadata", "model/model.safetensors"):  # rewritten in place
        path = tmp_path / file
        path.write_bytes(path.read_bytes())
        keys.append(key(path.parent.parent if path.parent.name == "hf" else path.parent))
    save(hf_model(hidden_size=64), folder)
    assert len({*keys, key(folder)}) == len(keys) + 1


def _warm_in_small_files(configs: list[Config]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Each rank has a config of its own. Twice; the second call must not train at all."""
    from megatron_rl.convert import save_hf

    config = configs[int(os.environ["RANK"])]
    with mock.patch.object(save_hf.save_hf, "__kwdefaults__", {"shard_bytes": 20_000}):
        first = _warm(config)
    with mock.patch("megatron_rl.warm_start._train", None):
        return first, _warm(config)


def test_nodes_with_copies_of_the_model_share_one_cache_of_several_files(worlds: Worlds, tmp_path: Path) -> None:
    """The copies' times differ, and so would their keys; the weights are streamed into files as save_hf writes them."""
    copies = [save(hf_model(), tmp_path / name) for name in ("node0", "node1")]
    os.utime(copies[1] / "config.json", (0, 0))
    config = _config(tmp_path / "cache", parallel={"tp": 2})
    configs = [config.model_copy(update={"model": ModelConfig(path=str(copy))}) for copy in copies]
    ranks = worlds.run(2, _warm_in_small_files, configs)
    for first, second in ranks:
        assert same_bits(first["weights"], second["weights"]) and same_bits(first["weights"], ranks[0][0]["weights"])
        assert worst(first["before"], first["weights"]) > 1e-3
    (cache,) = (tmp_path / "cache").iterdir()
    assert (cache / "model.safetensors.index.json").is_file() and len(list(cache.glob("*.safetensors"))) > 2
    assert same_bits(dict(AutoModelForCausalLM.from_pretrained(cache).state_dict()), ranks[0][0]["weights"])


def _warm_start_error(config: Config) -> str:
    try:
        _warm(config)
    except UserError as error:
        leave_layout()
        return str(error)
    return "no error"


def test_a_cache_that_cannot_be_written_is_named_on_every_rank(worlds: Worlds, tmp_path: Path) -> None:
    """Even its parent folder cannot be made: a file is in the way."""
    (tmp_path / "file").touch()
    for message in worlds.run(2, _warm_start_error, _config(tmp_path / "file" / "cache", parallel={"tp": 2})):
        assert message.startswith(f"cannot write the model to {tmp_path}/file/cache/.") and "bytes are free" in message


def _interrupted(config: Config, cache: Path) -> dict[str, Any]:
    from megatron_rl.convert import safetensors_io

    write = safetensors_io.write_file

    def killed(path: Path, *args: Any) -> None:
        write(path, *args)
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    found: dict[str, Any] = {}
    with mock.patch.object(safetensors_io, "write_file", killed), pytest.raises(KeyboardInterrupt):
        _warm(config)
    leave_layout()
    found["left behind"] = sorted(path.name for path in cache.iterdir())
    found["again"] = _warm(config)["weights"]
    found["then"] = sorted(path.name for path in cache.iterdir())
    return found


def test_an_interrupted_warm_start_leaves_no_cache(
    worlds: Worlds, warmed: dict[str, tuple[Path, list[Any]]], tmp_path: Path
) -> None:
    found = worlds.run(1, _interrupted, _config(tmp_path), tmp_path)[0]
    assert len(found["left behind"]) == 1 and found["left behind"][0].startswith(".")
    assert same_bits(found["again"], warmed["tp1"][1][0][0]["weights"])
    key = found["left behind"][0].split(".")[2]  # ..KEY.PID.draft
    assert [name for name in found["then"] if not name.startswith(".")] == [key]
