"""The same tokens in every run: seeded requests on a real vLLM server, in whatever company they are computed."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import aiohttp
import pytest

from megatron_rl.rollout.engine import Request, SamplingParams
from megatron_rl.rollout.servers.http import Server
from megatron_rl.rollout.servers.protocol import Completion
from megatron_rl.rollout.servers.vllm import VLLM
from tests.rollout.servers.servers_case import serving

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]
COUNT, LENGTH = 32, 40


def requests() -> list[Request]:
    """Prompts of 5 to 320 tokens, more together than vLLM computes at once; four samples of each."""
    draw = random.Random(1)
    prompts = [tuple(draw.randrange(2, 12) for _ in range(5 + 45 * i)) for i in range(COUNT // 4)]
    sampling = SamplingParams(1.0, 1.0, 0, LENGTH, (), seed=7)
    return [Request(i // 4, i % 4, prompts[i // 4], sampling) for i in range(COUNT)]


def test_tokens_depend_on_the_seed_and_not_on_company_order_or_interruption(tmp_path: Path) -> None:
    seeded, free = VLLM(), VLLM()
    seeded.seeded = True
    wanted = requests()

    async def ask(server: Server, dialect: VLLM, order: list[int], at_once: int, name: str) -> list[list[int]]:
        room, answers = asyncio.Semaphore(at_once), dict[int, Completion]()

        async def one(index: int) -> None:
            async with room:
                answers[index] = await dialect.generate(server, wanted[index], f"{name}-{index}", seconds=120)

        await asyncio.gather(*map(one, order))
        return [answers[index].token_ids for index in range(COUNT)]

    async def ask_and_interrupt(server: Server, order: list[int]) -> list[list[int]]:
        asking, times = asyncio.create_task(ask(server, seeded, order, COUNT, "stopped")), 0
        while not (await asyncio.wait([asking], timeout=0.1))[0]:
            await seeded.pause(server)
            await seeded.flush(server)
            await seeded.resume(server)
            times += 1
        assert times > 1, "nothing was interrupted"
        return asking.result()

    async def main(url: str) -> list[list[list[int]]]:
        async with aiohttp.ClientSession() as session:
            server, order = Server(url, session), list(range(COUNT))
            together = await ask(server, seeded, order, COUNT, "together")
            await seeded.flush(server)
            apart = await ask(server, seeded, order[::-1], 3, "apart")
            stopped = await ask_and_interrupt(server, order)
            return [together, apart, stopped, await ask(server, free, order, COUNT, "free")]

    with serving("vllm", tmp_path, deterministic=True) as (process, url):
        together, apart, stopped, unseeded = asyncio.run(main(url))
        assert process.alive(), process.obituary()
    assert together == apart == stopped
    assert len({tuple(tokens) for tokens in together}) == COUNT, "samples of one prompt are copies of each other"
    assert sum(one != other for one, other in zip(together, unseeded, strict=True)) > COUNT // 2
