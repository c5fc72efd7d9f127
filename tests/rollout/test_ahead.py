"""Rollouts ahead of the training: with real servers, whose weights change while responses are under way."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_rl.config import parse_config
from tests.rollout.servers.servers_case import ENGINES, python_of, raw_of, rows, score
from tests.worlds import Worlds, leave_layout

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]
STEPS = 5


def _train_ahead(raw: dict[str, Any]) -> dict[str, Any]:
    """Every token's log-probability under the weights that its span names, against the engine's report."""
    from megatron_rl import train
    from megatron_rl.parallel.groups import init_groups
    from megatron_rl.rollout.collect import Collector
    from megatron_rl.rollout.served import Served

    config, weights, rollouts, prompts = parse_config(raw), {}, [], []
    sync, collect, go_ahead = Served.sync, Collector.collect, Collector.go_ahead
    put_off, seconds = list[tuple[Collector, int]](), list[float]()

    def keep_weights(served: Any) -> None:
        policy = served._weights
        weights[served.weight_version] = {name: tensor.clone() for name, tensor in policy.hf_weights()}
        weights["config"] = policy.hf_config
        if put_off:
            # As if training had taken a part of the time that responses take: the update meets them half-way, however
            # long either takes on this machine at this moment.
            go_ahead(*put_off.pop())
            time.sleep(0.1 * seconds[0])
        sync(served)

    def note(collector: Any, step: int) -> Any:
        began = time.monotonic()
        result = collect(collector, step)
        seconds.append(time.monotonic() - began)
        rollouts.append(result.rollouts)
        prompts.append([rollout.prompt_id for rollout in result.rollouts])
        return result

    try:
        with (
            mock.patch.object(Served, "sync", keep_weights),
            mock.patch.object(Collector, "collect", note),
            mock.patch.object(Collector, "go_ahead", lambda collector, step: put_off.append((collector, step))),
        ):
            train.train(config, init_groups(config.parallel, config.seed))
    finally:
        leave_layout()
    worst, stale, spans = 0.0, 0.0, []
    for step, of_step in enumerate(rollouts):
        for rollout in (r for r in of_step[::4] if r.has_tokens):
            response = int(rollout.sampled.sum())
            assert sum(count for _, count in rollout.spans) == response
            spans.append((step, rollout.spans))
            reported, start = rollout.rollout_logprobs[rollout.sampled], 0
            for version, count in rollout.spans:
                mine = score(weights["config"], weights[version], rollout.token_ids.tolist())[-response:]
                worst = max(worst, float((mine - reported)[start : start + count].abs().max()))
                other = weights.get(version + 1)
                if other is not None:
                    theirs = score(weights["config"], other, rollout.token_ids.tolist())[-response:]
                    stale = max(stale, float((theirs - reported)[start : start + count].abs().max()))
                start += count
    ids = [[(r.prompt_id, r.sample_index) for r in of_step] for of_step in rollouts]
    return {"worst": worst, "stale": stale, "spans": spans, "ids": ids, "prompts": prompts}


@pytest.mark.parametrize("max_staleness", [1, 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_token_names_the_weights_that_made_it(
    worlds: Worlds, tmp_path: Path, engine: str, max_staleness: int
) -> None:
    python_of(engine)
    raw = raw_of(
        tmp_path,
        "ahead",
        engine,
        rollout={
            "samples_per_prompt": 4,
            "max_response_tokens": 900,
            "stop_token_ids": [],
            "max_staleness": max_staleness,
        },
        loss={"type": "ppo_clip", "rollout_correction": {"cap": 2.0}},
        train={"num_steps": STEPS, "prompts_per_step": 4, "prompts_per_minibatch": 2, "micro_batch_tokens": 4096},
    )
    raw["model"]["hf_config"]["max_position_embeddings"] = 1024
    for rank in worlds.run(2, _train_ahead, raw, timeout=500):
        assert rank["worst"] < 1e-4, "a span names other weights than those that sampled it"
        assert rank["stale"] > 1e-2, "versions are too alike for the test to tell"
        for step, spans in rank["spans"]:
            versions = [version for version, _ in spans]
            assert versions == sorted(set(versions)) and step - max_staleness <= versions[0] and versions[-1] <= step
        assert any(len(spans) > 1 for _, spans in rank["spans"]), "no update met a response half-way"
        assert all(len(set(ids)) == len(ids) == 16 for ids in rank["ids"])
        drawn = [prompt for of_step in rank["prompts"] for prompt in dict.fromkeys(of_step)]
        assert len(set(drawn)) == len(drawn) == 4 * STEPS  # one epoch has 64: none twice, none of the pipeline lost
    found = rows(tmp_path / "ahead")
    assert found[0]["staleness/max"] == 0 and 0 < max(row["staleness/max"] for row in found) <= max_staleness
    assert all(row["loss/is_weight"] > 0 for row in found)
    assert torch.tensor([row["staleness/interrupted_fraction"] for row in found]).max() > 0
