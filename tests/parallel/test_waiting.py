"""Ranks wait for each other on gloo groups alone: numbers travel on the device's backend, all else beside it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_rl import device
from megatron_rl.config import ParallelConfig
from megatron_rl.parallel import reduce, weights
from megatron_rl.parallel.reduce import Reducer
from megatron_rl.parallel.world import host_group, join_world
from tests.tiny import tiny_raw, trained
from tests.worlds import Worlds

LIMIT = 280.0
LAYOUTS = {"dp2": {"tp": 1, "world_size": 2}, "pp2": {"tp": 1, "pp": 2}}


class Beside:
    """A world in which every group that the project did not make for its hosts says that it is NCCL's."""

    def __init__(self) -> None:
        self.hosts: list[Any] = []
        self.seen: set[tuple[str, str]] = set()  # (what travels, backend)
        self.order: list[str] = []
        self._all_gather = reduce.all_gather_flat
        self._patches = [
            mock.patch.object(dist, "get_backend", self.backend),
            mock.patch.object(dist, "new_subgroups_by_enumeration", self.subgroups),
            mock.patch.object(reduce, "all_gather_flat", self.gather),
            mock.patch.object(weights, "all_gather_flat", self.gather_weights),
        ]

    def __enter__(self) -> Beside:
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_: Any) -> None:
        for patch in self._patches:
            patch.stop()

    def backend(self, group: Any = None) -> str:
        asked_by = sys._getframe(1).f_globals["__name__"]  # Megatron hears the truth
        is_ours = asked_by.startswith("megatron_rl") and group not in self.hosts
        return "nccl" if is_ours else dist.distributed_c10d.get_backend(group)

    def subgroups(self, *arguments: Any, **options: Any) -> Any:
        assert options["backend"] == "gloo"
        made = dist.distributed_c10d.new_subgroups_by_enumeration(*arguments, **options)
        self.hosts.append(made[0])
        return made

    def gather(self, flat: Any, values: Any, group: Any) -> None:
        callers = [sys._getframe(depth).f_code.co_name for depth in range(1, 9)]  # some are of the shape checks
        what = "objects" if "_gather_on_hosts" in callers else "numbers"
        self.seen.add((what, "gloo" if group in self.hosts else "nccl"))
        self.order.append(what)
        self._all_gather(flat, values, group=group)

    def gather_weights(self, flat: Any, values: Any, group: Any) -> None:
        self.order.append("weights")
        self._all_gather(flat, values, group=group)


def _what_travels(raws: list[dict[str, Any]]) -> list[set[tuple[str, str]]]:
    seen = []
    for raw in raws:
        with Beside() as beside, trained(raw):
            seen.append(beside.seen)
            # the first rank may be writing the bucket before to a disk, or waiting for a server to load it
            before = [beside.order[i - 1] for i, what in enumerate(beside.order) if what == "weights"]
            assert before and set(before) == {"objects"}
    return seen


def test_a_run_waits_on_gloo_and_sends_its_numbers_by_the_devices_backend(worlds: Worlds, tmp_path: Path) -> None:
    """A step of each layout, with an evaluation, a save and the logs."""
    loss = {"type": "kl_cov", "select_fraction": 0.05}
    options = {"loss": loss, "train": {"num_steps": 1, "eval_every": 1, "save_final": True}}
    raws = [tiny_raw(tmp_path, name, parallel=layout, **options) for name, layout in LAYOUTS.items()]
    expected = {("objects", "gloo"), ("numbers", "nccl")}
    assert worlds.run(2, _what_travels, raws, timeout=LIMIT) == [[expected] * len(raws)] * 2


def _groups() -> tuple[list[bool], str, list[int], bool]:
    from megatron_rl.parallel.groups import init_groups

    plain = init_groups(ParallelConfig(pp=2), 1)
    world = plain.all_ranks.group
    reused = [plain.all_ranks._hosts is world, plain.dp_cp_hosts is plain.dp_cp, plain.pp_hosts is plain.pp]
    with Beside():
        try:
            Reducer(plain.pp).gather_objects("waits")
            refusal = ""
        except RuntimeError as error:
            refusal = str(error)
        hosts = host_group(plain.dp_cp, Reducer(world, hosts=host_group(world, None, 60)), 60)
    return reused, refusal, dist.get_process_group_ranks(hosts), hosts is plain.dp_cp


def test_a_gloo_group_is_its_own_and_another_backends_gets_one_beside_it(worlds: Worlds) -> None:
    for rank, (reused, refusal, members, same) in enumerate(worlds.run(2, _groups, timeout=LIMIT)):
        assert reused == [True, True, True]  # on a CPU nothing is paid for twice
        assert "travel on a gloo group" in refusal
        assert members == [rank] and not same


@pytest.mark.parametrize(("backend", "of_world", "of_hosts"), [("gloo", 90.0, []), ("nccl", 10.0, [90.0])])
def test_a_world_gives_up_later_than_its_ranks_wait(
    monkeypatch: pytest.MonkeyPatch, backend: str, of_world: float, of_hosts: list[float]
) -> None:
    """The timeouts that torch is asked for: one group's on a CPU, two groups' on GPUs."""
    asked: dict[str, list[float]] = {"world": [], "hosts": []}

    def subgroups(ranks: list[list[int]], *, timeout: Any, backend: str) -> tuple[Any, list[Any]]:
        assert (ranks, backend) == ([[0, 1]], "gloo")
        asked["hosts"].append(timeout.total_seconds())
        return mock.Mock(spec=dist.ProcessGroup), []

    def world(_: str, timeout: Any) -> None:
        asked["world"].append(timeout.total_seconds())

    monkeypatch.setattr(device, "BACKEND", backend)
    answers = {"is_initialized": False, "get_backend": backend, "get_process_group_ranks": [0, 1], "get_world_size": 2}
    for name, answer in answers.items():
        monkeypatch.setattr(dist, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(dist, "init_process_group", world)
    monkeypatch.setattr(dist, "new_subgroups_by_enumeration", subgroups)
    monkeypatch.setattr(type(dist.group), "WORLD", mock.Mock(spec=dist.ProcessGroup))
    assert join_world(10.0, 90.0).size == 2
    assert asked == {"world": [of_world], "hosts": of_hosts}


def _any(flags: list[bool]) -> tuple[bool, str]:
    world = Reducer(dist.group.WORLD, torch.device("meta"))  # they never go where numbers are
    return world.any(flags[dist.get_rank()]), world.gather_objects(torch.ones(3))[1].device.type


@pytest.mark.parametrize("flags", [[False, True], [False, False]])
def test_flags_and_objects_stay_on_the_host(worlds: Worlds, flags: list[bool]) -> None:
    assert worlds.run(2, _any, flags) == [(any(flags), "cpu")] * 2
