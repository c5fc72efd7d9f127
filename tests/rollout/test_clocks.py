"""The clock table: whoever waits for something gives up later than the one who does it."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config import Config, load_config, parse_config
from megatron_rl.rollout import clocks
from megatron_rl.rollout.clocks import server_waits, waiting_seconds

ROOT = Path(__file__).resolve().parent.parent.parent
SERVERS = ROOT / "megatron_rl" / "rollout" / "servers"
RECIPES = sorted({*(ROOT / "configs").glob("*.yaml")} - {ROOT / "configs" / "smollm2_135m.yaml"})  # it is fetched first
# bounds of one look or pause, far below any wait of a rank
SHORT = 60


def config_of(**server: Any) -> Config:
    hf = {"model_type": "qwen2", "hidden_size": 64, "intermediate_size": 64, "vocab_size": 64}
    raw = {
        "model": {"hf_config": hf | {"num_hidden_layers": 2, "num_attention_heads": 4}},
        "parallel": {"world_size": 8, "timeout_seconds": 100.0},
        "data": {"type": "countdown", "num_eval": 10},
        "rollout": {"engine": "sglang", "samples_per_prompt": 4, "server": server},
        "train": {"prompts_per_step": 16, "prompts_per_minibatch": 16},
    }
    return parse_config(raw)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_wait_ends_before_the_timeout_of_the_group_that_waits(path: Path) -> None:
    config = load_config(path, [])
    server, alone, limit = config.rollout.server, config.parallel.timeout_seconds, waiting_seconds(config)
    waits = server_waits(config)
    assert (waits == {}) == config.rollout.is_embedded
    for seconds in waits.values():  # and then the rank has time for work of its own: grading, files
        assert seconds + alone <= limit
    if waits:
        assert waits["start of servers"] > server.start_seconds
        assert waits["weight update"] > 3 * clocks.LOAD_SECONDS > clocks.GROUP_SECONDS


def test_evaluation_counts_the_turns_that_its_problems_take_on_the_servers_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # two nodes
    (tmp_path / "mine.jsonl").write_text('{"problem": "1", "answer": "1"}\n' * 32)
    sets = {"sets": ["mine"], "options": {"mine": {"path": str(tmp_path / "mine.jsonl"), "samples": 2}}}
    data = {"type": "jsonl", "train_path": "x", "tokenizer": "y"}

    def waited(**server: Any) -> float:
        raw = config_of(request_seconds=7.0, **server).model_dump(mode="json")
        return server_waits(parse_config(raw | {"data": data, "eval": sets}))["evaluation, mine"]

    turn = 7.0 + clocks.LOST_SECONDS + clocks.HEALTH_SECONDS
    # 64 responses; each of 8 ranks keeps 2 at a server; of 2 * 2 servers 1 may be dead
    assert waited(count=2, max_concurrency=16, max_failures=1) == 2 * turn
    assert waited(count=2, max_concurrency=16) == 4 * turn
    assert waited(count=2, max_failures=1) == turn
    assert waiting_seconds(config_of(start_seconds=5000.0)) > 5100.0


def test_no_bound_of_a_servers_answer_stands_elsewhere() -> None:
    """A bound that the table does not know could be longer than the timeout that is made from it."""
    for path in sorted(SERVERS.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg in ("seconds", "timeout"):
                numbers = [n.value for n in ast.walk(node.value) if isinstance(n, ast.Constant)]
                assert all(n < SHORT for n in numbers if isinstance(n, int | float)), f"{path.name}:{node.value.lineno}"
        for name, number in re.findall(r"^(\w*SECONDS) = ([\d.]+)", path.read_text(), re.M):
            assert float(number) < SHORT, f"{path.name}: {name}"
    shim = (SERVERS / "shims" / "vllm" / "megatron_rl_vllm.py").read_text()
    assert re.search(r"^_SECONDS = (\d+)", shim, re.M)[1] == f"{clocks.GROUP_SECONDS:g}"  # type: ignore[index]
    assert f'"{clocks.STOP_SECONDS:g}"' in (SERVERS / "guard.py").read_text()


RECIPES = [path for path in sorted((ROOT / "slurm").glob("*.sbatch")) if path.stem != "conform"]  # which saves nothing


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_slurm_warns_early_enough_for_a_generation_batch_and_a_save(path: Path) -> None:
    """After the warning a run ends the batch or the step that it is in, and saves."""
    config = load_config(ROOT / "configs" / f"{path.stem}.yaml", [])
    warned = int(re.search(r"--signal=B:USR1@(\d+)", path.read_text())[1])  # type: ignore[index]
    assert warned >= config.rollout.server.request_seconds + config.parallel.timeout_seconds
