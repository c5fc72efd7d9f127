"""Which request goes to which server: a group to one, the longest first, by room for requests and for tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config import parse_config
from megatron_rl.rollout.engine import Cost, Place, Request, SamplingParams, ServersLost
from megatron_rl.rollout.measures import busy_times, cost_metrics
from megatron_rl.rollout.servers.http import Server
from megatron_rl.rollout.servers.turns import Turn, Turns
from megatron_rl.rollout.window import Group
from megatron_rl.types import Prompt
from tests.tiny import tiny_raw

SAMPLING = SamplingParams(1.0, 1.0, 0, 100, (), seed=1)


def turns_of(
    servers: str, capacity: int = 10**6, concurrency: int = 4, rank: int = 0, world_size: int = 1, samples: int = 4
) -> Turns:
    server = {"max_concurrency": concurrency}
    rollout = {"engine": "sglang", "samples_per_prompt": samples, "server": server}
    config = parse_config(tiny_raw(Path("/nowhere"), rollout=rollout))
    turns = Turns(config, Place(rank, world_size, rank, lambda value: [value]), "fake")
    turns.meet({Server(f"http://{name}", None): capacity for name in servers})  # type: ignore[arg-type]
    return turns


def request(prompt: int, sample: int = 0, expected: int = 0) -> Request:
    return Request(prompt, sample, (1, 2), SAMPLING, expected_tokens=expected)


def on_loop(scenario: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """The test that runs `scenario` on an event loop."""

    def test() -> None:
        asyncio.run(asyncio.wait_for(scenario(), 60))

    return test


def opened(servers: str, **options: Any) -> Queue:
    queue = Queue(turns_of(servers, **options))
    queue.turns.open()
    return queue


class Queue:
    """Requests that were made, and which of them have a server, in the order in which they got one."""

    def __init__(self, turns: Turns) -> None:
        self.turns, self.tasks = turns, dict[Request, asyncio.Task[Turn]]()
        self.order: list[tuple[int, int]] = []

    async def ask(self, *requests: Request) -> None:
        for each in requests:
            self.tasks[each] = asyncio.ensure_future(self.turns.acquire(each))
            self.tasks[each].add_done_callback(lambda _, r=each: self.order.append((r.prompt_id, r.sample_index)))
        await settle()

    async def end(self, each: Request) -> None:
        self.turns.release(self.tasks[each].result())
        await settle()

    def server(self, each: Request) -> str:
        return self.tasks[each].result().target.result().server.url.removeprefix("http://")


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@on_loop
async def test_a_group_goes_to_one_server_and_groups_to_the_lightest() -> None:
    queue = Queue(turns_of("ab", concurrency=8))
    groups = [[request(prompt, i) for i in range(4)] for prompt in range(4)]
    await queue.ask(*(each for group in groups for each in group))
    assert not queue.order  # until weights are there
    queue.turns.open()
    await settle()
    homes = [{queue.server(each) for each in group} for group in groups]
    assert homes == [{"a"}, {"b"}, {"a"}, {"b"}]


@on_loop
async def test_ranks_begin_at_different_servers() -> None:
    for rank, first in enumerate("abc"):
        queue = opened("abc", rank=rank, world_size=3)
        await queue.ask(request(rank))
        assert queue.server(request(rank)) == first


@on_loop
async def test_the_longest_expected_goes_first_then_the_earliest() -> None:
    queue = opened("a", concurrency=1, samples=2)
    asked = [request(0), request(1), request(2, expected=70), request(3), request(4, expected=90)]
    await queue.ask(*asked)
    for number in (0, 4, 2, 1, 3):
        assert queue.order[-1] == (number, 0)
        await queue.end(asked[number])
    assert len(queue.order) == 5


@on_loop
async def test_a_servers_cache_bounds_what_is_under_way_and_one_request_always_goes() -> None:
    queue = opened("a", capacity=200, concurrency=64)
    asked = [request(i, expected=98) for i in range(4)]  # 100 tokens each
    await queue.ask(*asked)
    assert len(queue.order) == 2
    await queue.end(asked[0])
    assert len(queue.order) == 3
    queue = opened("a", capacity=10, concurrency=64)
    await queue.ask(*asked)
    assert len(queue.order) == 1


@on_loop
async def test_what_waits_for_a_lost_server_goes_to_another_and_fails_without_one() -> None:
    queue = opened("ab", concurrency=2, samples=2)
    group = [request(0, i) for i in range(4)]
    await queue.ask(*group)
    assert len(queue.order) == 2  # b is free, and has not the prompt
    queue.turns.lose(queue.turns.targets[0], "a fell silent")
    await settle()
    assert [queue.server(each) for each in group] == ["a", "a", "b", "b"]
    await queue.ask(request(1))
    queue.turns.lose(queue.turns.targets[1], "b fell silent")
    await settle()
    with pytest.raises(ServersLost, match="no fake server is left:\na fell silent\nb fell silent"):
        queue.tasks[request(1)].result()


@on_loop
async def test_the_probe_of_an_update_does_not_wait_for_what_runs_ahead() -> None:
    queue = opened("ab", concurrency=1, samples=2)
    await queue.ask(*(request(i, expected=50) for i in range(6)))
    assert len(queue.order) == 2
    probe = Request(0, 9, (1, 2), SAMPLING, at_once=True)
    await queue.ask(probe)
    assert queue.order[2:] == [(0, 9)]


@on_loop
async def test_a_cancelled_request_leaves_its_place_to_the_next() -> None:
    queue = opened("a", concurrency=1, samples=2)
    asked = [request(i) for i in range(3)]
    await queue.ask(*asked)
    queue.tasks[asked[1]].cancel()
    await settle()
    await queue.end(asked[0])
    assert queue.server(asked[2]) == "a" and queue.turns.targets[0].in_flight == 1


@on_loop
async def test_the_time_with_requests_is_told_once() -> None:
    queue = opened("ab", concurrency=2)
    await queue.ask(request(0), request(0, 1))
    await asyncio.sleep(0.02)
    first = queue.turns.take_busy()
    (stretch,) = first["http://a"]
    assert 0.02 <= stretch[1] - stretch[0] and first["http://b"] == []
    await queue.end(request(0))
    await queue.end(request(0, 1))
    ((start, end),) = queue.turns.take_busy()["http://a"]
    assert start == stretch[1] <= end and queue.turns.take_busy()["http://a"] == []


def test_cost_by_hand() -> None:
    # server a: from 10 to 14 by either rank or both, and 16 to 17; server b: never. Collected from 10 to 20
    costs = [
        Cost({"a": [(9.0, 12.0), (16.0, 17.0)], "b": []}, prompt_tokens=60, cached_tokens=20),
        Cost({"a": [(11.0, 14.0)], "b": []}, prompt_tokens=40, cached_tokens=30),
    ]
    assert busy_times(costs) == {"a": [(9.0, 14.0), (16.0, 17.0)], "b": []}
    groups = [Group(Prompt(0, (1,), "", ""), [], arrived=[*map(float, range(1, 10)), 18.0])]
    assert cost_metrics(costs, groups, 10.0, 20.0) == {
        "rollout/idle_seconds": ((10 - 5) + 10) / 2,
        "rollout/tail_seconds": 18.0 - 9.0,
        "rollout/prefix_hit_fraction": 0.5,
    }
    none: Any = [Cost(), Cost()]
    assert cost_metrics(none, groups, 10.0, 20.0) == {}
