"""The SGLang dialect against a real server: what each call does there, compared with transformers."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_rl.parallel.engine_group import broadcast_bucket, join_engine_group, leave_engine_group
from megatron_rl.rollout.engine import EngineError, Request, SamplingParams
from megatron_rl.rollout.servers.http import Server, ServerLost, ServerRefused
from megatron_rl.rollout.servers.processes import EngineProcess, free_port
from megatron_rl.rollout.servers.protocol import Completion
from megatron_rl.rollout.servers.sglang import SGLang
from megatron_rl.rollout.servers.weight_sync import Buffers, pack_buckets, share
from tests.rollout.servers.servers_case import serving

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]
CONTEXT = 400  # of `serving`
PROMPT = (5, 9, 2, 11, 7)
BUCKET_BYTES = 100_000  # several buckets for the tiny model
DIALECT = SGLang()


@dataclass
class Served:
    """A live server, and models that it can be given."""

    process: EngineProcess
    url: str
    folder: Path
    models: list[Any]  # random weights of the served architecture
    version: int = -1  # of the last update

    def run(self, body: Callable[[Server], Coroutine[Any, Any, Any]]) -> Any:
        async def main() -> Any:
            async with aiohttp.ClientSession() as session:
                return await body(Server(self.url, session))

        return asyncio.run(main())

    def score(self, which: int, tokens: list[int], temperature: float = 1.0) -> Tensor:
        """log pi of every token but the first."""
        with torch.no_grad():
            logits = self.models[which](torch.tensor([tokens])).logits[0, :-1] / temperature
        return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]

    def greedy(self, which: int, prompt: tuple[int, ...], count: int) -> list[int]:
        tokens = list(prompt)
        with torch.no_grad():
            for _ in range(count):
                tokens.append(int(self.models[which](torch.tensor([tokens])).logits[0, -1].argmax()))
        return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("sglang")
    with serving("sglang", folder, tied=False) as (process, url):
        config, models = AutoConfig.from_pretrained(folder / "served"), []
        for seed in range(2):
            torch.manual_seed(seed)
            models.append(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
        it = Served(process, url, folder, models)
        it.run(lambda server: load(it, server, 0))
        yield it


def request(count: int, prompt: tuple[int, ...] = PROMPT, stop: tuple[int, ...] = (), **sampling: Any) -> Request:
    options = {"temperature": 0.0, "top_p": 1.0, "top_k": 0} | sampling
    return Request(0, 0, prompt, SamplingParams(**options, max_response_tokens=count, stop_token_ids=stop, seed=0))


async def ask(server: Server, wanted: Request, rid: str = "r") -> Completion:
    return await DIALECT.generate(server, wanted, rid, seconds=60)


# --- the ways of the weights ------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def updating(it: Served, server: Server, *, session: bool) -> Any:
    """The order of calls that `Dialect` prescribes."""
    it.version += 1
    await DIALECT.pause(server)
    await DIALECT.flush(server)
    if session:
        await DIALECT.begin_update(server)
    yield it.version
    if session:
        await DIALECT.end_update(server, it.version)
    await DIALECT.flush(server)
    await DIALECT.resume(server)


async def load(it: Served, server: Server, which: int) -> None:
    """A folder that is gone afterwards."""
    async with updating(it, server, session=False) as version:
        it.models[which].save_pretrained(it.folder / "update")
        await DIALECT.load_folder(server, it.folder / "update", version)
        shutil.rmtree(it.folder / "update")


def buckets(model: Any) -> Iterator[Any]:
    weights = dict(model.named_parameters())
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    return pack_buckets(weights.items(), shapes, Buffers(shapes, BUCKET_BYTES, 4))


async def share_with(it: Served, server: Server, which: int) -> None:
    async with updating(it, server, session=True):
        for manifest, flat in buckets(it.models[which]):
            await DIALECT.receive_shared(server, manifest, [share(DIALECT.shared_object(manifest, flat))])


async def broadcast(it: Served, server: Server, which: int) -> None:
    port, name = free_port(), f"group{it.version}"
    loop, thread = asyncio.get_running_loop(), ThreadPoolExecutor(1)
    options = {"world_size": 2, "name": name, "backend": "gloo"}
    joined = loop.run_in_executor(thread, lambda: join_engine_group("127.0.0.1", port, seconds=60, **options))
    await DIALECT.open_group(server, host="127.0.0.1", port=port, rank_offset=1, **options)
    group, count = await joined, 0
    async with updating(it, server, session=True):
        for manifest, flat in buckets(it.models[which]):
            sent = loop.run_in_executor(thread, broadcast_bucket, flat, group)
            await asyncio.gather(sent, DIALECT.receive_broadcast(server, manifest, name))
            count += 1
    assert count > 1, "one bucket proves nothing about several"
    await DIALECT.close_group(server, name)
    await loop.run_in_executor(thread, leave_engine_group, group)


@pytest.mark.parametrize("way", [load, share_with, broadcast])
def test_each_way_brings_exactly_the_weights(served: Served, way: Any) -> None:
    async def body(server: Server) -> None:
        for which in (1, 0):
            await way(served, server, which)
            got = await ask(server, request(16))
            assert got.token_ids == served.greedy(which, PROMPT, 16)
            expected = served.score(which, [*PROMPT, *got.token_ids])[-16:]
            torch.testing.assert_close(torch.tensor(got.logprobs), expected, atol=1e-4, rtol=0)
            assert got.finish_reason == "length" and got.spans == ((served.version, 16),)
            assert await DIALECT.weight_version(server) == served.version

    served.run(body)


def test_a_request_in_flight_survives_an_update_and_says_which_weights_made_which_token(served: Served) -> None:
    """No key-value entry of the old weights may serve the new ones: the tokens after the update are those of a model
    that reads the whole sequence with its own weights."""

    async def body(server: Server) -> None:
        await load(served, server, 0)
        running = asyncio.create_task(ask(server, request(CONTEXT - len(PROMPT))))
        await asyncio.sleep(0.3)
        await share_with(served, server, 1)
        got = await running
        (old, before), (new, after) = got.spans or ()
        assert (old, new) == (served.version - 1, served.version) and before + after == CONTEXT - len(PROMPT)
        assert got.token_ids[:before] == served.greedy(0, PROMPT, before)
        prefix = (*PROMPT, *got.token_ids[:before])
        assert got.token_ids[before : before + 16] == served.greedy(1, prefix, min(after, 16))
        tokens = [*PROMPT, *got.token_ids]
        expected = [served.score(0, tokens)[-len(got.token_ids) :][:before], served.score(1, tokens)[-after:]]
        torch.testing.assert_close(torch.tensor(got.logprobs), torch.cat(expected), atol=1e-4, rtol=0)

    served.run(body)


def test_what_the_server_refuses_is_an_error_and_leaves_the_weights(served: Served) -> None:
    async def body(server: Server) -> None:
        await load(served, server, 0)
        manifest, flat = next(buckets(served.models[1]))
        with pytest.raises(EngineError, match="begin_weight_update"):
            await DIALECT.receive_shared(server, manifest, [share(DIALECT.shared_object(manifest, flat))])
        with pytest.raises(EngineError, match="no weight-update session"):
            await DIALECT.end_update(server, 99)
        with pytest.raises(EngineError):
            await DIALECT.load_folder(server, served.folder / "nothing", 99)
        with pytest.raises(ServerRefused, match="400"):
            await ask(server, request(1, prompt=()))
        got = await ask(server, request(8))
        assert got.token_ids == served.greedy(0, PROMPT, 8) and got.spans == ((served.version, 8),)

    served.run(body)


# --- generation -------------------------------------------------------------------------------------------------------


def test_logprobs_are_those_of_the_temperature_before_top_k(served: Served) -> None:
    async def body(server: Server) -> None:
        await load(served, server, 0)
        got = await ask(server, request(24, temperature=0.6, top_k=3, top_p=0.9))
        expected = served.score(0, [*PROMPT, *got.token_ids], temperature=0.6)[-24:]
        torch.testing.assert_close(torch.tensor(got.logprobs), expected, atol=1e-4, rtol=0)

    served.run(body)


def test_a_stop_token_ends_the_response_and_belongs_to_it(served: Served) -> None:
    async def body(server: Server) -> None:
        await load(served, server, 0)
        free = served.greedy(0, PROMPT, 12)
        stop = free[7]
        got = await ask(server, request(12, stop=(stop,)))
        assert got.finish_reason == "stop" and got.token_ids == free[: free.index(stop) + 1]
        assert len(got.logprobs) == len(got.token_ids) and got.spans == ((served.version, len(got.token_ids)),)

    served.run(body)


def test_the_context_takes_the_longest_sequence_whole(served: Served) -> None:
    """SGLang keeps some positions for itself, and ends a response early for them without a word."""

    async def body(server: Server) -> None:
        for prompt in (1, CONTEXT // 2, CONTEXT - 1):
            got = await ask(server, request(CONTEXT - prompt, prompt=(3,) * prompt))
            assert len(got.token_ids) == CONTEXT - prompt
        with pytest.raises(EngineError, match=r"--context-length 4\d\d"):
            await ask(server, request(CONTEXT + 3, prompt=(3,) * 5))

    served.run(body)


def test_abort_ends_the_one_request_with_what_it_has(served: Served) -> None:
    async def body(server: Server) -> None:
        wanted = request(350)
        one, other = (asyncio.create_task(ask(server, wanted, rid)) for rid in ("7-1", "7-10"))
        await asyncio.sleep(0.3)
        await DIALECT.abort(server, "7-1")
        await DIALECT.abort(server, "7")
        await DIALECT.abort(server, "unknown")
        cut, whole = await one, await other
        assert cut.finish_reason == "abort" and 0 < len(cut.token_ids) < 350
        assert whole.finish_reason == "length" and whole.token_ids[: len(cut.token_ids)] == cut.token_ids
        assert cut.spans == ((served.version, len(cut.token_ids)),) and len(cut.logprobs) == len(cut.token_ids)

    served.run(body)


# --- control ----------------------------------------------------------------------------------------------------------


def test_a_paused_server_is_healthy_and_flushes(served: Served) -> None:
    async def body(server: Server) -> None:
        await load(served, server, 0)
        running = asyncio.create_task(ask(server, request(350)))
        await asyncio.sleep(0.3)
        with pytest.raises(ServerRefused, match="400"):
            await DIALECT.flush(server)  # not paused: the request holds entries
        await DIALECT.pause(server)
        began = time.monotonic()
        await DIALECT.health(server)
        await DIALECT.flush(server)
        assert time.monotonic() - began < 5 and not running.done()
        await DIALECT.resume(server)
        assert (await running).token_ids == served.greedy(0, PROMPT, 350)

    served.run(body)


def test_sleep_waits_for_requests_and_wake_serves_again(served: Served) -> None:
    async def body(server: Server) -> None:
        running = asyncio.create_task(ask(server, request(350)))
        await asyncio.sleep(0.2)
        await DIALECT.sleep(server)
        assert len((await asyncio.wait_for(running, 5)).token_ids) == 350
        await DIALECT.wake(server)
        await load(served, server, 1)
        assert (await ask(server, request(8))).token_ids == served.greedy(1, PROMPT, 8)

    served.run(body)


def test_the_server_tells_its_model_and_its_workers(served: Served) -> None:
    async def body(server: Server) -> None:
        await load(served, server, 0)
        assert (await DIALECT.hf_config(server))["hidden_size"] == served.models[0].config.hidden_size
        assert await DIALECT.num_workers(server) == 1

    served.run(body)


# --- its end: this test stays last, because the module's server dies in it --------------------------------------------


def test_a_dead_worker_ends_the_server_and_stop_leaves_no_process(served: Served) -> None:
    family = psutil.Process(served.process._process.pid).children(recursive=True)
    scheduler = next(process for process in family if "scheduler" in " ".join(process.cmdline()))

    async def body(server: Server) -> None:
        running = asyncio.create_task(ask(server, request(350)))
        await asyncio.sleep(0.2)
        scheduler.kill()
        with pytest.raises(ServerLost):
            await running
        deadline = time.monotonic() + 60
        while served.process.alive():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.2)
        with pytest.raises(ServerLost):
            await DIALECT.health(server)

    served.run(body)
    assert "scheduler" in served.process.obituary() and "killed by SIG" in served.process.obituary()
    served.process.stop()
    # a zombie only waits for init to read its exit code
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
