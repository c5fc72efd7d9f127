"""Each line passes or names the remedy; the command on real ranks."""

from __future__ import annotations

import dataclasses
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml

from megatron_rl import device
from megatron_rl.config import Config, parse_config
from megatron_rl.parallel.world import all_reduce_bandwidth
from megatron_rl.preflight import facts as facts_module
from megatron_rl.preflight.checks import Check, bandwidth_check, checkpoint_bytes, fact_checks
from megatron_rl.preflight.facts import Facts, gather_facts, requirements
from tests.tiny import tiny_raw
from tests.worlds import Worlds

ROOT = Path(__file__).resolve().parent.parent.parent
GIB = 2**30
H100 = ("NVIDIA H100", 78 * GIB, 80 * GIB)
SGLANG = {"engine": "sglang", "samples_per_prompt": 4, "max_response_tokens": 12}


def config(**sections: Any) -> Config:
    return parse_config(tiny_raw(Path("runs"), parallel={"tp": 2, "world_size": 4}, **sections))


def facts() -> list[Facts]:
    """Two ranks on each of two nodes, nothing wrong."""
    found = []
    for rank in range(4):
        base = Facts(rank, rank % 2, f"node{rank // 2}", {"torch": "2.9"}, [], H100)
        node = {"data": "64 problems (ab)", "free_bytes": 2**30, "engine_version": "0.5.23", "host_bytes": 64 * GIB}
        found.append(dataclasses.replace(base, **node) if rank % 2 == 0 else base)
    return found


def with_faults(rank: int, **fields: Any) -> list[Facts]:
    found = facts()
    found[rank] = dataclasses.replace(found[rank], **fields)
    return found


def lines(found: list[Facts], **sections: Any) -> dict[str, Check]:
    return {line.name: line for line in fact_checks(config(**sections), found, vocabulary=21, existing_checkpoints=0)}


def test_a_sound_cluster_passes() -> None:
    found = lines(facts(), rollout=SGLANG)
    # what these tell is no check
    assert {name for name, line in found.items() if line.is_ok is not True} == {"Megatron", "same rollouts"}
    assert found["ranks"].finding == "4 of 4 on 2 nodes"
    assert found["GPUs"].finding == "4 x NVIDIA H100, at least 78.0 GiB free on each"


@pytest.mark.parametrize(
    ("engine", "server", "on_gpus", "is_ok", "finding"),
    [
        ("transformers", {}, False, True, "in every run"),
        ("sglang", {}, True, None, "rollout.server.deterministic=true"),
        ("sglang", {"deterministic": True}, True, True, "SGLang's batch-invariant mode"),
        ("sglang", {"deterministic": True}, False, False, "needs a GPU"),
        ("vllm", {"deterministic": True}, False, None, "no batch-invariant mode"),
        ("vllm", {"deterministic": True, "urls": ["http://localhost:3"]}, True, None, "VLLM_BATCH_INVARIANT=1"),
    ],
)
def test_it_is_told_whether_rollouts_repeat(
    engine: str, server: dict[str, Any], on_gpus: bool, is_ok: bool | None, finding: str
) -> None:
    found = facts() if on_gpus else [dataclasses.replace(fact, gpu=None) for fact in facts()]
    line = lines(found, rollout=SGLANG | {"engine": engine, "server": server})["same rollouts"]
    assert line.is_ok is is_ok and finding in line.finding and bool(line.remedy) == (is_ok is False)


