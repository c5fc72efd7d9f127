"""When servers start and stop beside a trainer whose devices they share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from megatron_rl import device
from megatron_rl.config import parse_config
from megatron_rl.rollout import served
from megatron_rl.rollout.engine import EngineError, Place
from megatron_rl.rollout.served import Served
from tests.tiny import tiny_raw, trained
from tests.worlds import Worlds

LIMIT = 280.0
SHARING = {"engine": "sglang", "server": {"share_memory": True}}
APART = {"engine": "sglang", "weight_sync": {"mode": "disaggregated"}}


@contextlib.contextmanager
def _noted(events: list[str], fails_at: int | None) -> Iterator[None]:
    """An embedded engine in the servers' place, whose generation fails on rank 1 with the weights of `fails_at`."""
    from megatron_rl.policy.checkpoint import CheckpointStore
    from megatron_rl.policy.policy import MegatronPolicy
    from megatron_rl.rollout.build import ENGINES

    def noting(owner: Any, name: str) -> Any:
        real = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            events.append(name)
            return real(*arguments, **options)

        return mock.patch.object(owner, name, call)

    def start(config: Any, setup: Any) -> Any:
        events.append("start")
        engine = ENGINES["transformers"](config, setup)
        stream, close = engine.stream, engine.close

        def failing(requests: Any) -> Any:
            # a probe is one request
            if len(requests) > 1 and engine.weight_version == fails_at and dist.get_rank() == 1:
                raise EngineError("gave up")
            return stream(requests)

        def closing() -> None:
            events.append("close")
            close()

        engine.stream, engine.close = failing, closing  # type: ignore[method-assign]
        return engine

    owned = [(MegatronPolicy, "offload"), (MegatronPolicy, "reload"), (CheckpointStore, "load")]
    with contextlib.ExitStack() as stack:
        for owner, name in [*owned, (CheckpointStore, "save")]:
            stack.enter_context(noting(owner, name))
        stack.enter_context(mock.patch.object(served, "build_engine", start))
        yield


def _runs(raws: list[tuple[dict[str, Any], int | None]]) -> list[list[str]]:
    every = []
    for raw, fails_at in raws:
        events: list[str] = []
        with contextlib.suppress(EngineError), _noted(events, fails_at), trained(raw):
            pass
        every.append(events)
    return every


def test_servers_come_after_what_the_trainer_loads_and_go_before_it_saves(worlds: Worlds, tmp_path: Path) -> None:
    def raw(name: str, steps: int, rollout: dict[str, Any]) -> dict[str, Any]:
        return tiny_raw(tmp_path, name, rollout=rollout, train={"num_steps": steps, "save_final": True})

    session = ["offload", "start", "reload", "save"]
    runs = [(raw("shared", 1, SHARING), None), (raw("shared", 4, SHARING), 2), (raw("apart", 1, APART), None)]
    runs += [(raw("apart", 2, APART), None)]
    for fresh, failing, _, apart in worlds.run(2, _runs, runs, timeout=LIMIT):
        assert fresh == [*session, "close"]
        # step 2 is whole, step 3 fails in its generation: the servers are gone and the optimizer is back in the save
        assert failing == ["load", "offload", "start", "reload", "offload", "close", "reload", "save"]
        assert apart[:2] == ["start", "load"]  # they come up while the trainer loads
    assert sorted(path.name for path in (tmp_path / "shared" / "checkpoints").iterdir()) == [
        "step_00000001",
        "step_00000002",
    ]


@pytest.mark.parametrize(("on_gpu", "rollout", "early"), [
    (False, {"engine": "sglang"}, True),
    (True, {"engine": "sglang"}, False),
    (True, APART, True),
    (True, {"engine": "sglang", "server": {"urls": ["http://127.0.0.1:1"]}}, True),
    (True, {}, True),
    (False, SHARING, False),
])  # fmt: skip
def test_servers_start_early_only_on_devices_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_gpu: bool, rollout: dict[str, Any], early: bool
) -> None:
    started: list[bool] = []
    monkeypatch.setattr(served, "write_model_dir", lambda *_: None)
    monkeypatch.setattr(served, "build_engine", lambda *_: started.append(True))
    monkeypatch.setattr(device, "device", lambda: None)
    monkeypatch.setattr(device, "ON_GPU", on_gpu)
    config = parse_config(tiny_raw(tmp_path, rollout=rollout))
    engine = Served(config, Place(0, 1, 0, lambda value: [value]), mock.Mock(), None, shares_memory=mock.Mock())
    engine.start_early()
    assert bool(started) == early
