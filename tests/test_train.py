"""Whole runs of the RL loop on two ranks: determinism, every option once, rollouts and weights across layouts."""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_rl.algorithms.advantages import ADVANTAGES
from megatron_rl.algorithms.methods import METHODS
from megatron_rl.algorithms.policy_loss import PolicyLoss
from megatron_rl.config import parse_config
from tests.tiny import HF, measured, rows_of, tiny_raw, train_each, trained
from tests.worlds import Worlds

LIMIT = 280.0  # seconds a world may take: on a machine that does other things too, ranks wait for each other
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "dp2": {"tp": 1, "world_size": 2},
    "pp2": {"tp": 1, "pp": 2},
}

_TRAIN = {"micro_batch_tokens": 96, "prompts_per_minibatch": 2, "save_final": False}

# --- determinism ------------------------------------------------------------------------------------------------------


def test_one_seed_gives_the_same_bits_and_another_does_not(worlds: Worlds, tmp_path: Path) -> None:
    """Three runs in one process: `again` loads the warm start that `first` trained."""
    warm_start = {"steps": 5, "batch_size": 16, "lr": 1e-2, "cache_dir": str(tmp_path / "warm")}
    raws = [
        tiny_raw(
            tmp_path,
            name,
            seed=seed,
            warm_start=warm_start,
            loss={"type": "clip_cov", "select_fraction": 0.05, "cov_low": 0.1, "cov_high": 9.0},
            train={"num_steps": 3, "eval_every": 2},
            logging={"samples_per_step": 16},
        )
        for name, seed in (("first", 3), ("again", 3), ("other", 4))
    ]
    weights, same_on_rank_1 = worlds.run(2, train_each, raws, timeout=LIMIT)
    first, again, other = ([measured(row) for row in rows_of(raw)] for raw in raws)
    assert [row["step"] for row in first] == [0, 1, 2]
    assert ["eval/accuracy" in row for row in first] == [False, True, True]
    assert first == again
    assert rows_of(raws[0], "samples.jsonl") == rows_of(raws[1], "samples.jsonl")
    assert _equal(weights[0], weights[1]) and _equal(weights[0], same_on_rank_1[0])
    assert first[0] != other[0]
    assert not _equal(weights[0], weights[2])


def _equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _train_and_show_optimizer(raw: dict[str, Any]) -> tuple[list[dict[str, Any]], int]:
    with trained(raw) as run:
        groups, schedule = run.policy.optimizer.param_groups, run.policy.scheduler
        return [
            {name: group[name] for name in ("betas", "eps", "weight_decay")} for group in groups
        ], schedule.num_steps


def test_a_resumed_run_has_the_hyper_parameters_of_its_config(worlds: Worlds, tmp_path: Path) -> None:
    before, after = (
        tiny_raw(tmp_path, optimizer=optimizer, train=_TRAIN | {"num_steps": steps, "save_final": True})
        for steps, optimizer in (
            (1, {"lr": 1e-3}),
            (3, {"lr": 5e-4, "schedule": "linear", "beta1": 0.5, "eps": 1e-6, "weight_decay": 0.2}),
        )
    )
    for raw in (before, after):
        raw["train"] |= {"prompts_per_step": 4}
    worlds.run(2, train_each, [before], timeout=LIMIT)
    groups, updates = worlds.run(2, _train_and_show_optimizer, after, timeout=LIMIT)[0]
    # two updates a step; linear from update 0 to 6; a step logs its last update's
    assert [row["optimizer/lr"] for row in rows_of(after)] == pytest.approx([1e-3, 5e-4 * 3 / 6, 5e-4 * 1 / 6])
    assert updates == 6
    for group in groups:
        assert group["betas"] == (0.5, 0.999) and group["eps"] == 1e-6
    assert {group["weight_decay"] for group in groups} <= {0.2, 0.0} and 0.2 in {g["weight_decay"] for g in groups}


# --- every option once ------------------------------------------------------------------------------------------------