@pytest.mark.parametrize(
    ("what", "rank", "fields", "finding", "remedy"),
    [
        ("versions", 2, {"version_faults": ["torch 2.1, supported: >=2.7"]}, "node1: torch 2.1", "make gpu"),
        ("versions", 2, {"versions": {"torch": "2.8"}}, "node1: torch 2.8", "one environment"),
        ("GPUs", 3, {"gpu": None}, "no GPU on node1", "ask Slurm"),
        ("GPUs", 1, {"gpu": ("NVIDIA H100", 60 * GIB, 80 * GIB)}, "node0 GPU 1: 60.0 of 80.0", "nvidia-smi"),
        ("GPUs", 1, {"gpu": ("NVIDIA A100", 80 * GIB, 80 * GIB)}, "NVIDIA A100, NVIDIA H100", "--constraint"),
        ("node names", 2, {"unknown_hosts": ["node0"]}, "node1: cannot resolve node0", "DNS"),
        ("engine", 0, {"engine_fault": "no sglang; pip install it"}, "node0: no sglang; pip install", ""),
        ("model", 2, {"model_fault": "no such folder here; download"}, "node1: no such folder here; download", ""),
        ("data", 0, {"data_fault": "no such file; data.train_path"}, "node0: no such file", ""),
        ("data", 2, {"data": "64 problems (cd)"}, "node1: 64 problems (cd)", "all share"),
        ("reward", 0, {"reward_fault": "unknown function"}, "node0: unknown function", ""),
        ("run folder", 2, {"sees_shared": False}, "not the same folder on node1", "MEGATRON_RL_RUNS"),
        ("memory", 2, {"host_bytes": GIB}, "of 1.0 GiB on a node's host (processes 20.0 GiB", "--mem=0"),
        ("memory", 1, {"gpu": ("NVIDIA H100", GIB, GIB)}, "of a GPU's 1.0 GiB", "parallel.tp"),
        ("disk", 2, {"free_bytes": 1000}, "0.0 MiB free", "keep_checkpoints"),
    ],
)
def test_each_fault_is_found_and_named(what: str, rank: int, fields: dict[str, Any], finding: str, remedy: str) -> None:
    found = lines(with_faults(rank, **fields), rollout=SGLANG)
    assert [line.name for line in found.values() if line.is_ok is False] == [what]
    assert finding in found[what].finding and remedy in found[what].remedy


def test_a_fault_of_all_nodes_is_said_once() -> None:
    found = [dataclasses.replace(fact, model_fault="no such folder") for fact in facts()]
    assert lines(found)["model"].finding == "no such folder"


def test_checkpoints_that_are_there_need_no_more_room() -> None:
    """Of three (two are kept, and one is written before the oldest goes) a folder that holds two needs one."""
    one = checkpoint_bytes(config().model, vocabulary=21)
    found = [dataclasses.replace(fact, free_bytes=2 * one) for fact in facts()]
    of = [fact_checks(config(), found, vocabulary=21, existing_checkpoints=existing)[-1] for existing in (0, 2)]
    assert [(line.name, line.is_ok) for line in of] == [("disk", False), ("disk", True)]


def test_a_machine_without_gpu_says_so() -> None:
    found = [dataclasses.replace(fact, gpu=None) for fact in facts()][:2]
    of_cpu = lines(found)
    assert of_cpu["GPUs"].is_ok is None and of_cpu["GPUs"].finding.startswith("no GPU here")
    assert of_cpu["memory"].is_ok is None
    assert of_cpu["ranks"].is_ok is None and of_cpu["ranks"].finding.startswith("2 of 4 on 1 node: those that")


def test_wrong_sums_fail() -> None:
    assert bandwidth_check(16, 2, 1e9, False).is_ok is False
    assert bandwidth_check(16, 2, 2.5e9, True).finding == "2.50 GB/s bus bandwidth, 16 ranks on 2 nodes"
    assert bandwidth_check(1, 1, 0.0, True).is_ok is None


def test_what_is_supported_is_what_the_package_asks_for() -> None:
    assert {"torch", "megatron-core"} <= {requirement.name for requirement in requirements()}
    assert [str(requirement.specifier) for requirement in requirements("sglang")] == ["==0.5.23"]


DRIVER = {
    "580": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs-builder)",
    "570": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.10  Thu Jan 16 2025\nGCC version:  gcc 12.3.0",
}


