"""Reading, refusing and writing configs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml

from megatron_rl.config import dump_config, load_config, parse_config
from megatron_rl.errors import ConfigError, UserError
from megatron_rl.models.facts import read_hf_config

BASE: dict[str, Any] = {
    "name": "t",
    "model": {
        "hf_config": {
            "model_type": "qwen2",
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "vocab_size": 40,
            "max_position_embeddings": 512,
        }
    },
    "parallel": {"tp": 2},
    "data": {"type": "countdown", "max_prompt_tokens": 32},
    "rollout": {"samples_per_prompt": 4, "max_response_tokens": 64},
    "loss": {"type": "kl_cov"},
    "train": {"prompts_per_step": 8, "prompts_per_minibatch": 4, "micro_batch_tokens": 512},
}

MOVE = {"from": 1, "to": 2, "steps": 3}


def moving(option: str, **changes: Any) -> dict[str, Any]:
    """A loss of which an option moves; `changes` of its schedule, or of other options."""
    schedule = {name: changes.pop(name, value) for name, value in MOVE.items()}
    return {"loss": {"type": "kl_cov", option: schedule} | changes}


BAND = {"low": 0.4, "high": 0.5, "minimum": 0.01, "maximum": 0.3}


def raw(**changes: Any) -> dict[str, Any]:
    """BASE with dotted keys (spelled a__b) replaced."""
    out = copy.deepcopy(BASE)
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = out
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return out


def write(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def refusal(content: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(content)
    return str(caught.value)


def test_the_resolved_config_reads_back_equal(tmp_path: Path) -> None:
    config = parse_config(raw(loss={"type": "clip_cov", "cov_low": 0.5}, rollout__stop_token_ids=[1, 2], name="x.y-1"))
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_derived_numbers() -> None:
    config = parse_config(raw(parallel={"tp": 2, "pp": 2, "world_size": 8}))
    assert (config.parallel.processes, config.parallel.dp, config.minibatches_per_step) == (8, 2, 2)
    assert str(config.run_dir) == "runs/t"
    assert parse_config(raw(parallel={"tp": 2, "pp": 2})).parallel.processes == 4


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("trian", "train"),
        ("train__num_step", "num_steps"),
        ("parallel__tpp", "tp"),
        ("model__hf_confg", "hf_config"),
        ("algorithm__advantages", "advantage"),
        ("algorithm__dynamic_sampling__enable", "enabled"),
        ("algorithm__overlong__penalty_bufer", "penalty_buffer"),
        ("rollout__temprature", "temperature"),
        ("reward__functon", "function"),
        ("data__max_numbr", "max_number"),
        ("loss__select_fracton", "select_fraction"),
        ("loss__kl_coeff", "kl_coef"),
        ("optimizer__learning_rat", None),
        ("warm_start__step", "steps"),
        ("logging__tensorbord", "tensorboard"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(key: str, near: str | None) -> None:
    message = refusal(raw(**{key: 1}))
    assert key.replace("__", ".").rpartition(".")[2] in message and "unknown option" in message
    assert f"did you mean {near!r}?" in message if near else "known here: beta1, beta2" in message


def test_a_key_of_another_loss_is_unknown_to_this_one() -> None:
    message = refusal(raw(loss={"type": "ppo_clip", "kl_coef": 1.0}))
    assert "loss.kl_coef: unknown option" in message and "'kl_coef'" not in message


@pytest.mark.parametrize("section", ["loss", "data"])
def test_an_unknown_union_member_lists_the_known(section: str) -> None:
    message = refusal(raw(**{section: {"type": "nonesuch"}}))
    assert message.count("nonesuch") >= 1 and {"loss": "kl_cov", "data": "'jsonl'"}[section] in message


def test_every_fault_is_listed_at_once() -> None:
    message = refusal(raw(seed=-1, train__num_steps=0, rollout__temperature="hot"))
    assert all(key in message for key in ("seed", "train.num_steps", "rollout.temperature"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "nan"])
@pytest.mark.parametrize("key", ["optimizer__lr", "loss__kl_coef", "rollout__temperature"])
def test_nan_and_infinity_are_refused(key: str, value: Any) -> None:
    assert key.replace("__", ".").rpartition(".")[2] in refusal(raw(**{key: value}))


def test_yaml_reads_5e_7_as_text_and_the_config_as_a_number(tmp_path: Path) -> None:
    path = write(tmp_path, yaml.safe_dump(raw()) + "optimizer: {lr: 5e-7}\n")
    assert isinstance(yaml.safe_load(path.read_text())["optimizer"]["lr"], str)
    assert load_config(path).optimizer.lr == 5e-7
    assert load_config(path, ["optimizer.lr=1e-6"]).optimizer.lr == 1e-6


def test_configs_are_frozen() -> None:
    config = parse_config(raw())
    with pytest.raises(pydantic.ValidationError):
        config.train.num_steps = 7  # type: ignore[misc]


def test_overrides(tmp_path: Path) -> None:
    given = [
        "train.num_steps=7",
        "rollout.stop_token_ids=[3, 4]",
        "warm_start.steps=5",
        "loss.rollout_correction=null",
        "name=b",
    ]
    config = load_config(write(tmp_path, BASE), given)
    assert (config.train.num_steps, config.rollout.stop_token_ids, config.name) == (7, (3, 4), "b")
    assert config.warm_start is not None and config.warm_start.steps == 5
    assert config.loss.rollout_correction is None


def test_a_whole_section_can_be_overridden(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, BASE), ["loss={type: ppo_clip, eps_high: 0.28}"])
    assert config.loss.type == "ppo_clip" and config.loss.eps_high == 0.28


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.num_steps", "expected a.b=c"),
        ("=3", "expected a.b=c"),
        ("train..num_steps=3", "expected a.b=c"),
        ("name.first=3", "'name' holds a value"),
        ("train.num_steps=[1", "not valid YAML"),
        ("train.num_stepz=1", "did you mean 'num_steps'"),
        ("train.num_steps=many", "train.num_steps"),
    ],
)
def test_a_bad_override_is_explained(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        load_config(write(tmp_path, BASE), [override])


@pytest.mark.parametrize(
    ("content", "message"), [("- a\n", "expected a mapping"), ("", "expected a mapping"), ("a: [1\n", "not valid YAML")]
)
def test_a_file_that_is_no_config_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        load_config(tmp_path / "nonesuch.yaml")


HF = "model__hf_config__"
ROLLOUT = {"algorithm__old_logprobs": "rollout"}
AHEAD = {"rollout__engine": "sglang", "rollout__max_staleness": 1}
QUANTIZED = {"rollout__engine": "sglang", "rollout__server": {"extra_args": ["--quantization=fp8"]}}
CORRECTED = {"type": "ppo_clip"}
SEQUENCE_MASK = {"weights": "none", "max_negative_kl": 0.1}
INCONSISTENT: list[tuple[dict[str, Any], str]] = [
    ({"parallel": {"tp": 2, "world_size": 5}}, "world_size=5 is not a multiple of tp*pp*cp=2; set it to 4 or 6"),
    ({"parallel": {"tp": 2, "world_size": 1}}, "world_size=1 is not a multiple of tp*pp*cp=2; set it to 2"),
    ({"parallel": {"tp": 1, "sp": True}}, "set sp=false or raise tp"),
    ({"parallel": {"tp": 4}}, "num_attention_heads=6 is not divisible by parallel.tp=4; choose tp from [1, 2, 6]"),
    (
        {"parallel": {"tp": 3}},
        "num_key_value_heads=2 is neither a multiple nor a divisor of parallel.tp=3; choose tp from [1, 2, 6]",
    ),
    ({"parallel": {"ep": 2}}, "parallel.ep=2: qwen2 has no experts; set ep=1"),
    ({HF + "model_type": "qwen3_moe"}, "lacks a positive num_experts, moe_intermediate_size, num_experts_per_tok"),
    ({"parallel": {"pp": 3}}, "num_hidden_layers=4 is not divisible by parallel.pp=3; choose pp from [1, 2, 4]"),
    (
        {"parallel": {"pp": 2, "vpp": 4}},
        "vpp=4 does not divide the 2 layers of a pipeline stage; choose vpp from [1, 2]",
    ),
    ({"parallel": {"vpp": 2}}, "parallel.vpp=2 interleaves chunks of pipeline stages: raise pp, or set vpp=1"),
    ({"parallel": {"cp": 2, "world_size": 3}}, "world_size=3 is not a multiple of tp*pp*cp=2; set it to 2 or 4"),
    ({"parallel": {"cp": 5}, "train__micro_batch_tokens": 99}, "padded to a multiple of 10); raise it to at least 100"),
    (
        {"parallel": {"cp": 2}, "loss": {"type": "kl_cov", "cov_scope": "microbatch"}},
        "parallel.cp=2 spreads each sequence over several; set cov_scope=minibatch",
    ),
    (
        {"parallel": {"cp": 2}, "train__share_prompts": True},
        "cannot see a shared prompt; set share_prompts=auto or cp=1",
    ),
    ({"model__recompute": "full", "model__recompute_layers": 5}, "exceeds the 4 layers of a model chunk"),
    (
        {"model__recompute": "selective", "model__recompute_modules": ["moe"]},
        "no layer of this qwen2 has a moe; remove it",
    ),
    ({HF + "intermediate_size": 97}, "intermediate_size=97 is not divisible by parallel.tp=2"),
    ({HF + "num_key_value_heads": 4}, "num_attention_heads=6 is not divisible by num_key_value_heads=4"),
    ({HF + "model_type": "gpt2"}, "supported: llama, mistral, qwen2, qwen3, qwen3_moe"),
    ({HF + "hidden_size": None}, "lacks a positive hidden_size"),
    ({HF + "num_attention_heads": 0}, "lacks a positive num_attention_heads"),
    (
        {HF + "hidden_size": 50},
        "hidden_size=50 is not divisible by num_attention_heads=6; change one of them or give head_dim",
    ),
    ({"logging__run_dir": "runs/{nam}"}, "the only placeholder is {name}"),
    ({HF + "max_position_embeddings": 95}, "= 96) exceeds the model's max_position_embeddings=95"),
    ({"train__prompts_per_minibatch": 3}, "not a multiple of prompts_per_minibatch=3; choose one of [1, 2, 4, 8]"),
    ({"parallel": {"tp": 1, "world_size": 32}}, "raise prompts_per_minibatch or lower world_size"),
    ({"train__micro_batch_tokens": 95}, "raise it to at least 96"),
    ({"algorithm__overlong__penalty_buffer": 65}, "penalty_buffer=65 exceeds rollout.max_response_tokens=64"),
    ({"rollout__samples_per_prompt": 1}, "set it to at least 2"),
    (
        {"data": {"type": "jsonl", "train_path": "x"}, "train__eval_every": 5},
        "give held-out problems or benchmarks, or set eval_every=0",
    ),
    ({"loss": {"type": "clip_cov", "cov_low": 5.0}}, "cov_low=5.0 must be below loss.cov_high=5.0"),
    ({"loss": {"type": "forking", "aggregation": "seq_mean_token_mean"}}, "set aggregation=token_mean"),
    ({"loss": {"type": "kl_cov", "entropy_coef": 0.1, "adaptive_entropy": {}}}, "leave entropy_coef at 0"),
    ({"loss": {"type": "kl_cov", "entropy_band": BAND}}, "select_fraction=0.002 is outside of loss.entropy_band's"),
    (
        {"loss": {"type": "clip_cov", "entropy_band": {**BAND, "option": "kl_coef"}}},
        "set it to cov_low or entropy_coef or eps_high",
    ),
    ({"loss": {"type": "kl_cov", "entropy_band": {**BAND, "low": 0.6}}}, "low=0.6 must be below high=0.5"),
    (
        {"loss": {"type": "kl_cov", "entropy_band": {**BAND, "maximum": 2}}},
        "entropy_band.maximum=2.0: select_fraction refuses it",
    ),
    (
        {"loss": {"type": "gspo", "adaptive_entropy": {"initial_coef": 2}}},
        "initial_coef=2.0 must not exceed max_coef=1.0",
    ),
    ({"rollout__top_p": 0.9}, "set top_p=1 and top_k=0, or turn on the correction with loss.rollout_correction"),
    ({"algorithm__max_mismatch": 0.1}, "max_mismatch does nothing with old_logprobs=recompute; remove it, or"),
    ({"algorithm__old_logprobs_check_every": 3}, "old_logprobs_check_every does nothing with old_logprobs=recompute"),
    ({"rollout__oversample": 0.2}, "rollout.oversample does nothing without algorithm.dynamic_sampling; enable that"),
    (ROLLOUT | {"rollout__top_p": 0.9}, "with rollout.top_p=0.9, top_k=0: after a cut"),
    (ROLLOUT | {"rollout__top_k": 5}, "set top_p=1 and top_k=0, or set old_logprobs=recompute"),
    (ROLLOUT | {"loss": {"type": "kl_cov", "adaptive_entropy": {}}}, "no pass gives the old policy's entropy"),
    (moving("kl_cof"), "did you mean 'kl_coef'"),
    (moving("cov_scope"), "loss.cov_scope"),
    (moving("kl_coef", steps=0), "loss.schedules.kl_coef.steps"),
    (moving("kl_coef", to=-1), "the schedule of kl_coef, to=-1.0: kl_coef refuses it"),
    (moving("kl_coef", to=1), "goes from 1.0 to itself; write kl_coef=1.0"),
    (moving("kl_coef", kl_coef=2, schedules={"kl_coef": MOVE}), "kl_coef=2.0, but its schedule begins at from=1.0"),
    (moving("kl_coef", schedules={"kl_coff": MOVE}), "schedules.kl_coff: expected a number option of the loss"),
    (moving("ref_kl_coef", **{"from": 0}), "keeps no reference; begin above 0"),
    (moving("kl_coef", entropy_band={**BAND, "option": "kl_coef"}), "kl_coef has a schedule and follows entropy_band"),
    (moving("entropy_coef", adaptive_entropy={}), "entropy_coef has a schedule and follows adaptive_entropy"),
    ({"loss": {"type": "clip_cov", "cov_low": {**MOVE, "to": 9}}}, "loss.cov_low=9.0 must be below loss.cov_high"),
    (ROLLOUT | {"loss": {"type": "kl_cov", "entropy_band": BAND}}, "no pass gives the old policy's entropy"),
    (ROLLOUT | {"loss": {"type": "steer", "stats": "old"}}, "set them to current, or set old_logprobs=recompute"),
    (ROLLOUT | {"loss": {"type": "clip_cov", "cov_logprobs": "old"}}, "set them to current, or set"),
    (ROLLOUT | {"loss": CORRECTED | {"rollout_correction": {"cap": 2}}}, "set it to {weights: none, max_negative_kl"),
    (
        ROLLOUT | {"loss": CORRECTED | {"rollout_correction": {"weights": "none", "max_kl": 1}}},
        "which are now the same",
    ),
    (ROLLOUT | AHEAD, "set loss.rollout_correction={weights: none, max_negative_kl: 0.1}, or max_staleness=0"),
    (ROLLOUT | AHEAD, "rollout.max_staleness=1: say with algorithm.max_mismatch how far apart both may be"),
    (ROLLOUT | QUANTIZED, "rollout.server.extra_args=--quantization: say with algorithm.max_mismatch"),
    (
        {"rollout": {"engine": "vllm", "max_staleness": 1, "server": {"deterministic": True}}},
        "rollout.server.deterministic=true with rollout.max_staleness=1",
    ),
    ({"rollout__max_staleness": 1}, "the embedded engine shares its process with the trainer"),
    ({"rollout": {"engine": "sglang", "max_staleness": 1}}, "set loss.rollout_correction={cap: 2}, or max_staleness=0"),
    (
        {"rollout": {"engine": "sglang", "max_staleness": 1, "server": {"share_memory": True}}},
        "trainer and servers take turns, rollout.max_staleness > 0",
    ),
    ({"rollout": {"engine": "vllm", "server": {"urls": ["node1:30000"]}}}, "is no address such as http://node1:30000"),
    (
        {"rollout": {"engine": "sglang", "server": {"urls": ["http://node1:3"]}}},
        "shares memory within one machine, and http://node1:3 is another; set it to disaggregated or disk",
    ),
    ({"rollout": {"engine": "sglang", "server": {"urls": ["http://localhost:3"] * 2}}}, "listed twice"),
    ({"rollout": {"engine": "sglang", "server": {"kv_tokens": 80}}}, "below the longest sequence"),
    (
        {"rollout": {"engine": "sglang", "server": {"tp": 4}}},
        "not divisible by rollout.server.tp=4",
    ),
    ({"rollout__engine": "vllm", HF + "head_dim": 16}, "vLLM's Qwen2 ignores head_dim"),
    ({"data": {"type": "jsonl", "train_path": "x"}, "warm_start": {"steps": 1}}, "warm_start needs a task with known"),
    ({"model": {"path": "nonesuch"}}, "model.path=nonesuch: no such folder here; download"),
    ({"model": {}}, "set model.path, or model.hf_config for random weights"),
]


MOE = {"model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 9}
EXPERTS: list[tuple[dict[str, Any], str]] = [
    (
        {"tp": 1, "world_size": 4, "ep": 4},
        "4 processes of a pipeline stage and the model's 6 experts; choose ep from [1, 2]",
    ),
    ({"tp": 1, "pp": 2, "ep": 2}, "must divide the 1 processes"),
    ({"tp": 2}, "moe_intermediate_size=9 is not divisible by parallel.tp=2"),
    ({"tp": 2, "ep": 2}, "only with sp=true"),
]


@pytest.mark.parametrize(("parallel", "message"), EXPERTS, ids=[text[:30] for _, text in EXPERTS])
def test_layouts_that_no_mixture_of_experts_has_are_refused(parallel: dict[str, Any], message: str) -> None:
    assert message in refusal(raw(model={"hf_config": BASE["model"]["hf_config"] | MOE}, parallel=parallel))


def test_key_value_heads_may_be_fewer_than_the_ranks_if_their_rows_can_be_cut() -> None:
    hf = BASE["model"]["hf_config"]
    parse_config(raw(parallel={"tp": 6}, model={"hf_config": hf | {"head_dim": 6}}))
    message = refusal(raw(parallel={"tp": 6}, model={"hf_config": hf | {"head_dim": 8}}))
    assert (
        "num_key_value_heads=2 of width 8 cannot be cut into parallel.tp=6 equal parts; choose tp from [1, 2]"
        in message
    )


@pytest.mark.parametrize(("changes", "message"), INCONSISTENT, ids=[text[:40] for _, text in INCONSISTENT])
def test_what_cannot_work_is_refused_with_the_remedy(changes: dict[str, Any], message: str) -> None:
    assert message in refusal(raw(**changes))


@pytest.mark.parametrize(
    "changes", [{}, {"loss": CORRECTED | {"rollout_correction": SEQUENCE_MASK}} | AHEAD, QUANTIZED], ids=str
)
def test_the_engines_logprobs_may_be_the_old_ones_where_a_limit_is_stated(changes: dict[str, Any]) -> None:
    algorithm = parse_config(raw(**ROLLOUT | changes | {"algorithm__max_mismatch": 0.2})).algorithm
    assert [algorithm.recomputes(step) for step in (0, 1, 9, 10, 11)] == [True, False, False, True, False]


def test_several_inconsistencies_are_listed_together() -> None:
    message = refusal(raw(parallel={"tp": 4, "pp": 3, "world_size": 5}, train__prompts_per_minibatch=3))
    assert message.count("\n  - ") >= 4


def test_config_json_is_read_from_the_model_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"')
    with pytest.raises(ConfigError, match="cannot read"):
        parse_config(raw(model={"path": str(tmp_path)}))
    (tmp_path / "config.json").write_text(json.dumps(BASE["model"]["hf_config"]))
    config = parse_config(raw(model={"path": str(tmp_path)}))
    assert read_hf_config(config.model) == BASE["model"]["hf_config"]


def test_a_config_error_is_the_users_to_mend() -> None:
    assert issubclass(ConfigError, UserError) and issubclass(ConfigError, ValueError)
