"""A step of more tokens on as many more ranks brings each rank no more bytes, and the micro-batches of one process."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_rl.data.cursor import PromptCursor
from megatron_rl.grading.verdict import InProcess
from megatron_rl.packing import Layout, pack
from megatron_rl.packing.dealing import deal_step, hand_out
from megatron_rl.parallel import reduce
from megatron_rl.parallel.reduce import Reducer
from megatron_rl.rollout.collect import Collector
from megatron_rl.rollout.engine import Place
from megatron_rl.types import Rollout
from tests.rollout.test_collect import FakeEngine, Tokenizer, make_config, no_revival, odd_prompts_learn, prompts
from tests.worlds import Worlds

LENGTH = 2000  # of the longest response


class LongEngine(FakeEngine):
    """As FakeEngine, but with responses of some length, a function of prompt and sample as everything of theirs."""

    def answer(self, r: Any) -> Rollout:
        short, more = super().answer(r), LENGTH * (5 + (r.prompt_id * 3 + r.sample_index) % 5) // 10
        draw = torch.Generator().manual_seed(100 * r.prompt_id + r.sample_index)
        tokens = torch.cat([short.token_ids, torch.randint(9, 99, (more,), generator=draw)])
        logprobs = torch.cat([short.rollout_logprobs, -torch.rand(more, generator=draw)])
        return short.replace(token_ids=tokens, rollout_logprobs=logprobs, sampled=torch.arange(len(tokens)) >= 2)


def _step(num_prompts: int, share_prompts: bool) -> tuple[int, bool]:
    """The bytes that this rank received in collecting and packing a step; whether its micro-batches are those that it
    packs when it has sampled everything itself."""
    train = {"micro_batch_tokens": 3 * LENGTH, "share_prompts": share_prompts}
    train |= {"prompts_per_step": num_prompts, "prompts_per_minibatch": num_prompts // 2}
    rollout = {"samples_per_prompt": 2, "max_response_tokens": LENGTH + 3}
    config = make_config(train=train, rollout=rollout)
    world, rank, received = Reducer(dist.group.WORLD), dist.get_rank(), [0]

    def collected(place: Place) -> list[Rollout]:
        cursor = PromptCursor(prompts(num_prompts), 3)
        engine, grader = LongEngine(), InProcess([odd_prompts_learn])
        collector = Collector(lambda: engine, cursor, grader, Tokenizer(), config, place, no_revival)
        return collector.collect(0).rollouts

    def counted(collective: Any) -> Any:
        def call(output: torch.Tensor, *args: Any, **options: Any) -> Any:
            received[0] += output.numel() * output.element_size()
            return collective(output, *args, **options)

        return call

    ranks = {"dp_rank": rank, "dp_size": world.size, "dp_ranks": tuple(range(world.size))}
    layout = dataclasses.replace(Layout.of(config), **ranks)
    with (
        mock.patch.object(reduce, "all_gather_flat", counted(reduce.all_gather_flat)),
        mock.patch.object(dist, "all_to_all_single", counted(dist.all_to_all_single)),
    ):
        rollouts = collected(Place(rank, world.size, rank, world.gather_objects))
        deals = deal_step(rollouts, layout)
        rollouts = hand_out(rollouts, deals, layout, world)
    advantages = torch.arange(len(rollouts)) - 3.5
    got = pack(rollouts, advantages, layout, step=0, deals=deals).micro_batches
    want = pack(collected(Place(0, 1, 0, lambda value: [value])), advantages, layout, step=0).micro_batches
    fields = [field.name for field in dataclasses.fields(got[0]) if field.name != "inputs"]
    pairs = [(getattr(a, name), getattr(b, name)) for a, b in zip(got, want, strict=True) for name in fields]
    pairs += [(a.model_inputs().token_ids, b.model_inputs().token_ids) for a, b in zip(got, want, strict=True)]
    same = all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)
    return received[0], same


def test_a_rank_receives_its_share_however_many_there_are(worlds: Worlds) -> None:
    small, large = worlds.run(2, _step, 8, False), worlds.run(4, _step, 16, False)
    assert all(same for _, same in [*small, *large, *worlds.run(4, _step, 8, True)])
    received = [max(count for count, _ in ranks) for ranks in (small, large)]
    own = 8 * 0.7 * LENGTH * 13  # of 8 rollouts: ids, logprobs and the mask; every other rank's share would be as much
    assert 0.3 * own < received[0] < 1.2 * own and 0.3 * own < received[1] < 1.2 * own