@pytest.mark.parametrize(
    ("driver", "build", "fault"),
    [
        ("580", "13.0", None),
        ("570", "13.0", r"driver 570\.86\.10 is too old for torch's CUDA 13\.0, which needs 580 or newer"),
        ("570", "12.8", None),
        ("580", None, r"torch .* is a build for CPUs beside driver 580\.95\.05; or set MEGATRON_RL_DEVICE=cpu"),
        (None, "13.0", None),
        (None, None, None),
    ],
)
def test_a_driver_that_torch_cannot_use_is_a_fault(
    driver: str | None, build: str | None, fault: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch says no more than that there is no GPU, and the run would be on CPUs."""
    if driver:
        (tmp_path / "version").write_text(DRIVER[driver])
    monkeypatch.setattr(device, "_DRIVER_FILE", tmp_path / "version")
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.delenv("MEGATRON_RL_DEVICE", raising=False)
    (found,) = device.driver_faults() or [None]
    assert found == fault if fault is None else re.fullmatch(fault, found)
    monkeypatch.setenv("MEGATRON_RL_DEVICE", "cpu")
    assert device.driver_faults() == []


def test_transformer_engine_is_asked_for_where_its_layers_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One release of its three packages, beside a torch that the binding was compiled for; on this machine without
    them Megatron would go on with torch's Adam."""
    from megatron_rl.policy import adam  # noqa: F401  made ready for a CPU before the device is pretended

    monkeypatch.setattr(device, "ON_GPU", True)
    faults = facts_module._version_faults("transformer_engine")
    for name in ("transformer-engine", "transformer-engine-torch", "transformer-engine-cu13"):
        assert f"{name} is missing, supported: ==2.11.0" in faults
    assert [fault for fault in faults if "takes torch's Adam" in fault or "HAVE_TE" in fault] == faults[-2:]
    assert facts_module._version_faults("torch") == []
    versions = {"transformer-engine-cu12": "2.11.0", "transformer-engine-cu13": "2.11.0"}
    installed = facts_module._installed
    monkeypatch.setattr(facts_module, "_installed", lambda name: versions.get(name) or installed(name))
    assert ["lie in the same folder" in fault for fault in facts_module._version_faults("torch")] == [True]


def test_files_are_looked_at_for_real(tmp_path: Path) -> None:
    raw = tiny_raw(tmp_path, model={"path": str(tmp_path / "model")}, reward={"function": "nowhere:f"})
    raw["data"] = {"type": "jsonl", "train_path": str(tmp_path / "none.jsonl"), "max_prompt_tokens": 16}
    raw["data"]["tokenizer"] = str(tmp_path / "model")
    raw["model"]["hf_config"] = raw["model"]["hf_config"] | {"vocab_size": 32}
    found = gather_facts(parse_config(raw), tmp_path / "shared", [socket.gethostname(), "no.such.host.invalid"])
    assert "no such folder here; download" in found.model_fault and "no folder" in found.data_fault
    assert "nowhere" in found.reward_fault and not found.sees_shared
    assert found.unknown_hosts == ["no.such.host.invalid"]
    assert found.version_faults == [] and found.free_bytes > 0
    assert 0 < found.host_bytes <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _bandwidth(wrong: bool) -> tuple[float, bool]:
    from megatron_rl.parallel.reduce import Reducer

    world = Reducer(torch.distributed.group.WORLD)
    real = torch.distributed.all_reduce

    def spoiled(values: torch.Tensor, **options: Any) -> None:
        real(values, **options)
        values[-1] += wrong and torch.distributed.get_rank() == 1

    with mock.patch.object(torch.distributed, "all_reduce", spoiled):
        return all_reduce_bandwidth(world, nbytes=2**16, repeats=2)


def test_an_all_reduce_is_timed_and_its_sums_are_checked(worlds: Worlds) -> None:
    assert all(speed > 0 and right for speed, right in worlds.run(2, _bandwidth, False))
    assert [right for _, right in worlds.run(2, _bandwidth, True)] == [True, False]


@pytest.fixture
def preflight(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_raw(tmp_path / "runs")))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "MEGATRON_RL_DEVICE": "cpu"}

    def run(*overrides: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "megatron_rl", "preflight", str(path), *overrides]
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=240)

    return run


def test_the_command_fails_with_the_remedy_and_leaves_nothing_behind(
    preflight: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """Every line but one passes: the reward that fails is the only thing between this run and exit code 0."""
    done = preflight("reward.function=nowhere:f")
    assert done.returncode == 1 and "error: preflight: reward to be mended" in done.stderr
    marks = {line[6:19].strip(): line[:5].strip() for line in done.stdout.splitlines() if not line.startswith(" ")}
    assert {what for what, mark in marks.items() if mark == "FAIL"} == {"reward"}
    assert marks["all-reduce"] == marks["model"] == marks["data"] == "ok" and marks["engine start"] == "-"
    assert list((tmp_path / "runs").iterdir()) == []
