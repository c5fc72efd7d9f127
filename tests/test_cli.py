"""The command line, as a person types it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_rl import cli
from megatron_rl.config import load_config, parse_config
from megatron_rl.plan.check import plan_rows
from megatron_rl.plan.shapes import count_parameters
from tests.config.test_config import BASE, raw

ROOT = Path(__file__).resolve().parent.parent


def megatron_rl(*arguments: str, cwd: Path, seconds: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    return subprocess.run(
        [sys.executable, "-m", "megatron_rl", *arguments],
        cwd=cwd,
        env={**clean, "PYTHONPATH": str(ROOT), "COLUMNS": "160", **env},
        capture_output=True,
        text=True,
        timeout=seconds,
    )


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(BASE))
    return path


def test_check_prints_the_plan_and_starts_nothing(config_path: Path, tmp_path: Path) -> None:
    result = megatron_rl("train", str(config_path), "parallel.world_size=4", "--check", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "4 (tp 2, pp 1, dp 2, distributed optimizer)" in result.stdout
    assert "8 prompts x 4 samples = 32 sequences, at most 3,072 tokens" in result.stdout
    assert "kl_cov, token_mean" in result.stdout
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def jsonl_config(tmp_path: Path) -> Path:
    """A config whose model folder has a tokenizer of characters with a chat template, and two tokens that stop."""
    from megatron_rl.data.tokenizer import character_tokenizer

    model = tmp_path / "model"
    tokenizer = character_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}({{ m.content }}){% endfor %}={% if add_generation_prompt %}:{% endif %}"
    )
    tokenizer.save_pretrained(model)
    (model / "config.json").write_text(json.dumps(BASE["model"]["hf_config"]))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 12]}))
    (tmp_path / "train.jsonl").write_text('{"problem": "1+2", "answer": 3}\n' * 2)
    data = {"type": "jsonl", "train_path": "train.jsonl", "max_prompt_tokens": 32, "suffix": "*4"}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw(model={"path": "model"}, data=data, parallel={})))
    return path


def test_check_shows_the_first_prompt_and_what_stops_a_response(jsonl_config: Path) -> None:
    result = megatron_rl("train", "config.yaml", "data.system_prompt=9-8", "--check", cwd=jsonl_config.parent)
    assert result.returncode == 0, result.stderr
    plan, _, preview = result.stdout.partition("what the policy is asked")
    assert "plan of t" in plan and "2 for training, 0 held out" in preview
    assert "prompt (14 tokens)" in preview and " (9-8)(1+2*4)=: " in preview
    assert "<eos> (1), + (12)" in preview


@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        (["data.train_path=none.jsonl"], 1, "none.jsonl: no such file"),
        (["data.max_prompt_tokens=3"], 1, "max_prompt_tokens=3"),
        (["data.tokenizer=elsewhere"], 1, "data.tokenizer: elsewhere is no folder"),
        (["model.path=elsewhere"], 2, "model.path=elsewhere: no such folder here; download"),
    ],
)
def test_check_refuses_what_the_policy_cannot_be_asked(
    jsonl_config: Path, overrides: list[str], code: int, message: str
) -> None:
    result = megatron_rl("train", "config.yaml", *overrides, "--check", cwd=jsonl_config.parent)
    assert (result.returncode, message in result.stderr) == (code, True), result.stderr


def test_check_of_a_recipe_whose_model_is_elsewhere_says_that_no_prompt_is_shown(jsonl_config: Path) -> None:
    stated = f"model.hf_config={json.dumps(BASE['model']['hf_config'])}"
    result = megatron_rl("train", "config.yaml", "model.path=elsewhere", stated, "--check", cwd=jsonl_config.parent)
    assert result.returncode == 0, result.stderr
    assert "not shown, and the data not read: model.path=elsewhere: no such folder here" in result.stdout


@pytest.mark.parametrize("command", ["train", "preflight", "eval"])
def test_a_rank_without_a_meeting_point_is_refused(jsonl_config: Path, command: str) -> None:
    result = megatron_rl(command, "config.yaml", cwd=jsonl_config.parent, RANK="0", WORLD_SIZE="1")
    assert result.returncode == 1
    assert "RANK and WORLD_SIZE are set, MASTER_ADDR and MASTER_PORT not" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["config.yaml", "train.num_stepz=3", "--check"], "did you mean 'num_steps'?"),
        (
            ["config.yaml", "parallel.tp=4"],
            "num_attention_heads=6 is not divisible by parallel.tp=4; choose tp from [1, 2, 6]",
        ),
        (["nonesuch.yaml"], "nonesuch.yaml: no such config file"),
    ],
)
def test_a_bad_config_is_a_message_and_code_2(config_path: Path, arguments: list[str], message: str) -> None:
    result = megatron_rl("train", *arguments, cwd=config_path.parent)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and message in result.stderr and "Traceback" not in result.stderr


def test_a_world_of_another_size_is_refused_with_the_remedy(config_path: Path, tmp_path: Path) -> None:
    result = megatron_rl("train", str(config_path), cwd=tmp_path, RANK="0", WORLD_SIZE="3")
    assert result.returncode == 1
    assert "this world has 3 processes (WORLD_SIZE), the config asks for 2" in result.stderr
    assert "parallel.world_size=3" in result.stderr and "Traceback" not in result.stderr


STUB = """
import os, pathlib, time
from megatron_rl.launch import stop_requested
def main(config):
    rank = os.environ["RANK"]
    (config.run_dir / f"seen{rank}").write_text(f"{config.train.num_steps} {os.environ['WORLD_SIZE']}")
    while not stop_requested(config.run_dir):
        time.sleep(0.02)
