"""`megatron-rl rehearse`, as a person types it, on models whose parts can be told from each other by their size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_rl.config import load_config, parse_config
from megatron_rl.models.hardware import FILL, HARDWARE
from megatron_rl.preflight.checks import rehearsal_check
from megatron_rl.rehearse.kept import kept_path, kept_verdict, memory_hash
from tests.preflight.test_preflight import facts
from tests.test_cli import megatron_rl

GIB = 2**30
VOCABULARY, HIDDEN, TOKENS, TP, DP = 65536, 4608, 8192, 2, 4
LOGITS = 2 * TOKENS * VOCABULARY // TP
EMBEDDING = 2 * VOCABULARY * HIDDEN  # more than a gathered bucket and a server's
HF = {
    "model_type": "qwen2",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 9216,
    "num_hidden_layers": 4,
    "num_attention_heads": 36,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
RAW: dict[str, Any] = {
    "name": "rehearsed",
    "model": {
        "hf_config": HF,
        "dtype": "bfloat16",
        "recompute": "full",
        "logits_dtype": "model",
        "fused_linear_stats": "off",
    },
    "parallel": {"world_size": TP * DP, "tp": TP, "sp": True},
    "data": {"type": "countdown", "max_prompt_tokens": 1024},
    "rollout": {
        "engine": "sglang",
        "samples_per_prompt": 8,
        "max_response_tokens": 3072,
        "server": {"count": 8, "share_memory": True, "memory_fraction": 0.4},
        "weight_sync": {"mode": "colocated", "bucket_mib": 16},
    },
    "loss": {"type": "kl_cov", "select_fraction": 0.5},
    "train": {"prompts_per_step": 32, "prompts_per_minibatch": 16, "micro_batch_tokens": TOKENS},
}


def rehearse(folder: Path, *arguments: str, **sections: Any) -> tuple[int, str, dict[str, Any]]:
    """Exit code, what was printed, and rehearsal.json."""
    path = folder / "config.yaml"
    raw = {name: RAW.get(name, {}) | section for name, section in sections.items()}
    path.write_text(yaml.safe_dump(RAW | raw))
    result = megatron_rl("rehearse", str(path), "--output", str(folder / "out"), *arguments, cwd=folder, seconds=560)
    assert result.stderr == ""
    return result.returncode, result.stdout, json.loads((folder / "out" / "rehearsal.json").read_text())


pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str, dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("sound")
    return *rehearse(folder), folder


@pytest.fixture
def phases(sound: tuple[int, str, dict[str, Any], Path]) -> dict[str, dict[str, Any]]:
    return {phase["name"]: phase for phase in sound[2]["ranks"][0]["phases"]}


def test_a_run_that_fits_says_so_and_keeps_it(sound: tuple[int, str, dict[str, Any], Path]) -> None:
    code, printed, found, folder = sound
    assert code == 0 and "fits: " in printed and "not seen: NCCL" in printed
    assert found["room"] == FILL * HARDWARE["h100"].memory and found["depths"] == [4]
    page = (folder / "out" / "rehearsal.html").read_text()
    assert "Rank 0: collectives" in page and "parallel/weights.py:" in page
    config = load_config(folder / "config.yaml")
    kept = kept_verdict(config, folder / "config.yaml")
    assert isinstance(kept, dict) and kept["fits"] and kept["peak"] == found["peak"]


def test_every_phase_of_a_step_is_there(phases: dict[str, dict[str, Any]]) -> None:
    step = ["old logprobs", "select 1", "update 1", "select 2", "update 2"]
    assert list(phases) == ["build", *step, "offload", "weight sync", "generation", "reload", "checkpoint"]
    for name in ("old logprobs", "update 2", "weight sync", "generation", "checkpoint"):
        assert sum(phases[name]["planned"].values()) > 0


def test_a_forward_pass_holds_the_logits_of_one_micro_batch(phases: dict[str, dict[str, Any]]) -> None:
    for name in ("old logprobs", "select 2", "update 2"):
        assert phases[name]["parts"]["logits"] == LOGITS


def test_a_save_holds_no_more_than_a_weight_on_the_device_and_a_share_on_the_host(
    phases: dict[str, dict[str, Any]],
) -> None:
    save, state = phases["checkpoint"], phases["update 1"]["parts"]
    assert "gradients" not in save["parts"] and save["parts"]["optimizer"] == pytest.approx(state["optimizer"])
    assert save["parts"].get("checkpoint", 0) <= 2 * EMBEDDING / TP
    # what a rank writes: its state, its part of the weights, and a whole weight that another rank holds a piece of
    share = state["optimizer"] + state["weights"] / DP
    assert 0.9 * share <= save["host"]["checkpoint"] <= share + 3 * 2 * EMBEDDING / TP
    assert save["host"]["optimizer"] == pytest.approx(state["optimizer"])  # where an offload leaves it


def test_the_weight_stream_holds_one_gathered_bucket_and_two_of_the_servers(phases: dict[str, dict[str, Any]]) -> None:
    assert EMBEDDING > 512 * 2**20
    assert 2 * EMBEDDING <= phases["weight sync"]["parts"]["buckets"] <= 2 * EMBEDDING + 2**26
    assert phases["generation"]["parts"].keys() >= {"weights", "engine weights", "KV cache"}
    assert "optimizer" not in {part for part, size in phases["generation"]["parts"].items() if size > 2**10}


def test_the_top_k_sends_what_a_rank_may_offer(phases: dict[str, dict[str, Any]]) -> None:
    """Half of all tokens are wanted, 16 bytes each, and a rank has a quarter of them."""
    rows = [row for row in phases["select 2"]["collectives"] if row[2] == "int64"]
    assert TOKENS * DP * 16 < sum(row[4] for row in rows) < 2 * TOKENS * DP * 16 + 2**18


def test_collectives_and_operations_are_those_of_the_layout(phases: dict[str, dict[str, Any]]) -> None:
    forward = {(row[0], row[1]): row[3:] for row in phases["old logprobs"]["collectives"]}
    gathers, nbytes = forward["allgather_base", f"tensor_model_parallel of {TP}"]
    assert gathers % 4 == 0 and nbytes == gathers * 2 * TOKENS * HIDDEN
    flops = {(module, operator): count for module, operator, count in phases["old logprobs"]["flops"]}
    micro_batches = gathers / (2 * HF["num_hidden_layers"] + 1)  # two a layer, one before the output layer
    products = 2 * TOKENS * HIDDEN * (2 * HF["intermediate_size"]) // TP * HF["num_hidden_layers"]
    assert flops["decoder.layers.mlp.linear_fc1", "mm"] == micro_batches * products


def test_what_does_not_fit_is_refused_with_what_would(tmp_path: Path) -> None:
    size = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16}
    model = {"recompute": "none", "logits_dtype": "float32", "hf_config": HF | size}
    train = {"prompts_per_step": 64, "prompts_per_minibatch": 32, "micro_batch_tokens": 262144}
    code, printed, found = rehearse(tmp_path, model=model, train=train)
    assert code == 1 and "does not fit: update" in printed
    assert ["model.recompute=full"] in found["remedies"]
    assert f"fit with {' '.join(found['remedies'][0])}" in " ".join(printed.split())


def test_preflight_refuses_a_config_whose_rehearsal_does_not_fit(tmp_path: Path) -> None:
    file, config = tmp_path / "config.yaml", parse_config(RAW)
    assert rehearsal_check(kept_verdict(config, file), facts()).is_ok is None
    kept = {"room": 70 * GIB, "peak": 75 * GIB, "where": "update 2 on rank 0", "remedies": [["model.recompute=full"]]}
    kept_path(file).write_text(json.dumps(kept | {"hash": memory_hash(config)}))
    refused = rehearsal_check(kept_verdict(config, file), facts())
    assert refused.is_ok is False and "model.recompute=full" in refused.remedy
    assert refused.finding == "update 2 on rank 0 takes 75.0 GiB of 73.6 GiB"  # of the GPUs that are there
    other = parse_config(RAW | {"model": RAW["model"] | {"recompute": "none"}})
    assert rehearsal_check(kept_verdict(other, file), facts()).is_ok is None
    again = parse_config(RAW | {"name": "another", "logging": {"run_dir": "elsewhere"}})
    assert rehearsal_check(kept_verdict(again, file), facts()).is_ok is False


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--gpu", "v100"], "expected one of a100, h100, h200, gb200"),
        (["--rank", "8"], "--rank 8: the run has the ranks 0 to 7"),
        (["--ranks", "some"], "--ranks some: expected"),
        (["--ranks", "all-kinds", "--rank", "1"], "--rank 1 is one rank, and --ranks all-kinds are several"),
        (["--host", "--full"], "leave out --full and --ranks"),
        (["model.path=nowhere/model", "model.hf_config=null"], "model.path=nowhere/model: no such folder here"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, arguments: list[str], text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(RAW))
    result = megatron_rl("rehearse", str(path), *arguments, cwd=tmp_path)
    assert result.returncode in (1, 2) and text in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.glob("*.json"))
