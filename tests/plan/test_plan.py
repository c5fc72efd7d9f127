"""The planner: memory by hand, parameters against transformers, its constants and scores against its data, its search
against the config's own checks."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from megatron_rl.cli import app
from megatron_rl.config import load_config, parse_config
from megatron_rl.errors import UserError
from megatron_rl.models.hardware import GIB, HARDWARE
from megatron_rl.plan.activations import (
    Passes,
    backward_peak,
    gather_buffer,
    kept_activations,
    layer_activations,
    output_peak,
)
from megatron_rl.plan.memory import state_parts, with_cache_tokens
from megatron_rl.plan.search import changed, remedies, search
from megatron_rl.plan.seconds import FITTED, SCORES
from megatron_rl.plan.shapes import ModelShape, Spread, bubble, parameters, rank_parameters, shape_of
from megatron_rl.plan.step import Load, dealt, dealt_micro_batches, plan_step
from scripts.calibration import published
from scripts.calibration.fit import fit
from scripts.calibration.measured import measured_peaks
from scripts.calibration.score import QUICKSTART, cpu_memory_errors, summarise

SMALL = ModelShape(layers=4, hidden=8, heads=4, groups=2, head_dim=2, ffn=16, vocab=30, tied=False)
HF_32B: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "vocab_size": 152064,
}
RAW_32B: dict[str, Any] = {
    "name": "planned",
    "model": {"hf_config": HF_32B, "dtype": "bfloat16"},
    "parallel": {"world_size": 32, "tp": 4, "pp": 2, "sp": True},
    "data": {"type": "jsonl", "train_path": "train.jsonl", "tokenizer": "tokenizer"},
    "rollout": {
        "engine": "sglang",
        "max_response_tokens": 8192,
        "server": {"tp": 4, "count": 2, "memory_fraction": 0.7, "share_memory": True, "kv_tokens": 81920},
    },
    "reward": {"function": "exact"},
    "loss": {"type": "kl_cov"},
    "train": {"prompts_per_step": 256, "prompts_per_minibatch": 32, "micro_batch_tokens": 20480},
}
ARGUMENTS = (HARDWARE["h100"], Load(200, 2500))


def test_memory_of_a_small_model_by_hand() -> None:
    layout = Spread(tp=2, pp=2, dp=3, sp=True)
    # a layer: qkv 8x16, output 8x8, mlp 3x8x16, all halved, and two norms of 8; then the embedding of 16 padded rows
    held = rank_parameters(SMALL, layout, 0, vocab_multiple=8)
    assert held.total == 2 * ((128 + 64 + 384) / 2 + 16) + 16 * 8
    assert state_parts(held, layout, 2) == {
        "weights": 2 * held.total,
        "gradients": 4 * held.total,
        "optimizer": 12 * held.total / 3,
    }
    assert state_parts(held, layout, 4)["optimizer"] == 8 * held.total / 3
    # 10 tokens: (4 norms of 8, qkv 16, rotated 8 + 4, attention 8, mlp 48) / 2 in 2 bytes, and 4 heads' float32 / 2
    passes = Passes(tokens=10, micro_batches=5, element_bytes=2)
    layer = 10 * ((32 + 16 + 12 + 8 + 48) / 2 * 2 + 4 * 4 / 2)
    assert layer_activations(SMALL, layout, passes) == layer
    hidden = 10 * 2 * 8 / 2
    assert kept_activations(SMALL, layout, passes, 0) == 2 * (2 * layer + hidden)  # two in flight
    assert kept_activations(SMALL, layout, passes, 1) == 2 * layer + hidden
    # gradients of the MLP's first projections and of the output
    assert backward_peak(SMALL, layout, passes) == 10 * 2 * 2 * 16 / 2 + hidden
    # the last stage's logits beside the whole hidden states, their gradient and the weight's; each rank has 15 columns
    assert output_peak(SMALL, layout, passes, backward=True) == 10 * 8 * 2 + 15 * 8 * 2
    float32 = replace(passes, float32_logits=True)
    assert output_peak(SMALL, layout, float32, backward=False) == 10 * 8 * 2
    assert gather_buffer(SMALL, layout, passes, 1) == 10 * 8 * 2 and gather_buffer(SMALL, layout, passes, 0) == 0
    assert gather_buffer(SMALL, layout, replace(float32, engine=False), 0) == 10 * 8 * 2
    assert bubble(layout, 5) == 1 / 5 and bubble(Spread(pp=4, vpp=3), 6) == 3 / 18


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "qwen3_moe"])
def test_parameters_are_those_of_transformers(kind: str) -> None:
    import torch
    import transformers

    options: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 101,
        "tie_word_embeddings": kind == "qwen3",
    }
    if kind == "qwen3_moe":
        options |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **options))
    assert parameters(shape_of({"model_type": kind, **options})) == sum(p.numel() for p in model.parameters())


def test_the_constants_are_the_fit_of_the_data() -> None:
    fitted = asdict(fit(published.rows()))
    assert fitted == pytest.approx(asdict(FITTED), rel=2e-3)


def test_scores_are_reproduced_and_bounded() -> None:
    stored = SCORES
    memory = [("", case.predicted / case.published - 1) for case in published.memory_cases()]
    for kind, errors in (("memory", memory), ("cpu_memory", cpu_memory_errors("score"))):
        score = summarise("", "", errors)
        assert (score.rows, score.median, score.worst) == pytest.approx(
            (stored[kind]["rows"], stored[kind]["median"], stored[kind]["worst"]), abs=2e-3
        )
    assert stored["training"]["median"] < 0.15 and stored["step"]["median"] < 0.2
    assert stored["cpu_memory"]["worst"] < 0.15


def test_quickstart_memory_is_within_15_percent_of_the_measured_peak() -> None:
    assert {peak.name: peak.use for peak in measured_peaks()}["quickstart"] == "score"
    assert abs(dict(cpu_memory_errors("score"))["quickstart"]) < 0.15


def test_micro_batches_are_those_that_packing_would_form() -> None:
    # of 4 mini-batches: 6 sequences of 3 tokens for 2 ranks, of which no two go into 5; 18 / 2 / 5 would say 2
    assert dealt((3,) * 24, 5, 2, 1) == 3 and dealt((3,) * 24, 5, 2, 2) == 4 and dealt((3,) * 24, 6, 2, 1) == 2
    config = parse_config(copy.deepcopy(RAW_32B))
    counts = [dealt_micro_batches(config, Load(200, response)) for response in (1000, 2500, 4000)]
    least = [64 * (200 + response) / 20480 for response in (1000, 2500, 4000)]  # 64 sequences a rank
    assert all(0.98 * few <= count < few + 2 for few, count in zip(least, counts, strict=True))


@pytest.mark.parametrize(("loss", "marks"), [("ppo_clip", False), ("kl_cov", True), ("steer", True)])
def test_the_engines_logprobs_save_all_passes_but_the_checks(loss: str, marks: bool) -> None:
    """In passes over a mini-batch, of which a step has 8. Where the loss marks tokens, the first pays one for that in
    steps that are not checked."""

    def passes(**algorithm: Any) -> list[float]:
        raw = {**RAW_32B, "loss": {"type": loss, "ref_kl_coef": 0.1}, "algorithm": algorithm}
        seconds = plan_step(parse_config(raw), *ARGUMENTS).seconds
        return [seconds[phase] / one for phase in ("old logprobs", "selection", "entropy probe")]

    one = plan_step(parse_config(RAW_32B), *ARGUMENTS).seconds["entropy probe"]
    assert passes() == pytest.approx([16, 7 * marks, 1])  # the reference's are in it
    checked = 1 / 4
    expected = [8 + 8 * checked, (8 - checked) * marks, 1 if marks else checked]
    assert passes(old_logprobs="rollout", old_logprobs_check_every=4) == pytest.approx(expected)


def test_search_proposes_layouts_that_load_and_fit(tmp_path: Path) -> None:
    config = parse_config(copy.deepcopy(RAW_32B))
    found = search(config, *ARGUMENTS)
    assert len(found) > 10
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(RAW_32B))
    for proposal in found:
        loaded = load_config(path, proposal.overrides)
        assert loaded == changed(config, proposal.changes) and loaded.parallel.processes == 32
        assert proposal.plan.memory.peak <= HARDWARE["h100"].memory
    seconds = [proposal.plan.total for proposal in found]
    assert seconds == sorted(seconds)


def test_adam_on_the_host_leaves_the_float32_weights_on_the_gpu() -> None:
    raw = copy.deepcopy(RAW_32B)
    raw["rollout"]["server"]["share_memory"] = False
    before = plan_step(parse_config(raw), *ARGUMENTS).memory.phases["training"]
    after = plan_step(parse_config(raw | {"optimizer": {"cpu_offload": True}}), *ARGUMENTS).memory.phases["training"]
    assert before["optimizer"] - after["optimizer"] == pytest.approx(8 * before["weights"] / 2 / 4)  # of dp 4


def test_a_server_beside_the_trainer_gets_the_cache_that_the_table_shows() -> None:
    raw, hardware = copy.deepcopy(RAW_32B), HARDWARE["h100"]
    raw["rollout"]["server"] |= {"kv_tokens": None}
    config, shape = parse_config(raw), shape_of(HF_32B)
    memory, started = plan_step(config, *ARGUMENTS).memory, with_cache_tokens(config, shape, hardware)
    tokens = started.rollout.server.kv_tokens
    assert tokens == memory.cache_tokens is not None and config.rollout.server.kv_tokens is None
    # keys and values of 64 layers, 2 of 8 heads of 128 on each GPU, in bfloat16; 0.7 of the memory with the weights
    assert memory.phases["generation"]["KV cache"] == tokens * 2 * 64 * 2 * 128 * 2
    pool = memory.phases["generation"]["KV cache"] + memory.phases["generation"]["engine weights"]
    assert 0 <= 0.7 * hardware.memory - pool < 2 * 64 * 2 * 128 * 2
    assert plan_step(parse_config(RAW_32B), *ARGUMENTS).memory.cache_tokens == 81920  # the user's word
    for apart in ({"weight_sync": {"mode": "disaggregated"}}, {"server": {"urls": ["http://127.0.0.1:1"]}}):
        alone = parse_config(raw | {"rollout": {"engine": "sglang", "max_response_tokens": 8192} | apart})
        assert with_cache_tokens(alone, shape, hardware) == alone
    assert with_cache_tokens(config, shape, HARDWARE["cpu"]) == config


def test_torchs_layers_count_where_they_run() -> None:
    raw = copy.deepcopy(RAW_32B)
    of_torch = parse_config(raw | {"model": raw["model"] | {"layers": "torch"}})
    engine = plan_step(parse_config(raw), *ARGUMENTS).memory.phases["training"]
    without = plan_step(parse_config(raw), replace(HARDWARE["h100"], has_engine=False), ARGUMENTS[1])
    phases = plan_step(of_torch, *ARGUMENTS).memory.phases
    assert without.memory.phases == phases and "gather buffer" not in engine
    assert phases["training"]["gather buffer"] == phases["generation"]["gather buffer"] == 20480 * 5120 * 2


def test_a_save_fits_the_gpu_and_the_host() -> None:
    """By hand, for Qwen2.5-32B on 32 GPUs, TP 8: 32.8e9 padded parameters, a quarter of an eighth on a rank."""
    raw = copy.deepcopy(RAW_32B) | {"parallel": {"world_size": 32, "tp": 8, "sp": True}}
    memory = plan_step(parse_config(raw), *ARGUMENTS).memory
    save, share = memory.phases["checkpoint"], 32.8e9 / 8 / 4
    assert save["weights"] == pytest.approx(2 * 4 * share, rel=0.01) and save["gradients"] == 0
    assert save["optimizer"] == pytest.approx(12 * share, rel=0.01)
    assert save["border weight"] == 4 * 152064 / 8 * 5120
    assert memory.total("checkpoint") < min(memory.total("training"), 72 * GIB)
    assert memory.host["checkpoint"] == pytest.approx(8 * 14 * share, rel=0.01)  # as much as is written
    assert memory.host["optimizer"] == pytest.approx(8 * 12 * share, rel=0.01)  # shares the GPU with the servers
    assert sum(memory.host.values()) < 400 * GIB


def test_what_does_not_fit_gets_a_change_that_does() -> None:
    config = parse_config(copy.deepcopy(RAW_32B))
    assert plan_step(config, *ARGUMENTS).memory.total("training") > 79 * GIB
    phases = plan_step(config, *ARGUMENTS).memory.phases
    assert "buckets" not in phases["generation"] and phases["weight sync"]["buckets"] > 0.5 * GIB
    fixes = remedies(config, *ARGUMENTS)
    assert fixes and all(fix.plan.memory.fits for fix in fixes)


def test_the_command_answers_in_json_without_torch(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(RAW_32B))
    answer = CliRunner().invoke(app, ["plan", str(path), "--nodes", "8", "--json"])
    assert answer.exit_code == 0, answer.output
    plan = json.loads(answer.stdout)
    assert plan["layout"]["dp"] == 8 and plan["step_seconds"] == pytest.approx(sum(plan["seconds"].values()))
    assumed = ["--assume", "prompt=100", "--assume", "batches=2.5"]
    answer = CliRunner().invoke(app, ["plan", str(path), "--json", *assumed])
    assert json.loads(answer.stdout)["assumed"] == {"prompt": 100, "response": 4096, "batches": 2.5}
    each = ["--mean-prompt", "100", "--generation-batches=2.5"]
    assert CliRunner().invoke(app, ["plan", str(path), "--json", *each]).stdout == answer.stdout
    assert CliRunner().invoke(app, ["plan", str(QUICKSTART), "--gpu", "cpu"]).exit_code == 0


@pytest.mark.parametrize("text", ["promt=3", "prompt", "response=many", "batches=0.5", "response=8193", "prompt=nan"])
def test_what_cannot_be_assumed_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(RAW_32B))
    with pytest.raises(UserError, match=f"--assume {text}: expected"):
        CliRunner().invoke(app, ["plan", str(path), "--assume", text], catch_exceptions=False)
