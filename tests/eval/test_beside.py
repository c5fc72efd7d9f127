"""Benchmarks beside training, with embedded engines in the servers' place: whose weights, in which row, and what
becomes of it when something goes wrong. Real servers: test_beside_servers.py."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_rl.config import parse_config
from megatron_rl.errors import ConfigError
from tests.eval.case import write_model, write_set
from tests.eval.test_during_training import raw_of
from tests.tiny import rows_of, trained
from tests.worlds import Worlds

SETS = ("mine", "gsm8k")
LIMIT = 300.0


def beside(folder: Path, name: str = "t", *, hf: Any = None, **sections: Any) -> dict[str, Any]:
    """Four steps, evaluated after each second one, greedily."""
    if not (folder / "model").exists():
        write_model(folder / "model", **(hf or {}))
        for bench in SETS:
            write_set(folder / "sets" / f"{bench}.jsonl", 3)
    raw = raw_of(folder, train={"num_steps": 4, "eval_every": 2, "keep_best": False, "save_final": True})
    raw |= {"name": name, "optimizer": {"lr": 1e-2}}
    raw["rollout"] |= {"engine": "sglang"}
    raw["eval"] |= {"beside": True}
    raw["eval"]["options"]["mine"] |= {"samples": 2, "temperature": 0.0}
    for section, changes in sections.items():
        raw[section] |= changes
    return raw


class Noted:
    """What a run did on this rank, in order."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, bool]] = []  # step, whether late
        self.said: list[str] = []
        self.sampled: list[tuple[int, int]] = []  # by the evaluation's engine: version of its weights, steps logged
        self.started: list[Any] = []  # its config and setup
        self.in_step: dict[int, dict[str, float]] = {}

    @property
    def steps(self) -> int:
        return sum(not late for _, late in self.logged)


@contextlib.contextmanager
def noting(
    before_sample: Callable[[Noted, Any], None] = lambda noted, engine: None, *, real: bool = False
) -> Iterator[Noted]:
    """Embedded engines in the servers' place, but for `real`; `before_sample` runs on the evaluation's thread before
    each sample."""
    from megatron_rl import train
    from megatron_rl.eval.during_training import Beside, evaluate_sets
    from megatron_rl.metrics.write import RunLogger
    from megatron_rl.rollout import served
    from megatron_rl.rollout.build import ENGINES

    noted, runs = Noted(), []
    set_up, begin, log, message = train.set_up, Beside.begin, RunLogger.log, RunLogger.message

    def build(config: Any, setup: Any) -> Any:
        engine = ENGINES[config.rollout.engine if real else "transformers"](config, setup)
        if setup.place.has_weights:
            noted.started.append((config, setup))
            stream = engine.stream

            def slow(requests: Any) -> Any:
                for item in stream(requests):
                    before_sample(noted, engine)
                    noted.sampled.append((item[1].weight_version, noted.steps))
                    yield item

            engine.stream = slow
        return engine

    def remember(*arguments: Any) -> Any:
        runs.append(set_up(*arguments))
        return runs[-1]

    def begin_after_one_in_the_step(self: Any, num_steps: int, logger: Any) -> None:
        run = runs[-1]
        elsewhere = run.config.logging.model_copy(update={"run_dir": f"{run.config.run_dir}_in_step"})
        config = run.config.model_copy(update={"logging": elsewhere})
        with run.served.session(run.timers):
            noted.in_step[num_steps] = evaluate_sets(run.evaluator, run.benchmarks, config, num_steps, run.world)
        begin(self, num_steps, logger)

    def note_log(self: Any, step: int, metrics: Any, *, late: bool = False) -> None:
        log(self, step, metrics, late=late)
        noted.logged.append((step, late))

    def note_message(self: Any, text: str) -> None:
        noted.said.append(text)
        message(self, text)

    with contextlib.ExitStack() as stack:
        for owner, name, new in (
            (served, "build_engine", build),
            (train, "set_up", remember),
            (Beside, "begin", begin_after_one_in_the_step),
            (RunLogger, "log", note_log),
            (RunLogger, "message", note_message),
        ):
            stack.enter_context(mock.patch.object(owner, name, new))
        yield noted


def wait_for(condition: Callable[[], bool]) -> None:
    tick = threading.Event()
    for _ in range(6000):
        if condition():
            return
        tick.wait(0.02)
    raise AssertionError("what to wait for did not come")


def evaluated(row: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name.startswith("eval/")}


def answers(run_dir: Path, step: int, name: str = "mine") -> list[str]:
    lines = (run_dir / "eval" / f"step_{step:06d}" / "sets" / name / "samples.jsonl").read_text().splitlines()
    return [json.loads(line)["response"] for line in lines]


# --- on a rank of `worlds` --------------------------------------------------------------------------------------------


