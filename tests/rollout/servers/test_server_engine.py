"""The engine over servers, on servers that misbehave in ways no real one can be made to; the real ones are in
test_servers.py and test_server_faults.py."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_rl.config import parse_config
from megatron_rl.rollout.engine import EngineAborted, EngineError, Request, SamplingParams, ServersLost
from megatron_rl.rollout.servers.engine import ServerEngine
from megatron_rl.rollout.servers.http import Loop, ServerBusy, ServerFailed, ServerGone, ServerLost
from megatron_rl.rollout.servers.protocol import Completion
from tests.rollout.servers.servers_case import HF, lone_place
from tests.tiny import tiny_raw

STOP, LIMIT = 9, 6
MOE = {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
}
SAMPLING = SamplingParams(1.0, 1.0, 0, LIMIT, (STOP,), seed=1)


class Fake:
    """A dialect whose server at `url` answers a request with `script[url](request, count)`."""

    name = "fake"
    checksums_are_digests = False

    def __init__(self, script: dict[str, Callable[[Request, int], Any]]) -> None:
        self.script, self.seen, self.healthy, self.version = script, [], set(script), -1
        self.tokens = 10**6

    async def health(self, server: Any, seconds: float = 0.0) -> None:
        if server.url not in self.healthy:
            raise ServerGone("gone")

    async def generate(self, server: Any, request: Request, rid: str, *, seconds: float) -> Completion:
        self.seen.append((server.url, request, rid))
        await asyncio.sleep(0)
        answer = self.script[server.url](request, sum(url == server.url for url, *_ in self.seen))
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, float):
            await asyncio.sleep(answer)
            answer = whole(request, 0)
        return answer

    async def hf_config(self, server: Any) -> dict[str, Any]:
        return self.hf

    async def weight_version(self, server: Any) -> int:
        return self.version

    async def capacity(self, server: Any) -> int:
        return self.tokens

    async def end_update(self, server: Any, weight_version: int) -> None:
        self.version = weight_version

    def parameter_of(self, name: str) -> str:
        return name

    async def checksums(self, server: Any) -> Any:
        return [{"a": self.holds}]

    def __getattr__(self, name: str) -> Any:
        async def nothing(*_: Any) -> None:
            return None

        return nothing


def whole(request: Request, _: int) -> Completion:
    return Completion([1, 2, STOP], [-1.0, -2.0, -3.0], "stop", None)


@pytest.fixture
def engine_of(tmp_path: Any) -> Iterator[Callable[..., ServerEngine]]:
    engines = []

    def build(script: dict[str, Any], moe: bool = False, **server: Any) -> ServerEngine:
        from transformers import AutoConfig

        hf = HF | {"vocab_size": 10} | (MOE if moe else {})
        raw = tiny_raw(tmp_path, model={"hf_config": HF}, rollout={"engine": "sglang", "server": server})
        urls = list(script)
        fleet: Any = SimpleNamespace(
            config=parse_config(raw), place=lone_place(), urls=urls, failures=0, heal=lambda: None, close=lambda: None
        )
        channel: Any = SimpleNamespace(
            open=lambda servers: None,
            send=lambda stream, version: list(stream),
            close=lambda: None,
        )
        fake: Any = Fake(script)
        fake.hf = hf
        engine = ServerEngine(fake, Loop(), fleet, channel, AutoConfig.for_model(**hf))
        engine.update_weights([], 3)
        engines.append(engine)
        return engine

    yield build
    for engine in engines:
        engine.close()


def requests(count: int) -> list[Request]:
    return [Request(i, 0, (4, 5), SAMPLING) for i in range(count)]


def test_an_answer_becomes_a_rollout(engine_of: Any) -> None:
    (rollout,) = engine_of({"http://a": whole}).generate(requests(1))
    assert rollout.token_ids.tolist() == [4, 5, 1, 2, STOP] and rollout.sampled.tolist() == [0, 0, 1, 1, 1]
    assert rollout.rollout_logprobs.tolist() == [0, 0, -1, -2, -3] and rollout.finish_reason == "stop"
    assert (rollout.weight_version, rollout.spans) == (3, ((3, 3),))


def test_what_a_dead_server_had_goes_to_another_and_comes_once(engine_of: Any) -> None:
    engine = engine_of({"http://a": lambda *_: ServerLost("connection reset"), "http://b": whole})
    engine._dialect.healthy.discard("http://a")
    found = list(engine.stream(requests(8)))
    assert sorted(index for index, _ in found) == list(range(8))
    assert len({rid for *_, rid in engine._dialect.seen}) == len(engine._dialect.seen), "an id was used twice"


def test_without_a_living_server_the_rest_is_told_lost_after_what_came(engine_of: Any) -> None:
    def dies(request: Request, count: int) -> Any:
        if count > 3:
            engine._dialect.healthy.discard("http://a")
            return ServerLost("connection reset")
        return whole(request, count)

    engine = engine_of({"http://a": dies}, max_concurrency=1)
    came = []
    with pytest.raises(ServersLost, match="5 of 8 responses were lost"):
        for index, _ in engine.stream(requests(8)):
            came.append(index)
    assert len(came) == 3


def test_a_response_that_a_pause_cut_goes_on_from_its_tokens(engine_of: Any) -> None:
    def cut(request: Request, count: int) -> Completion:
        if count == 1:
            return Completion([1, 2], [-1.0, -2.0], "abort", None)
        assert request.token_ids == (4, 5, 1, 2) and request.sampling.max_response_tokens == LIMIT - 2
        assert request.sampling.seed != SAMPLING.seed
        return Completion([3, STOP], [-3.0, -4.0], "stop", ((4, 2),))

    (rollout,) = engine_of({"http://a": cut}).generate(requests(1))
    assert rollout.token_ids.tolist() == [4, 5, 1, 2, 3, STOP] and rollout.spans == ((3, 2), (4, 2))
    assert rollout.rollout_logprobs.tolist() == [0, 0, -1, -2, -3, -4] and rollout.weight_version == 3


def test_routes_are_those_of_the_last_part_or_the_answer_is_refused(engine_of: Any) -> None:
    """It fed the earlier part's tokens anew. Then 6 tokens with 2 layers and 2 experts a token, the last unrouted."""

    def cut(request: Request, count: int) -> Completion:
        if count == 1:
            return Completion([1, 2], [-1.0, -2.0], "abort", None, torch.tensor([3, 2] * 6, dtype=torch.int32))
        assert request.with_routes
        last = torch.tensor([0, 1, 1, 2] * 5, dtype=torch.int32)
        return Completion([3, STOP], [-3.0, -4.0], "stop", None, last if request.prompt_id else last[:-1])

    for prompt_id in (1, 0):
        engine = engine_of({"http://a": cut}, moe=True)
        wanted = Request(prompt_id, 0, (4, 5), SAMPLING, with_routes=True)
        if prompt_id:
            (rollout,) = engine.generate([wanted])
            assert rollout.routes.tolist() == [[[0, 1], [1, 2]]] * 5 + [[[255, 255]] * 2]
        else:
            with pytest.raises(EngineError, match="its routed experts are 19 numbers, expected 20: 5 tokens"):
                engine.generate([wanted])


