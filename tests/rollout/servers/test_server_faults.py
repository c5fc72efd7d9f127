"""What goes wrong with servers, provoked on real ones: each fault is mended, or ends the run with what to do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import yaml

from megatron_rl.config import parse_config
from megatron_rl.rollout.servers.http import ServerBusy
from tests.rollout.servers.servers_case import python_of, raw_of, rows, serving
from tests.worlds import Worlds, leave_layout

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]
LONG = {"samples_per_prompt": 4, "max_response_tokens": 200, "stop_token_ids": []}  # seconds of generation
BATCH = {"prompts_per_step": 4, "prompts_per_minibatch": 2, "micro_batch_tokens": 2048, "num_steps": 2}


def _long(folder: Path, name: str, engine: str, **server: Any) -> dict[str, Any]:
    return raw_of(folder, name, engine, rollout=LONG | {"server": server}, train=BATCH | {"save_final": True})


def _train(raw: dict[str, Any], fault: str) -> dict[str, Any]:
    """Train with a fault; on every rank the ids of each step's rollouts, the failures counted, and the error."""
    from megatron_rl import train
    from megatron_rl.errors import UserError
    from megatron_rl.parallel.groups import init_groups
    from megatron_rl.rollout.collect import Collector

    config, runs, steps = parse_config(raw), [], []
    set_up, collect = train.set_up, Collector.collect

    def remember(*arguments: Any) -> Any:
        runs.append(set_up(*arguments))
        _provoke(fault, runs[0])
        return runs[0]

    def note(collector: Any, step: int) -> Any:
        result = collect(collector, step)
        steps.append([(r.prompt_id, r.sample_index, r.weight_version, r.response_length) for r in result.rollouts])
        return result

    error = ""
    try:
        with mock.patch.object(train, "set_up", remember), mock.patch.object(Collector, "collect", note):
            train.train(config, init_groups(config.parallel, config.seed))
    except UserError as failure:
        error = str(failure)
    finally:
        for run in runs:
            run.served.engine.close()
        leave_layout()
    failures, busy = runs[0].served.engine._fleet.failures, getattr(runs[0].served.engine, "turned_away", 0)
    return {"steps": steps, "failures": failures, "error": error, "turned away": busy}


def _server_pid(run: Any) -> int:
    guard = run.served.engine._fleet._owned[0].process._process.pid
    return psutil.Process(guard).children()[0].pid


def _provoke(fault: str, run: Any) -> None:
    engine = run.served.engine
    if fault == "full queue":
        generate = engine._dialect.generate

        async def counted(*arguments: Any, **options: Any) -> Any:
            try:
                return await generate(*arguments, **options)
            except ServerBusy:
                engine.turned_away = getattr(engine, "turned_away", 0) + 1
                raise

        engine._dialect.generate = counted
    if run.groups.rank > 0:
        return
    if fault == "killed in generation":

        def kill() -> None:
            while sum(target.in_flight for target in engine._turns.targets) < 4 or run.served.weight_version < 1:
                time.sleep(0.005)
            time.sleep(0.3)
            os.kill(_server_pid(run), signal.SIGKILL)

        threading.Thread(target=kill, daemon=True).start()
    elif fault.startswith("killed in update"):
        receive, times = engine._dialect.receive_shared, [0]

        async def receive_and_die(*arguments: Any) -> None:
            times[0] += 1
            if times[0] == 2 or fault.endswith("always"):  # of the second update
                os.kill(_server_pid(run), signal.SIGKILL)
            await receive(*arguments)

        engine._dialect.receive_shared = receive_and_die


def _complete(rank: dict[str, Any], samples: int = 4) -> None:
    for step, ids in enumerate(rank["steps"]):
        assert len(ids) == 16 and len({(prompt, sample) for prompt, sample, *_ in ids}) == 16
        assert {version for *_, version, _ in ids} == {step} and {length for *_, length in ids} == {200}


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
@pytest.mark.parametrize("fault", ["killed in generation", "killed in update"])
def test_a_killed_server_is_replaced_and_nothing_is_lost_or_counted_twice(
    worlds: Worlds, tmp_path: Path, engine: str, fault: str
) -> None:
    python_of(engine)
    raw = _long(tmp_path, "killed", engine)
    ranks = worlds.run(2, _train, raw, fault, timeout=400)
    for rank in ranks:
        assert rank["error"] == "" and rank["failures"] == 1 and len(rank["steps"]) == 2
        _complete(rank)
    assert ranks[0]["steps"] == ranks[1]["steps"]
    assert max(row["mismatch/abs_max"] for row in rows(tmp_path / "killed")) < 1e-4


