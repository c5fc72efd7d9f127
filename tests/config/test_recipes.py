"""The recipes in configs/: the paper's numbers, and that each can be checked where there is neither GPU nor model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_rl.config import Config, dump_config, load_config, parse_config
from megatron_rl.errors import ConfigError
from megatron_rl.models.facts import read_hf_config, require_model
from megatron_rl.plan.check import plan_rows
from megatron_rl.plan.shapes import count_parameters

ROOT = Path(__file__).resolve().parent.parent.parent
METHODS = ("grpo", "clip_higher", "clip_cov", "kl_cov")
RECIPES = [f"{size}_{method}" for size in ("7b", "32b") for method in METHODS]

# arXiv 2505.22617 and its authors' scripts
LOSSES = {
    "grpo": {"type": "ppo_clip", "eps_low": 0.2, "eps_high": 0.2},
    "clip_higher": {"type": "ppo_clip", "eps_low": 0.2, "eps_high": 0.28},
    "clip_cov": {
        "type": "clip_cov", "select_fraction": 2e-4, "cov_low": 1, "cov_high": 5, "eps_low": 1, "eps_high": 1
    },
    "kl_cov": {"type": "kl_cov", "kl_coef": 1},
}  # fmt: skip
KL_COV_FRACTION = {"7b": 2e-3, "32b": 2e-4}
LEARNING_RATE = {"7b": 5e-7, "32b": 1e-6}
MICRO_BATCH_TOKENS = {"7b_kl_cov": 30720}  # the others 20480
GPUS = {"7b": 8, "32b": 32}
PARAMETERS = {"7b": 7_615_616_512, "32b": 32_763_876_352}  # of the published checkpoints
SHARED = {
    "rollout.samples_per_prompt": 8,
    "rollout.temperature": 1,
    "rollout.top_p": 1,
    "rollout.top_k": 0,
    "rollout.max_response_tokens": 8192,
    "rollout.max_staleness": 0,
    "data.max_prompt_tokens": 2048,
    "algorithm.advantage": "grpo",
    "algorithm.dynamic_sampling.enabled": True,
    "algorithm.dynamic_sampling.max_batches": 10,
    "loss.aggregation": "token_mean",
    "loss.entropy_coef": 0,
    "loss.ref_kl_coef": 0,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
    "optimizer.weight_decay": 0,
    "optimizer.clip_grad": 1,
    "train.prompts_per_step": 256,
    "train.prompts_per_minibatch": 32,
    "train.eval_samples": 32,
    "train.eval_temperature": 0.6,
    "model.dtype": "bfloat16",
    "rollout.engine": "sglang",
    "rollout.weight_sync.mode": "colocated",
    "rollout.server.share_memory": True,
    "reward.function": "math",
}


@pytest.fixture
def recipe(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Config]:
    for name in ("MODELS", "DATA", "RUNS"):
        monkeypatch.delenv(f"MEGATRON_RL_{name}", raising=False)
    return request.param, load_config(ROOT / "configs" / f"{request.param}.yaml")


def option(config: Config, path: str) -> object:
    value: object = config
    for part in path.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("recipe", RECIPES, indirect=True)
def test_a_recipe_holds_the_papers_numbers(recipe: tuple[str, Config]) -> None:
    name, config = recipe
    size, method = name.split("_", 1)
    expected = SHARED | {f"loss.{key}": value for key, value in LOSSES[method].items()}
    if method == "kl_cov":
        expected["loss.select_fraction"] = KL_COV_FRACTION[size]
    expected |= {"optimizer.lr": LEARNING_RATE[size], "train.micro_batch_tokens": MICRO_BATCH_TOKENS.get(name, 20480)}
    expected |= {"name": name, "parallel.world_size": GPUS[size]}
    assert {path: option(config, path) for path in expected} == expected
    assert config.minibatches_per_step == 8
    assert sum(count_parameters(read_hf_config(config.model))) == PARAMETERS[size]


@pytest.mark.parametrize("recipe", RECIPES, indirect=True)
def test_a_recipe_is_planned_without_gpu_and_model(recipe: tuple[str, Config]) -> None:
    name, config = recipe
    rows = dict(plan_rows(config))  # what `train --check` prints
    assert rows["processes"].startswith(f"{GPUS[name.split('_')[0]]} (tp ")
    assert config.rollout.server.count * config.rollout.server.tp == 8, "the engines of a node fill its GPUs"
    assert parse_config(config.model_dump(mode="json")) == config and "${" not in dump_config(config)
    with pytest.raises(ConfigError, match=r"model\.path=models/Qwen2\.5-\d+B: no such folder here; download"):
        require_model(config.model)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_its_job(name: str) -> None:
    script = (ROOT / "slurm" / f"{name}.sbatch").read_text()
    nodes = GPUS[name.split("_")[0]] // 8
    assert f'launch.sh" configs/{name}.yaml "$@"' in script and f"#SBATCH --job-name={name}\n" in script
    assert f"#SBATCH --nodes={nodes}\n" in script and "#SBATCH --gpus-per-node=8\n" in script
    assert re.search(r"#SBATCH --signal=B:USR1@\d+\n", script) and "#SBATCH --requeue\n" in script


def test_a_model_folder_must_be_what_the_recipe_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATRON_RL_MODELS", str(tmp_path))
    recipe = ROOT / "configs" / "7b_grpo.yaml"
    stated = load_config(recipe).model.hf_config or {}
    folder = tmp_path / "Qwen2.5-7B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(stated | {"rope_theta": 1e6}))
    config = load_config(recipe)
    assert config.model.path == str(folder) and read_hf_config(config.model)["rope_theta"] == 1e6
    (folder / "config.json").write_text(json.dumps(stated | {"num_hidden_layers": 36}))
    with pytest.raises(ConfigError, match=r"states another architecture.*num_hidden_layers: 28, there 36"):
        load_config(recipe)


def test_variables_in_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATRON_RL_DATA", "/elsewhere")
    config = load_config(ROOT / "configs" / "7b_grpo.yaml", ["name=a", "data.system_prompt=${x} ${HOME}"])
    assert config.data.type == "jsonl" and config.data.train_path == "/elsewhere/train_dapo_math_17k.jsonl"
    assert config.data.system_prompt == "${x} ${HOME}", "only the project's own variables are replaced"
    with pytest.raises(ConfigError, match=r"\$\{MEGATRON_RL_NOWHERE\}: the environment variable .* is not set"):
        load_config(ROOT / "configs" / "7b_grpo.yaml", ["data.train_path=${MEGATRON_RL_NOWHERE}/x"])