def _goes_on(raw: dict[str, Any]) -> Noted:
    """The evaluation after step 2 gets no answer before step 3 is logged."""

    def hold(noted: Noted, engine: Any) -> None:
        wait_for(lambda: noted.steps >= min(engine.weight_version + 1, 4))

    with noting(hold) as noted, trained(raw):
        pass
    noted.started = [(config.run_dir, config.rollout.server.count, setup.place) for config, setup in noted.started]
    noted.started = [(folder, count, place.rank, place.devices_taken) for folder, count, place in noted.started]
    return noted


def test_training_goes_on_and_the_result_is_that_of_the_step(worlds: Worlds, tmp_path: Path) -> None:
    raw = beside(tmp_path)
    first, second = worlds.run(2, _goes_on, raw, timeout=LIMIT)
    run_dir = parse_config(raw).run_dir
    rows = rows_of(raw)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [bool(evaluated(row)) for row in rows] == [False, True, False, True]
    for steps in (2, 4):
        assert evaluated(rows[steps - 1]) == first.in_step[steps]
        for name in SETS:
            assert answers(run_dir, steps, name) == answers(Path(f"{run_dir}_in_step"), steps, name)
    assert answers(run_dir, 2) != answers(run_dir, 4), "the weights hardly moved: stale ones would pass"
    assert {version for version, _ in first.sampled} == {2, 4} and not second.sampled
    assert all(logged >= 3 for version, logged in first.sampled if version == 2)
    assert first.logged.index((1, True)) > first.logged.index((2, False))
    assert first.started == [(run_dir / "eval" / "servers", 1, 0, 0)] and not second.started
    assert not (run_dir / "eval" / "servers" / "num_steps").exists()


def _scenarios(waiting: dict[str, Any], stopped: dict[str, Any], failing: dict[str, Any]) -> dict[str, Any]:
    from megatron_rl import launch
    from megatron_rl.errors import UserError
    from megatron_rl.rollout.engine import EngineAborted, EngineError

    found: dict[str, Any] = {}

    def until_the_next_is_due(noted: Noted, engine: Any) -> None:
        wait_for(lambda: engine.weight_version + 1 in noted.in_step or engine.weight_version == 2)

    with noting(until_the_next_is_due) as noted, trained(waiting):
        found["waiting"] = noted.said, noted.in_step, noted.logged

    def until_the_end(noted: Noted, engine: Any) -> None:
        wait_for(engine._abort.is_set)
        raise EngineAborted("generate: aborted")

    with noting(until_the_end) as noted:

        def stop_requested(run_dir: Any = None) -> bool:
            return noted.steps >= 3

        with mock.patch.object(launch, "stop_requested", stop_requested), trained(stopped) as run:
            found["stopped"] = noted.said, noted.in_step, rows_of(stopped), run.beside._thread.is_alive()
    with noting() as noted, trained(stopped):
        found["continued"] = noted.said, noted.in_step

    def fail(noted: Noted, engine: Any) -> None:
        raise EngineError("no answer within rollout.server.request_seconds=1")

    with noting(fail) as noted:
        try:
            with trained(failing):
                pass
        except UserError as error:
            found["failing"] = str(error), noted.said
    with noting() as noted, trained(failing | {"eval": failing["eval"] | {"beside": False}}):
        found["given up"] = noted.said
    return found


