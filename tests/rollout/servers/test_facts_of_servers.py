"""What both dialects read of a real server: the size of its cache and what was found in it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest

from megatron_rl.rollout.build import DIALECTS
from megatron_rl.rollout.engine import Request, SamplingParams
from megatron_rl.rollout.servers.http import Server
from tests.rollout.servers.servers_case import ENGINES, KV_TOKENS, serving

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_server_tells_its_cache_and_what_it_had_of_a_prompt(tmp_path: Path, engine: str) -> None:
    """The second time all of a prompt is in the cache but a rest that is no whole block, and after a flush nothing."""
    prompt = tuple(range(2, 12)) * 30
    wanted = Request(0, 0, prompt, SamplingParams(1.0, 1.0, 0, 4, (), seed=0))
    dialect = DIALECTS[engine]()

    async def ask(url: str) -> tuple[int, list[int]]:
        async with aiohttp.ClientSession() as session:
            server = Server(url, session)
            cached = [await dialect.generate(server, wanted, f"a{i}", seconds=60) for i in range(2)]
            await dialect.flush(server)
            cached.append(await dialect.generate(server, wanted, "b", seconds=60))
            return await dialect.capacity(server), [answer.cached_tokens for answer in cached]

    with serving(engine, tmp_path) as (_, url):
        capacity, (first, second, flushed) = asyncio.run(ask(url))
    # vLLM: of requests of 400 tokens, which take 4 blocks of 128
    assert capacity == (KV_TOKENS if engine == "sglang" else KV_TOKENS // 512 * 400)
    assert first == flushed == 0 and len(prompt) - 128 <= second < len(prompt)
