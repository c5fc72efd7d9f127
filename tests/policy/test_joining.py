"""Statistics of several mini-batches at once are those of each alone, from fewer forward passes."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rl.joining import joined, parted, runs_within
from megatron_rl.packing import pack
from megatron_rl.types import Rollout, TokenStats
from tests.policy.tiny import hf_model, make_advantages, make_config, policy_of, save
from tests.worlds import Worlds

SHARED, WHOLE = {"share_prompts": True}, {"share_prompts": False}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {  # layout, train options, whether passes are joined
    "shared": ({}, SHARED, True),
    "whole": ({}, WHOLE, True),
    "tp2_sp": ({"tp": 2, "sp": True}, SHARED, True),  # micro-batches with padding
    "cp2": ({"cp": 2}, WHOLE, True),
    "pp2": ({"pp": 2}, SHARED, False),
}


def _groups() -> list[Rollout]:
    """8 prompts of 1 to 8 tokens with 4 samples of 1 to 16 each."""
    generator = torch.Generator().manual_seed(3)
    rollouts = []
    for group in range(8):
        prompt = torch.randint(37, (int(torch.randint(1, 9, (), generator=generator)),), generator=generator)
        for sample in range(4):
            length = int(torch.randint(1, 17, (), generator=generator))
            tokens = torch.cat([prompt, torch.randint(37, (length,), generator=generator)])
            mask = torch.arange(len(tokens)) >= len(prompt)
            rollouts.append(Rollout(group, sample, tokens, torch.zeros(len(tokens)), mask, "stop", 0))
    return rollouts


def _both_ways(folder: Path, parallel: dict[str, Any], train: dict[str, Any]) -> tuple[list[Any], list[Any], list[int]]:
    """Statistics mini-batch by mini-batch, all at once, and how many micro-batches each forward pass computed."""
    from megatron_rl.parallel.groups import packing_options
    from megatron_rl.policy import policy as module

    packed, policys = (
        make_config(folder, parallel=parallel, train=train | {"micro_batch_tokens": tokens}) for tokens in (40, 150)
    )
    passes: list[int] = []
    run_schedule = module.run_schedule

    def counting(model: Any, mini_batch: Any, *arguments: Any, **options: Any) -> Any:
        passes.append(len(mini_batch.micro_batches))
        return run_schedule(model, mini_batch, *arguments, **options)

    with policy_of(policys) as policy:
        batch = pack(_groups(), make_advantages(), packed, step=0, **packing_options(policy.groups, packed.parallel))
        alone = [policy.stats(mini_batch, with_sum_p2=True) for mini_batch in batch.mini_batches]
        policy.keep_reference()
        module.run_schedule = counting
        try:
            together = policy.stats_of(batch.mini_batches, with_sum_p2=True)
            reference = policy.ref_logprobs(batch.mini_batches)
        finally:
            module.run_schedule = run_schedule
    logprobs = [[stats.logprobs for stats in of_mini_batch] for of_mini_batch in together]
    torch.testing.assert_close(reference, logprobs, rtol=0, atol=0)
    return [_values(s) for m in alone for s in m], [_values(s) for m in together for s in m], passes


def _values(stats: TokenStats) -> torch.Tensor:
    assert stats.sum_p2 is not None and stats.sum_p2_logp is not None
    return torch.stack([stats.logprobs, stats.entropy, stats.sum_p2, stats.sum_p2_logp])


@pytest.mark.parametrize("case", CASES)
def test_together_equals_alone(worlds: Worlds, tmp_path: Path, case: str) -> None:
    parallel, train, joins = CASES[case]
    folder = save(hf_model(), tmp_path / "model")
    size = math.prod(parallel.get(way, 1) for way in ("tp", "pp", "cp"))
    for alone, together, passes in worlds.run(size, _both_ways, folder, parallel, train):
        assert len(alone) == len(together) >= 8
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)
        assert passes[0] < len(alone) / 2 if joins else sum(passes[:4]) == len(alone)


def test_joined_fields_are_the_parts_one_behind_the_other() -> None:
    config = make_config(None, train={"micro_batch_tokens": 40, "share_prompts": True})
    batch = pack(_groups(), make_advantages(), config, step=0, dp_rank=0, dp_size=1)
    parts = [micro_batch for mini_batch in batch.mini_batches for micro_batch in mini_batch.micro_batches]
    runs = runs_within(parts, 100)
    assert [part for run in runs for part in run] == parts
    lengths = [[part.model_inputs().token_ids.numel() for part in run] for run in runs]
    assert all(sum(run) <= 100 for run in lengths)
    assert all(sum(a) + b[0] > 100 for a, b in pairwise(lengths))  # none could have taken one more
    assert runs_within(parts, 1) == [[part] for part in parts] and joined(parts[:1]) is parts[0]
    whole = joined(parts)
    inputs = whole.model_inputs()
    assert whole.old_logprobs is None and inputs.rows is not None and inputs.prefixes is not None
    # what the model computes for position t is still t's own token at its own place
    assert torch.equal(inputs.token_ids[inputs.rows], whole.token_ids)
    assert torch.equal(inputs.position_ids[inputs.rows], whole.position_ids)
    starts, ends = inputs.cu_seqlens[:-1], inputs.cu_seqlens[1:]
    behind = inputs.prefixes >= 0
    before = inputs.prefixes[behind]
    # a sequence goes on where its prefix ends
    assert torch.equal(inputs.position_ids[starts[behind]], (ends - starts)[before].long())
    assert int(whole.cu_seqlens[-1]) == len(whole.token_ids) and bool((whole.cu_seqlens.diff() > 0).all())
    back = parted(TokenStats(whole.advantages, whole.rollout_logprobs), parts)
    assert all(
        torch.equal(s.logprobs, part.advantages) and s.sum_p2 is None for s, part in zip(back, parts, strict=True)
    )


def test_those_with_routes_stay_apart() -> None:
    config = make_config(None, train={"micro_batch_tokens": 40, "share_prompts": False})
    mini_batch = pack(_groups(), make_advantages(), config, step=0, dp_rank=0, dp_size=1).mini_batches[0]
    plain = mini_batch.micro_batches[:2]
    routed = [part.replace(routes=torch.zeros(len(part.token_ids), 1, 2, dtype=torch.uint8)) for part in plain]
    assert [len(run) for run in runs_within([*plain, *routed], 1000)] == [2, 2]
    routes = joined(routed).routes
    assert routes is not None and len(routes) == sum(len(part.token_ids) for part in routed)
