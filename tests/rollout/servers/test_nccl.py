"""NCCL's setting and version, on both sides of a group with engines."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_rl import device
from megatron_rl.config import parse_config
from megatron_rl.rollout.engine import EngineError
from megatron_rl.rollout.servers import fleet
from megatron_rl.rollout.servers.nccl import agree_with_engines, check_same_nccl
from tests.rollout.servers.servers_case import lone_place
from tests.tiny import tiny_raw

NAME = "NCCL_CUMEM_ENABLE"


def config_of(folder: Path, mode: str, engine: str = "sglang", **server: object) -> object:
    return parse_config(
        tiny_raw(folder, rollout={"engine": engine, "weight_sync": {"mode": mode}, "server": {**server}})
    )


@pytest.mark.parametrize(
    ("engine", "mode", "given", "expected"),
    [
        ("sglang", "disaggregated", None, "0"),
        ("vllm", "disaggregated", "1", "1"),
        ("sglang", "colocated", None, None),
        ("transformers", "disaggregated", None, None),
    ],
)
def test_the_setting_is_agreed_where_a_group_will_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, mode: str, given: str | None, expected: str | None
) -> None:
    monkeypatch.setenv(NAME, given or "")
    if given is None:
        monkeypatch.delenv(NAME)
    agree_with_engines(config_of(tmp_path, mode, engine).rollout)  # type: ignore[attr-defined]
    assert os.environ.get(NAME) == expected
    monkeypatch.delenv(NAME, raising=False)


def interpreter(folder: Path, body: str) -> Path:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_another_nccl_is_refused_with_both_versions(tmp_path: Path) -> None:
    check_same_nccl(interpreter(tmp_path, "echo 2.30.7"), "2.30.7")
    with pytest.raises(EngineError, match=r"has NCCL 2\.27\.3, the trainer 2\.30\.7, and .*Install one torch"):
        check_same_nccl(interpreter(tmp_path, "echo 2.27.3"), "2.30.7")
    with pytest.raises(EngineError, match="cannot name its NCCL.*no torch"):
        check_same_nccl(interpreter(tmp_path, "echo no torch >&2; exit 1"), "2.30.7")


def test_versions_are_compared_before_a_server_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "ON_GPU", True)
    monkeypatch.setattr(device, "gpu_versions", lambda: {"NCCL": "2.30.7"})
    python = str(interpreter(tmp_path, "echo 2.27.3"))
    place, checks = lone_place(), (lambda url: None, lambda url: "", lambda url: None)
    started: list[int] = []
    monkeypatch.setattr(fleet.Fleet, "_launch", lambda self, index: started.append(index))
    with pytest.raises(EngineError, match="2.27.3"):
        fleet.Fleet(None, config_of(tmp_path, "disaggregated", python=python), tmp_path, place, *checks).start()  # type: ignore[arg-type]
    assert started == []
    fleet.Fleet(None, config_of(tmp_path, "colocated", python=python), tmp_path, place, *checks).start()  # type: ignore[arg-type]
    assert started == [0]