def test_a_busy_and_a_failing_server_are_asked_again(engine_of: Any) -> None:
    faults = {1: ServerBusy("full", 503), 2: ServerFailed("oops", 500), 3: ServerLost("reset")}
    engine = engine_of({"http://a": lambda request, count: faults.get(count) or whole(request, count)})
    assert len(engine.generate(requests(1))) == 1 and len(engine._dialect.seen) == 4


def test_a_server_that_only_fails_is_given_up(engine_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_rl.rollout.servers.engine._BACKOFF_SECONDS", (0.001, 0.002))
    engine = engine_of({"http://a": lambda *_: ServerFailed("oops", 500)})
    with pytest.raises(EngineError, match="oops"):
        engine.generate(requests(1))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Completion([1, 2], [-1.0, -2.0], "stop", None), "none of the stop tokens"),
        (Completion([1, 2], [-1.0, -2.0], "length", None), "after 2 of 6 tokens"),
        (Completion([1, STOP], [-1.0], "stop", None), "2 tokens with 1 log-prob"),
        (Completion([], [], "stop", None), "0 tokens"),
        (Completion([1, STOP], [-1.0, float("nan")], "stop", None), "have diverged"),
        (Completion([1, STOP], [-1.0, -1.0], "stop", ((1, 1),)), "weight versions for 1"),
    ],
)
def test_an_answer_that_cannot_be_is_refused(engine_of: Any, answer: Completion, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        engine_of({"http://a": lambda *_: answer}).generate(requests(1))


def test_abort_ends_a_running_stream(engine_of: Any) -> None:
    engine = engine_of({"http://a": lambda *_: 60.0})
    threading.Timer(0.2, engine.abort).start()
    with pytest.raises(EngineAborted):
        engine.generate(requests(3))


def test_the_tokens_of_what_is_dropped_are_counted_those_that_came_and_those_that_were_begun(engine_of: Any) -> None:
    ended = threading.Event()

    def answers(request: Request, _: int) -> Completion | float:
        return dataclasses.replace(whole(request, 0), cached_tokens=1) if request.prompt_id == 0 else 60.0

    engine = engine_of({"http://a": answers})
    generate = engine._dialect.generate

    async def until_ended(*arguments: Any, **options: Any) -> Completion:
        answer = asyncio.ensure_future(generate(*arguments, **options))
        while not (answer.done() or ended.is_set()):
            await asyncio.sleep(0.01)
        return answer.result() if answer.done() else Completion([1, 2], [-1.0, -1.0], "abort", None)

    async def abort(server: Any, rid: str) -> None:
        ended.set()

    engine._dialect.generate, engine._dialect.abort = until_ended, abort
    stream = engine.open(lambda request, rollout: rollout)
    stream.add(requests(3))
    while stream._results.empty():
        time.sleep(0.01)
    assert not stream.is_idle()
    stream.drop()
    cost = stream.cost()
    assert stream.is_idle() and stream.take(0.0).finished == []
    # a response of three tokens that nobody took, and two tokens of each of two that were ended
    assert (cost.discarded_tokens, cost.prompt_tokens, cost.cached_tokens) == (3 + 2 * 2, 2, 1)
    assert stream.cost().discarded_tokens == 0


def test_weights_that_a_server_does_not_report_are_an_error(engine_of: Any) -> None:
    engine = engine_of({"http://a": whole})

    async def lie(server: Any) -> int:
        return 7

    engine._dialect.weight_version = lie
    with pytest.raises(EngineError, match="serves weight version 7, sent 4"):
        engine.update_weights([], 4)
    with pytest.raises(EngineError, match="its last update_weights failed"):
        engine.generate(requests(1))


def test_a_server_that_kept_its_weights_is_an_error(engine_of: Any) -> None:
    engine = engine_of({"http://a": whole})
    for version, holds in ((4, "x"), (5, "y")):
        engine._dialect.holds = holds
        engine.update_weights([("a", torch.tensor([float(version)]))], version)
    with pytest.raises(EngineError, match="http://a does not hold .*: a was sent anew, and is as before"):
        engine.update_weights([("a", torch.tensor([6.0]))], 6)
    with pytest.raises(EngineError, match="its last update_weights failed"):
        engine.generate(requests(1))