def test_it_is_waited_for_stopped_and_may_fail(worlds: Worlds, tmp_path: Path) -> None:
    """A run that is due to evaluate while it does; one that is stopped and goes on; one whose servers fail, and which
    goes on without."""
    waiting = beside(tmp_path, "waiting", train={"num_steps": 2, "eval_every": 1})
    mark = parse_config(waiting).run_dir / "eval" / "servers" / "num_steps"
    mark.parent.mkdir(parents=True)
    mark.write_text("1")  # of a run that was killed, and that goes on from before its first step
    stopped = beside(tmp_path, "stopped", train={"num_steps": 4})
    failing = beside(tmp_path, "failing", train={"num_steps": 4})
    first, second = worlds.run(2, _scenarios, waiting, stopped, failing, timeout=LIMIT)

    said, in_step, logged = first["waiting"]
    assert [evaluated(row) for row in rows_of(waiting)] == [in_step[1], in_step[2]]
    assert logged == [(0, False), (0, True), (1, False), (1, True)]
    assert any(text.startswith("training waited ") and text.endswith("after step 1") for text in said)
    assert not any("anew" in text for text in said)

    said, in_step, rows, alive = first["stopped"]
    assert len(rows) == 3 and not any(map(evaluated, rows)) and not alive
    assert "stopping: the evaluation after step 2 begins anew when the run goes on" in said
    again, later = first["continued"]
    assert "the evaluation after step 2 had not ended, and begins anew" in again
    assert [evaluated(row) for row in rows_of(stopped)] == [{}, in_step[2], {}, later[4]]

    for rank in (first, second):
        assert rank["failing"][0].endswith("failed: no answer within eval.server.request_seconds=1")
    assert any(text.startswith("an engine failed in step ") for text in first["failing"][1])
    assert "the evaluation after step 2 had not ended; with eval.beside=true it begins anew" in first["given up"]
    assert [(row["step"], bool(evaluated(row))) for row in rows_of(failing)] == [(0, False), (1, False), (3, True)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rollout": {"engine": "transformers"}},
            "eval.beside=true needs servers; set rollout.engine to sglang or vllm",
        ),
        ({"eval": {"server": {"share_memory": True}}}, "eval.server.share_memory=true: with eval.beside=true servers"),
        ({"eval": {"server": {"kv_tokens": 8}}}, "eval.server.kv_tokens=8 is below the longest sequence"),
        ({"eval": {"server": {"tp": 3}}}, "num_attention_heads=4 is not divisible by eval.server.tp=3"),
        ({"eval": {"server": {"urls": ["node2"]}}}, "eval.server.urls: 'node2' is no address"),
        ({"train": {"keep_best": True}}, "eval/average comes when its weights are gone"),
        ({"eval": {"sets": []}, "data": {"eval_path": "x"}}, "eval.beside=true has no eval.sets"),
        (
            {
                "eval": {"server": {"urls": ["http://localhost:1"]}},
                "rollout": {"server": {"urls": ["http://localhost:1"]}},
            },
            "eval.server.urls has a server of rollout.server.urls",
        ),
    ],
)
def test_what_cannot_be_is_refused_at_load(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    parse_config(beside(tmp_path))
    parse_config(beside(tmp_path, eval={"server": {"urls": ["http://node2:1"]}}))  # a folder reaches other machines
    parse_config(beside(tmp_path, train={"keep_best": True}, data={"eval_path": "x"}))
    with pytest.raises(ConfigError) as error:
        parse_config(beside(tmp_path, **changes))
    assert message in str(error.value) and str(error.value).count("\n  - ") == 1
    with pytest.raises(ConfigError, match="eval.server does nothing without eval.beside=true"):
        parse_config(beside(tmp_path, eval={"beside": False, "server": {"count": 2}}))
    if changes != {"eval": {"server": {"tp": 3}}}:
        parse_config(beside(tmp_path, **(changes | {"train": {"eval_every": 0}})))  # nothing is evaluated


def test_its_servers_are_on_devices_that_nobody_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer of two GPUs, with rollouts on its own, on two others, and on servers that were given."""
    from megatron_rl import device
    from megatron_rl.eval.during_training import Beside
    from megatron_rl.rollout.servers import fleet

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(device, "ON_GPU", True)
    monkeypatch.setattr(device, "device", lambda: None)
    monkeypatch.setattr(fleet, "EngineProcess", lambda argv, env, log: None)
    devices: list[tuple[int, ...]] = []
    dialect = mock.Mock(command=lambda spec: (devices.append(spec.devices), {}))
    policy = mock.Mock(groups=mock.Mock(rank=0))

    def start(config: Any, setup: Any) -> None:
        fleet.Fleet(dialect, config, tmp_path, setup.place, print, print, print).start()

    monkeypatch.setattr("megatron_rl.rollout.served.build_engine", start)
    monkeypatch.setattr("megatron_rl.rollout.served.write_model_dir", lambda *_: None)
    for server, sync in (
        ({"count": 2}, "colocated"),
        ({"count": 2}, "disaggregated"),
        ({"urls": ["http://a:1"]}, "disaggregated"),
    ):
        changes: dict[str, Any] = {"rollout": {"server": server, "weight_sync": {"mode": sync}}}
        config = parse_config(
            beside(tmp_path, eval={"server": {"tp": 2, "python": str(tmp_path / "model" / "config.json")}}, **changes)
        )
        Beside(config, policy, None, mock.Mock(), [mock.Mock()])
    assert devices == [(2, 3), (4, 5), (2, 3)]


def test_a_folder_that_has_the_weights_is_loaded_as_it_is(tmp_path: Path) -> None:
    from megatron_rl.rollout.servers.engine import Loop
    from megatron_rl.rollout.servers.weight_sync import Disk

    loaded: list[Any] = []

    class Loading:
        async def load_folder(self, server: str, path: Path, weight_version: int) -> None:
            loaded.append((server, path, weight_version))

    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").write_text("all")
    loop, stream, dialect = Loop(), iter([("a", None), ("b", None)]), Loading()
    channel = Disk(dialect, tmp_path / "weights", loop.submit, 0, None)  # type: ignore[arg-type]
    channel.open(["one", "two"])  # type: ignore[list-item]
    channel.send(stream, 7)  # type: ignore[arg-type]
    loop.close()
    assert loaded == [(server, tmp_path / "weights", 7) for server in ("one", "two")]
    assert next(stream, None) is None and (tmp_path / "weights" / "model.safetensors").read_text() == "all"