ALWAYS = """
    entropy/mean entropy/p10 entropy/p90 entropy/predicted_change entropy/realised_change
    cov/mean cov/std cov/top_0.02pct_mean cov/top_0.2pct_mean cov/top_2pct_mean cov/vocab_mean
    reward/mean reward/std reward/accuracy reward/failed_fraction
    response/length_mean response/length_max response/length_min response/truncated_fraction
    sampling/num_groups sampling/discarded_token_fraction sampling/kept_group_fraction sampling/all_correct_fraction
    sampling/all_wrong_fraction mismatch/abs_mean mismatch/abs_max mismatch/kl loss/policy loss/ratio loss/approx_kl
    optimizer/lr optimizer/grad_norm optimizer/skipped_fraction batch/tokens batch/response_tokens
    packing/padding_fraction packing/micro_batches packing/tokens packing/imbalance memory/peak_bytes
    time/sync time/rollout time/old_logprobs time/select time/update time/probe time/total throughput/tokens_per_second
""".split()
SELECTED = "select/count select/fraction select/logprob_mean select/entropy_mean loss/selected_fraction".split()
CLIPPED = ["loss/clip_fraction_low", "loss/clip_fraction_high"]

CLIP_COV = {"type": "clip_cov", "select_fraction": 0.05, "cov_low": 0.05, "cov_high": 9.0}
KL_COV = {"type": "kl_cov", "select_fraction": 0.05}
REFERENCE = {"ref_kl_coef": 0.5}

# name -> (sections, metrics that the options add)
OPTIONS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "ppo_clip": ({}, CLIPPED),
    "dual_clip": ({"loss": {"dual_clip": 3.0}}, [*CLIPPED, "loss/dual_clip_fraction"]),
    "clip_cov": ({"loss": CLIP_COV}, [*CLIPPED, *SELECTED]),
    "kl_cov": ({"loss": KL_COV}, [*SELECTED, "loss/selected_abs_log_ratio"]),
    "kl_cov_authors": ({"loss": KL_COV | {"cov_scope": "microbatch", "cov_logprobs": "old"}}, SELECTED),
    "kl_cov_vocab": ({"loss": KL_COV | {"cov_estimator": "vocab"}}, SELECTED),
    "gspo": ({"loss": {"type": "gspo", "aggregation": "seq_mean_token_mean"}}, CLIPPED),
    "cispo": ({"loss": {"type": "cispo", "aggregation": "seq_mean_token_sum"}}, CLIPPED),
    "forking": (
        {"loss": {"type": "forking"}, "train": {"entropy_tangent": True, "entropy_tangent_every": 1}},
        [*CLIPPED, "weight/effective_fraction", "entropy/first_order_change", "entropy/tangent_change"],
    ),
    "steer": ({"loss": {"type": "steer", "stats": "old"}}, [*CLIPPED, "weight/min"]),
    "gaussian_cov": ({"loss": {"type": "gaussian_cov"}}, [*CLIPPED, "weight/min"]),
    "entropy_advantage": ({"loss": {"type": "entropy_advantage"}}, [*CLIPPED, "loss/advantage_bonus"]),
    "own": (
        {"loss": {"type": "examples.my_method:UsualLoss"}},
        [*CLIPPED, "weight/min", "control/usual_entropy"],
    ),
    "adaptive_entropy": (
        {"loss": {"adaptive_entropy": {"target_entropy": 9.0, "initial_coef": 0.01}}},
        ["control/entropy_coef", "loss/entropy_bonus"],
    ),
    "schedule": ({"loss": {"eps_high": {"from": 0.2, "to": 0.3, "steps": 2}}}, ["control/eps_high"]),
    "entropy_band": (
        {"loss": CLIP_COV | {"entropy_band": {"low": 0.1, "high": 0.2, "minimum": 0.01, "maximum": 0.2}}},
        [*SELECTED, "control/select_fraction"],
    ),
    "dr_grpo": (
        {"algorithm": {"advantage": "dr_grpo"}, "loss": {"type": "dppo", "aggregation": "constant_length"}},
        CLIPPED,
    ),
    "rloo": ({"algorithm": {"advantage": "rloo"}, "loss": {"type": "sapo"}}, ["loss/gate"]),
    "reinforce_pp": (
        {"algorithm": {"advantage": "reinforce_pp"}, "loss": {"type": "ce_gppo"}},
        [*CLIPPED, "loss/dual_clip_fraction"],
    ),
    "qae": ({"algorithm": {"advantage": "qae"}, "loss": {"type": "gmpo"}}, CLIPPED),
    "clip_b": ({"loss": {"type": "clip_b"}}, [*CLIPPED, "weight/min"]),
    "clip_v": ({"loss": {"type": "clip_v", "stats": "old", "mu": 1.0}}, [*CLIPPED, "weight/effective_fraction"]),
    "repo_r": ({"loss": {"type": "repo_r"}}, [*CLIPPED, "loss/advantage_factor", "control/zeta"]),
    "vespo": ({"loss": {"type": "vespo"}}, ["loss/vespo_weight"]),
    "entropy_bonus": (
        {"loss": {"type": "erc", "entropy_coef": 0.01}},
        ["loss/entropy_bonus", "loss/entropy_clip_fraction"],
    ),
    "k1": ({"loss": REFERENCE | {"ref_kl_estimator": "k1"}}, ["loss/ref_kl"]),
    "k2": ({"loss": REFERENCE | {"ref_kl_estimator": "k2"}}, ["loss/ref_kl"]),
    "k3": ({"loss": REFERENCE | {"ref_kl_estimator": "k3"}}, ["loss/ref_kl"]),
    "is_cap": ({"loss": {"rollout_correction": {"cap": 0.5}}}, ["loss/is_weight", "loss/is_truncated_fraction"]),
    "top_p": (
        {"rollout": {"top_p": 0.7, "temperature": 0.9}, "loss": {"rollout_correction": {"cap": 2.0}}},
        ["loss/is_weight"],
    ),
    "dynamic_sampling": (
        {
            "algorithm": {"dynamic_sampling": {"enabled": True}},
            "reward": {"function": "tests.test_train:seldom"},
            "logging": {"samples_per_step": 16},
        },
        [],
    ),
    "overlong": (
        {
            "algorithm": {"overlong": {"filter": True, "penalty_buffer": 4}},
            "loss": KL_COV,
            "logging": {"samples_per_step": 16},
        },
        SELECTED,
    ),
    "dp2": ({"parallel": LAYOUTS["dp2"], "loss": CLIP_COV}, SELECTED),
    "pp2": ({"parallel": LAYOUTS["pp2"], "loss": CLIP_COV | REFERENCE}, [*SELECTED, "loss/ref_kl"]),
    "sp": ({"parallel": {"sp": True}, "loss": KL_COV}, SELECTED),
    "bfloat16": ({"model": {"dtype": "bfloat16"}, "parallel": {"sp": True}}, []),
    "bfloat16_pp2": ({"model": {"dtype": "bfloat16"}, "parallel": LAYOUTS["pp2"]}, []),
}


