"""Routing replay with a real server: the experts that it reports are those of transformers with the same weights, and a
run trains on them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_rl.config import parse_config
from megatron_rl.models.expert_routes import server_routes
from megatron_rl.rollout.engine import Request, SamplingParams
from megatron_rl.rollout.servers.sglang import SGLang
from tests.rollout.servers.servers_case import HF, python_of, serving
from tests.rollout.servers.test_sglang_server import Served, load
from tests.tiny import tiny_raw
from tests.worlds import Worlds

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]
MOE: dict[str, Any] = HF | {
    "model_type": "qwen3_moe",
    "head_dim": 32,
    "num_hidden_layers": 3,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}


def _steps(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """Per step of a run that starts its own server: (token, layer) pairs whose reported experts, as a set, are not
    transformers', all pairs, and the largest difference of log-probabilities."""
    from megatron_rl import train
    from megatron_rl.convert.hf import hub_views
    from megatron_rl.metrics.write import RunLogger
    from megatron_rl.parallel.groups import init_groups
    from tests.worlds import leave_layout

    config, found, collected = parse_config(raw), [], []
    run = train.set_up(config, init_groups(config.parallel, config.seed))
    collect = run.collector.collect
    run.collector.collect = lambda step: collected.append(collect(step)) or collected[-1]  # type: ignore[func-returns-value]
    with RunLogger(config.run_dir, config, rank=0, start_step=0) as logger:
        for step in range(config.train.num_steps):
            model, seen = AutoModelForCausalLM.from_config(run.policy.hf_config, dtype=torch.float32).eval(), []
            views = hub_views(dict(model.named_parameters()))
            with torch.no_grad():
                for name, tensor in run.policy.hf_weights():
                    views[name].copy_(tensor)
            for layer in model.model.layers:
                layer.mlp.gate.register_forward_hook(lambda gate, inputs, output, seen=seen: seen.append(output[2]))
            metrics = train.run_step(run, step, logger)
            other = total = 0
            for rollout in collected[-1].rollouts:
                seen.clear()
                with torch.no_grad():
                    model(rollout.token_ids[None])
                expected = torch.stack(seen, dim=1)[:-1].sort(-1).values
                differ = (rollout.routes[:-1].long().sort(-1).values != expected).any(-1)
                other, total = other + int(differ.sum()), total + differ.numel()
            found.append({"other": other, "total": total, "mismatch": metrics["mismatch/abs_max"]})
    run.close()
    leave_layout()
    return found


def test_a_run_replays_what_its_server_reports(worlds: Worlds, tmp_path: Path) -> None:
    python_of("sglang")
    rollout = {"engine": "sglang", "routing_replay": True}
    raw = tiny_raw(
        tmp_path, "replay", model={"hf_config": MOE}, parallel={"tp": 1}, rollout=rollout, optimizer={"lr": 1e-2}
    )
    ((first, second),) = worlds.run(1, _steps, raw, timeout=600)
    for step in (first, second):  # near a tie rounding may decide
        assert step["total"] > 500 and step["other"] <= 0.002 * step["total"]
        assert step["mismatch"] < 1e-4


def test_a_response_that_an_update_interrupted_has_the_routes_of_its_last_weights(tmp_path: Path) -> None:
    """SGLang feeds all of its tokens anew, prompt included."""
    dialect, prompt = SGLang(), (5, 9, 2, 11, 7)
    with serving("sglang", tmp_path, with_routes=True, tied=False, **MOE) as (process, url):
        config, models = AutoConfig.from_pretrained(tmp_path / "served"), []
        for seed in range(2):
            torch.manual_seed(seed)
            models.append(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
        served = Served(process, url, tmp_path, models)
        wanted = Request(0, 0, prompt, SamplingParams(0.0, 1.0, 0, 390, (), seed=0), with_routes=True)

        async def interrupted(server: Any) -> Any:
            await load(served, server, 0)
            running = asyncio.create_task(dialect.generate(server, wanted, "r", seconds=60))
            await asyncio.sleep(0.3)
            await load(served, server, 1)
            return await running

        answer = served.run(interrupted)
    (old, before), (new, after) = answer.spans
    assert (old, new) == (0, 1) and before > 0 and after > 0
    routes = server_routes(answer.routes, len(prompt) + 390, config)[:-1].sort(-1).values
    shares = []
    for model in models:
        seen: list[torch.Tensor] = []
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(lambda gate, inputs, output, seen=seen: seen.append(output[2]))
        with torch.no_grad():
            model(torch.tensor([[*prompt, *answer.token_ids]]))
        expected = torch.stack(seen, dim=1)[:-1].sort(-1).values
        shares.append(float((routes == expected).all(-1).float().mean()))
    assert shares[1] > 0.998 and shares[0] < 0.5, shares
