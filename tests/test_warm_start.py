"""Warm starts: cached bit for bit, keyed by what they depend on, never half-written, the same under every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_rl.config import Config
from megatron_rl.config_loss import PpoClipLoss
from megatron_rl.data import build_tokenizer, load_prompts
from tests.policy.tiny import HF, make_batch, make_config, policy_of, same_bits, weights_of, worst
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
    from megatron_rl.algorithms.losses import ppo_clip
    from megatron_rl.warm_start import warm_start

    tokenizer = build_tokenizer(config)
    prompts = load_prompts(config, tokenizer).train
    with policy_of(config) as policy:
        before = weights_of(policy)
        warm_start(policy, prompts, tokenizer)
        found = {"before": before, "weights": weights_of(policy)}
        batch = make_batch(config, policy.groups)
        results = [policy.update(batch.mini_batches[i], ppo_clip, PpoClipLoss()) for i in range(updates)]
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


def _interrupted(config: Config, cache: Path) -> dict[str, Any]:
    import megatron_rl.warm_start as module

    write = module.write_folder

    def killed(path: Path, *args: Any) -> None:
        write(path, *args)
        (path / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    module.write_folder = killed
    found: dict[str, Any] = {}
    try:
        _warm(config)
    except KeyboardInterrupt:
        leave_layout()
        found["left behind"] = sorted(path.name for path in cache.iterdir())
    finally:
        module.write_folder = write
    found["again"] = _warm(config)["weights"]
    found["then"] = sorted(path.name for path in cache.iterdir())
    return found


def test_an_interrupted_warm_start_leaves_no_cache(
    worlds: Worlds, warmed: dict[str, tuple[Path, list[Any]]], tmp_path: Path
) -> None:
    found = worlds.run(1, _interrupted, _config(tmp_path), tmp_path)[0]
    assert len(found["left behind"]) == 1 and found["left behind"][0].startswith(".")
    assert same_bits(found["again"], warmed["tp1"][1][0][0]["weights"])
    assert [name for name in found["then"] if not name.startswith(".")] == [found["left behind"][0].split(".")[1]]