def seldom(response: str, answer: str) -> float:
    """1 for about one untrained response in ten."""
    return float(response[:2].count("7") > 0)


@pytest.fixture(scope="module")
def option_runs(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Two steps with each of OPTIONS, in one world."""
    folder = tmp_path_factory.mktemp("options")
    raws = {name: tiny_raw(folder, name, **sections) for name, (sections, _) in OPTIONS.items()}
    worlds.run(2, train_each, list(raws.values()), timeout=LIMIT)
    return raws


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_trains_and_logs(option_runs: dict[str, dict[str, Any]], name: str) -> None:
    rows = rows_of(option_runs[name])
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        assert not {*ALWAYS, *OPTIONS[name][1]} - row.keys()
        assert "non_finite" not in row
        assert row["optimizer/skipped_fraction"] == 0 and row["optimizer/grad_norm"] > 0
        assert row["entropy/realised_change"] != 0
        if name == "top_p":  # weights are the mass of the tokens that were kept
            assert row["mismatch/abs_max"] > 0.1 and 0.5 < row["loss/is_weight"] < 0.9
        else:
            assert row["mismatch/abs_max"] < 1e-4


def test_the_options_name_every_loss_estimator_and_aggregation() -> None:
    configs = [parse_config(tiny_raw(Path(), **sections)) for sections, _ in OPTIONS.values()]
    assert {config.loss.type for config in configs if ":" not in config.loss.type} == set(METHODS)
    assert {config.algorithm.advantage for config in configs} == set(ADVANTAGES)
    for option in ("aggregation", "ref_kl_estimator"):
        known = typing.get_args(PolicyLoss.model_fields[option].annotation)
        assert {getattr(config.loss, option) for config in configs} == set(known)


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov", "kl_cov_vocab", "dp2", "pp2", "sp"])
def test_the_quota_is_selected_and_reaches_the_loss(option_runs: dict[str, dict[str, Any]], name: str) -> None:
    for row in rows_of(option_runs[name]):
        selected, tokens = 2 * row["select/count"], row["batch/response_tokens"]  # a mean of two updates
        assert 0 <= 0.05 * tokens - selected < 2  # each update rounds down
        assert row["loss/selected_fraction"] == pytest.approx(selected / tokens)


def test_regularisers_have_their_size(option_runs: dict[str, dict[str, Any]]) -> None:
    first = {name: rows_of(raw)[0] for name, raw in option_runs.items()}
    bonus = first["entropy_bonus"]
    assert bonus["loss/entropy_bonus"] == pytest.approx(0.01 * bonus["entropy/mean"], rel=0.02)
    # the first update has the reference's weights and a KL of 0 with a gradient of 0, so the second sees the same
    # policy in all three runs
    assert 0 < first["k2"]["loss/ref_kl"] == pytest.approx(first["k3"]["loss/ref_kl"], rel=0.2)
    assert first["k1"]["loss/ref_kl"] != 0
    assert {name: first[name]["loss/policy"] for name in ("k1", "k2", "k3")} == dict.fromkeys(
        ("k1", "k2", "k3"), pytest.approx(first["ppo_clip"]["loss/policy"], rel=1e-5)
    )
    assert (first["is_cap"]["loss/is_weight"], first["is_cap"]["loss/is_truncated_fraction"]) == (0.5, 1.0)
    assert first["is_cap"]["optimizer/grad_norm"] < 0.6 * first["ppo_clip"]["optimizer/grad_norm"]


def test_dynamic_sampling_keeps_groups_that_differ(option_runs: dict[str, dict[str, Any]]) -> None:
    raw = option_runs["dynamic_sampling"]
    assert any(row["sampling/num_groups"] > raw["train"]["prompts_per_step"] for row in rows_of(raw))
    groups: dict[tuple[int, int], list[float]] = {}
    for sample in rows_of(raw, "samples.jsonl"):
        groups.setdefault((sample["step"], sample["prompt_id"]), []).append(sample["reward"])
    assert len(groups) == 2 * 4
    assert all(len(rewards) == 4 and len(set(rewards)) == 2 for rewards in groups.values())


def test_overlong_responses_pay_and_leave_the_loss(option_runs: dict[str, dict[str, Any]]) -> None:
    raw = option_runs["overlong"]
    samples = rows_of(raw, "samples.jsonl")
    assert {sample["finish_reason"] for sample in samples} == {"stop", "length"}
    for step, row in enumerate(rows_of(raw)):
        counted = 0
        for sample in (sample for sample in samples if sample["step"] == step):
            length = len(sample["response"].replace("<eos>", "E").replace("<pad>", "P"))
            assert sample["reward"] == sample["score"] - max(0, length - 8) / 4
            counted += length if sample["finish_reason"] == "stop" else 0
        assert row["batch/response_tokens"] == counted


def test_a_step_whose_responses_are_all_cut_moves_nothing(worlds: Worlds, tmp_path: Path) -> None:
    """Nothing ever stops, so overlong filtering masks every token of both steps: no update, and the run goes on."""
    endless = {
        "rollout": {"stop_token_ids": []},
        "algorithm": {"overlong": {"filter": True}},
        "loss": KL_COV,
    }
    raws = [tiny_raw(tmp_path, "endless", **endless), tiny_raw(tmp_path, "start", optimizer={"lr": 0.0})]
    endless_weights, start_weights = worlds.run(2, train_each, raws, timeout=LIMIT)[0]
    for row in rows_of(raws[0]):
        assert row["response/truncated_fraction"] == 1.0
        assert (row["batch/response_tokens"], row["optimizer/skipped_fraction"]) == (0.0, 1.0)
    assert _equal(endless_weights, start_weights)


# --- rollouts and weights between layouts -----------------------------------------------------------------------------


def test_rollouts_do_not_depend_on_the_ranks(worlds: Worlds, tmp_path: Path) -> None:
    """32 samples of step 0, token for token (the response's text is one token a character, end-of-sequence shown), and
    the logged values of their tokens, whichever rank holds them."""
    one_step = {"num_steps": 1, "prompts_per_step": 8}
    raws = {
        name: tiny_raw(
            tmp_path,
            name,
            parallel=parallel,
            train=_TRAIN | one_step,
            loss={"type": "kl_cov", "select_fraction": 0.019},
            logging={"samples_per_step": 999},
        )
        for name, parallel in ({"one": {"tp": 1}} | LAYOUTS).items()
    }
    worlds.run(1, train_each, [raws["one"]], timeout=LIMIT)
    worlds.run(2, train_each, [raws[name] for name in LAYOUTS], timeout=LIMIT)
    expected = rows_of(raws["one"], "samples.jsonl")
    assert len(expected) == 32 and len({sample["response"] for sample in expected}) > 25
    for name in LAYOUTS:
        found = rows_of(raws[name], "samples.jsonl")
        for mine, theirs in zip(found, expected, strict=True):
            values, others = mine.pop("tokens"), dict(theirs["tokens"])
            assert mine | {"tokens": theirs["tokens"]} == theirs, name
            for key in ("logprob", "entropy", "covariance"):
                assert values.pop(key) == pytest.approx(others.pop(key), abs=1e-4, rel=1e-3), (name, key)
            assert values == others, name
    assert all("".join(sample["tokens"]["text"]) == sample["response"] for sample in expected)
    entropies = [value for sample in expected for value in sample["tokens"]["entropy"]]
    (logged,) = rows_of(raws["one"])
    assert sum(entropies) / len(entropies) == pytest.approx(logged["entropy/mean"], rel=1e-3)
    selected = sum(len(sample["tokens"]["selected"]) for sample in expected)
    assert selected / len(entropies) == pytest.approx(logged["select/fraction"], rel=0.1) and selected > 0


def _train_without_sync(raws: list[dict[str, Any]]) -> None:
    from megatron_rl.rollout.served import Served

    sync = Served.sync

    def only_first(served: Served) -> None:
        if served.weight_version == 0:
            sync(served)
        served.engine.weight_version = served.weight_version  # type: ignore[attr-defined]  # it claims to have them

    with mock.patch.object(Served, "sync", only_first):
        train_each(raws)


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_every_update_reaches_the_engine(worlds: Worlds, tmp_path: Path, layout: str) -> None:
    """fp32: the trainer's and the engine's logprobs differ by rounding in each step, and visibly for a stale engine."""
    options: dict[str, Any] = {
        "parallel": LAYOUTS[layout],
        "train": _TRAIN | {"num_steps": 4, "prompts_per_step": 4},
        "optimizer": {"lr": 1e-2},
    }
    synced, stale = (tiny_raw(tmp_path, name, **options) for name in ("synced", "stale"))
    worlds.run(2, train_each, [synced], timeout=LIMIT)
    worlds.run(2, _train_without_sync, [stale], timeout=LIMIT)
    assert max(row["mismatch/abs_max"] for row in rows_of(synced)) < 1e-4
    mismatches = [row["mismatch/abs_max"] for row in rows_of(stale)]
    assert mismatches[0] < 1e-4 and min(mismatches[1:]) > 0.1


# --- JSON lines -------------------------------------------------------------------------------------------------------


def _save_model(folder: Path) -> dict[str, torch.Tensor]:
    """A Hugging Face folder as one downloads it: config.json, safetensors, tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from megatron_rl.data.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(parse_config(tiny_raw(folder)))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**HF, vocab_size=len(tokenizer)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.state_dict()


def test_a_downloaded_model_learns_from_a_file_of_problems(worlds: Worlds, tmp_path: Path) -> None:
    problems = [(f"{a}+{b}=", str(a + b)) for a in range(4) for b in range(4)]
    for name, part in (("train", problems[:12]), ("eval", problems[12:])):
        lines = [json.dumps({"problem": problem, "answer": answer}) for problem, answer in part]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    given = _save_model(tmp_path / "model")
    options: dict[str, Any] = {
        "rollout": {"samples_per_prompt": 16, "max_response_tokens": 1},
        "reward": {"function": "exact"},
        "logging": {"samples_per_step": 999},
    }
    raws = [
        tiny_raw(
            tmp_path,
            name,
            **options,
            optimizer={"lr": lr},
            train={"num_steps": 2, "eval_every": 1, "eval_samples": 16, "prompts_per_step": 4, **_TRAIN},
        )
        for name, lr in (("frozen", 0.0), ("trained", 1e-2))
    ]
    for raw in raws:
        raw["model"] = {"path": str(tmp_path / "model")}
        raw["data"] = {
            "type": "jsonl",
            "train_path": str(tmp_path / "train.jsonl"),
            "eval_path": str(tmp_path / "eval.jsonl"),
            "max_prompt_tokens": 4,
        }
    frozen, trained_weights = worlds.run(2, train_each, raws, timeout=LIMIT)[0]
    assert all(torch.equal(frozen[name], given[name]) for name in frozen)  # in, through the shards, out: exact
    assert not _equal(frozen, trained_weights)
    samples = rows_of(raws[1], "samples.jsonl")
    assert len(samples) == 2 * 4 * 16
    for sample in samples:
        assert (sample["prompt"], sample["answer"]) in problems[:12]
        assert sample["score"] == float(sample["response"] == sample["answer"])
    for step, row in enumerate(rows_of(raws[1])):
        scores = [sample["score"] for sample in samples if sample["step"] == step]
        assert 0 < sum(scores) == row["reward/accuracy"] * len(scores)
        assert 0 <= row["eval/accuracy"] <= row["eval/pass_at_n"] <= 1
