"""A real server loads what a run exports, from the folder alone, and is the policy."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rl.rollout.build import DIALECTS
from megatron_rl.rollout.engine import Request, SamplingParams
from megatron_rl.rollout.servers.http import Server
from tests.rollout.servers.servers_case import ENGINES, HF, python_of, started
from tests.tiny import tiny_raw, train_each
from tests.worlds import Worlds

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]
PROMPT, COUNT = (5, 9, 2, 11, 7), 12


@pytest.mark.parametrize("engine", ENGINES)
def test_a_server_loads_the_export_of_a_trained_run(engine: str, worlds: Worlds, tmp_path: Path) -> None:
    python_of(engine)  # skips without the engine
    hf = HF | {"tie_word_embeddings": False}
    raw = tiny_raw(tmp_path, "exported", model={"hf_config": hf}, parallel={"tp": 2}, optimizer={"lr": 1e-2})
    raw["train"] |= {"num_steps": 1, "save_hf": True}
    weights = worlds.run(2, train_each, [raw])[0][0]
    export = tmp_path / "exported" / "hf"
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
    with started(engine, export, tmp_path, own_weights=True) as (_, url):
        completion = asyncio.run(_ask(engine, url))
    tokens = list(completion.token_ids)
    with torch.no_grad():
        logits = model(torch.tensor([[*PROMPT, *tokens]])).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    assert len(tokens) == COUNT and logits.argmax(-1).tolist() == tokens
    expected = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-4)


async def _ask(engine: str, url: str) -> Any:
    sampling = SamplingParams(0.0, 1.0, 0, COUNT, (), seed=0)
    async with aiohttp.ClientSession() as session:
        return await DIALECTS[engine]().generate(Server(url, session), Request(0, 0, PROMPT, sampling), "r", seconds=60)