@pytest.mark.parametrize("draws_more", [False, True])
def test_one_of_two_servers_dies_and_the_other_serves_on(worlds: Worlds, tmp_path: Path, draws_more: bool) -> None:
    """Its requests go to the other at once; the next update brings it back."""
    python_of("sglang")
    raw = _long(tmp_path, "pair", "sglang", count=2, max_concurrency=8)
    raw["train"]["num_steps"] = 3
    if draws_more:  # dynamic sampling, with other prompts under way
        raw["algorithm"] = {"dynamic_sampling": {"enabled": True, "max_batches": 16}}
        raw["reward"] = {"function": "tests.test_train:seldom"}
    for rank in worlds.run(2, _train, raw, "killed in generation", timeout=400):
        assert rank["error"] == "" and rank["failures"] == 1 and len(rank["steps"]) == 3
        _complete(rank)
    assert max(row["mismatch/abs_max"] for row in rows(tmp_path / "pair")) < 1e-4


def test_too_many_failures_end_the_run_with_a_checkpoint(worlds: Worlds, tmp_path: Path) -> None:
    python_of("sglang")
    raw = _long(tmp_path, "dying", "sglang", max_failures=0)
    for rank in worlds.run(2, _train, raw, "killed in update", timeout=300):
        assert "1 servers died in this run, rollout.server.max_failures=0" in rank["error"]
        assert len(rank["steps"]) == 1
    assert (tmp_path / "dying" / "checkpoints" / "step_00000001" / "metadata.json").is_file()


def test_a_slow_server_and_one_of_another_model_are_named(worlds: Worlds, tmp_path: Path) -> None:
    with serving("sglang", tmp_path, intermediate_size=128) as (process, url):
        other = _long(tmp_path, "other", "sglang", urls=[url])
        for rank in worlds.run(2, _train, other, "", timeout=200):
            assert f"{url} serves another model than the policy: model.layers." in rank["error"]
            assert "has shape (128, 64) there and (96, 64) here" in rank["error"] or "(64, 128)" in rank["error"]
        assert process.alive()
    slow = _long(tmp_path, "slow", "sglang", request_seconds=0.1)
    for rank in worlds.run(2, _train, slow, "", timeout=200):
        assert "had no answer within rollout.server.request_seconds=0.1" in rank["error"] and not rank["steps"]


def test_a_full_queue_is_waited_for(worlds: Worlds, tmp_path: Path) -> None:
    """One request decodes and one may queue; the others are turned away and come again."""
    python_of("sglang")
    limits = ["--max-running-requests", "1", "--max-queued-requests", "1"]
    raw = _long(tmp_path, "queue", "sglang", extra_args=limits)
    raw["train"]["num_steps"] = 1
    for rank in worlds.run(2, _train, raw, "full queue", timeout=400):
        assert rank["error"] == "" and rank["failures"] == 0
        assert rank["turned away"] > 0, "no request was turned away: the test shows nothing"
        _complete(rank)


def _tree(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_nothing_survives_a_killed_run(tmp_path: Path, engine: str) -> None:
    """SIGKILL to the command that the user started; SIGKILL to rank 0."""
    python_of(engine)
    raw = _long(tmp_path, "survivors", engine)
    raw["train"]["num_steps"] = 50
    for victim in ("command", "rank 0"):
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw | {"name": victim.replace(" ", "_")}))
        command = [sys.executable, "-m", "megatron_rl", "train", str(tmp_path / "run.yaml")]
        with (tmp_path / "out.txt").open("w") as out:
            run = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
        deadline = time.monotonic() + 240
        while "step 1/" not in (tmp_path / "out.txt").read_text():
            assert run.poll() is None and time.monotonic() < deadline, (tmp_path / "out.txt").read_text()
            time.sleep(0.2)
        family = _tree(run.pid)
        assert len(family) > 4, "no server among the run's processes"
        rank_0 = next(p for p in psutil.Process(run.pid).children() if p.environ().get("RANK") == "0")
        os.kill(run.pid if victim == "command" else rank_0.pid, signal.SIGKILL)
        run.wait(60)
        _, alive = psutil.wait_procs(family, timeout=30)
        assert not alive, [process.cmdline() for process in alive]