"""


def test_train_starts_the_world_and_stops_it(config_path: Path, tmp_path: Path) -> None:
    """The real command with the training loop replaced by a stub, through a module that shadows megatron_rl.train."""
    (tmp_path / "stub.py").write_text(STUB)
    code = "import sys, stub; sys.modules['megatron_rl.train'] = stub; import megatron_rl; megatron_rl.train = stub"
    (tmp_path / "sitecustomize.py").write_text(code)
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "megatron_rl", "train", str(config_path), "train.num_steps=7"]
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    run_dir = tmp_path / "runs" / "t"
    try:
        deadline = time.monotonic() + 60
        while not all((run_dir / f"seen{rank}").exists() for rank in range(2)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143
    finally:
        process.kill()
        process.communicate()
    assert [(run_dir / f"seen{rank}").read_text() for rank in range(2)] == ["7 2", "7 2"]
    assert load_config(run_dir / "config.yaml") == load_config(config_path, ["train.num_steps=7"])


def test_a_home_folder_behind_an_options_equals_sign_is_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    given = ["report", "--out=~/page.html", "data.suffix=~/x", "~/y", "--live"]
    monkeypatch.setattr("sys.argv", ["megatron-rl", *given])
    seen: list[str] = []
    cli.main(lambda: seen.extend(sys.argv[1:]))
    assert seen == ["report", f"--out={tmp_path}/page.html", "data.suffix=~/x", "~/y", "--live"]


def test_batch_arithmetic() -> None:
    """8 prompts x 4 samples, 4 prompts an update, dp 2: 16 sequences an update, 8 a rank; 5 of 96 tokens fit 512: 2."""
    rows = dict(plan_rows(parse_config(raw(parallel={"tp": 2, "world_size": 4}))))
    assert rows["step"].endswith("= 32 sequences, at most 3,072 tokens") and rows["updates"].startswith("2 per step")
    assert rows["update"].endswith("= 16 sequences; at most 8 on a data-parallel rank")
    assert rows["micro-batches"].startswith("1 to about 2 per") and rows["micro-batches"].endswith("sequence 96)")


MOE = {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "mlp_only_layers": [1],
}
MODELS: list[dict[str, Any]] = [
    {"model_type": "qwen2", "tie_word_embeddings": True},
    {"model_type": "qwen2", "tie_word_embeddings": False},
    {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    {"model_type": "qwen3"},
    {"model_type": "llama"},
    {"model_type": "mistral", "sliding_window": None, "head_dim": 16},
    MOE,
    {**MOE, "head_dim": 16, "decoder_sparse_step": 2},
]


@pytest.mark.parametrize("changes", MODELS, ids=str)
def test_the_parameter_count_is_that_of_transformers(changes: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    hf = {**BASE["model"]["hf_config"], **changes}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf))
    assert sum(count_parameters(hf)) == model.num_parameters()


def test_the_plan_of_a_model_without_vocabulary_size_says_so() -> None:
    hf = {name: value for name, value in BASE["model"]["hf_config"].items() if name != "vocab_size"}
    rows = dict(plan_rows(parse_config(raw(model={"hf_config": hf}))))
    assert "and the embeddings of the task's tokenizer" in rows["model"]
