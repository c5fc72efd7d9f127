"""What a step costs the host of one rank beside the GPUs' work, when ranks and batch grow together:
python scripts/bench_host.py [--rollouts 2048] [--growth 4].

This process stands for rank 0 of a world of tp 8 and dp 4 with --rollouts responses (mean length 4,200, at most 8,192:
the 32B recipe's), then of dp 4 * growth with as many times the responses. Collecting, packing, the ledger and the other
metrics are the trainer's own functions; the other ranks' messages are really pickled and parsed, their making is not
counted. CPU seconds of one thread, the median of --repeats.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import os
import pickle
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from megatron_rl.algorithms.covariance import covariance_metrics
from megatron_rl.algorithms.ledger import ledger
from megatron_rl.config import Config, parse_config
from megatron_rl.data import PromptCursor
from megatron_rl.grading.verdict import InProcess
from megatron_rl.metrics.samples import samples_for_log
from megatron_rl.packing import Layout, pack
from megatron_rl.packing.dealing import deal_step, hand_out
from megatron_rl.parallel import reduce
from megatron_rl.parallel.reduce import Reducer
from megatron_rl.rollout.answers import facts_of
from megatron_rl.rollout.collect import Collector
from megatron_rl.rollout.engine import Place
from megatron_rl.types import Prompt, Rollout, TokenStats, TrainBatch

TP, DP, SAMPLES, UPDATES, LIMIT, VOCAB = 8, 4, 8, 8, 8192, 151_643
ZIPF = np.cumsum(1 / np.arange(1, VOCAB) ** 1.3)


class Crowd(Reducer):
    """Rank 0 of `size` ranks, of which the others hold what `others` returns of this rank's values."""

    def __init__(self, size: int, others: Callable[[Any, int], Any] = lambda value, rank: value) -> None:
        super().__init__(None)
        self.size, self._others, self.making = size, others, 0.0

    def _gather(self, values: torch.Tensor, group: Any = None) -> torch.Tensor:
        return values.expand(self.size, *values.shape).clone()

    def gather_objects(self, value: Any) -> list[Any]:
        reduce._dumps(value)
        return [value, *self._received(value)]

    def exchange_objects(self, values: Any) -> list[Any]:
        for value in {id(value): value for value in values}.values():
            reduce._dumps(value)
        return [values[0], *self._received(values[0])]

    def _received(self, value: Any) -> Iterator[Any]:
        for rank in range(1, self.size):
            began = time.process_time()
            data = reduce._dumps(self._others(value, rank))
            self.making += time.process_time() - began
            yield pickle.loads(data)


class Engine:
    """Has every answer ready."""

    def __init__(self, answers: dict[tuple[int, int], Rollout]) -> None:
        self.answers = answers

    def stream(self, requests: Any) -> Iterator[tuple[int, Rollout]]:
        for i, request in enumerate(requests):
            yield i, self.answers[request.prompt_id, request.sample_index]


class Tokenizer:
    """Takes no time: decoding is generation's work."""

    eos_token_id = 1

    def decode(self, token_ids: Any) -> str:
        return ""


def make_config(rollouts: int) -> Config:
    prompts = rollouts // SAMPLES
    train = {"prompts_per_step": prompts, "prompts_per_minibatch": prompts // UPDATES, "micro_batch_tokens": 20_480}
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return parse_config(
        {
            "model": {"hf_config": {"model_type": "qwen2", "vocab_size": VOCAB, **sizes}},
            "data": {"type": "countdown", "max_prompt_tokens": 1024},
            "rollout": {"samples_per_prompt": SAMPLES, "max_response_tokens": LIMIT},
            "train": train | {"share_prompts": False},  # as on a GPU
        }
    )


def make_rollouts(prompts: list[Prompt]) -> dict[tuple[int, int], Rollout]:
    rng, rollouts = np.random.default_rng(0), {}
    for prompt in prompts:
        for sample in range(SAMPLES):
            length = int(np.clip(rng.lognormal(np.log(4200) - 0.08, 0.6), 16, LIMIT))
            drawn = torch.from_numpy(np.searchsorted(ZIPF / ZIPF[-1], rng.random(length)))
            start = len(prompt.token_ids)
            rollouts[prompt.prompt_id, sample] = Rollout(
                prompt_id=prompt.prompt_id,
                sample_index=sample,
                token_ids=torch.cat([torch.tensor(prompt.token_ids), drawn]),
                rollout_logprobs=torch.cat([torch.zeros(start), -torch.rand(length)]),
                sampled=torch.arange(start + length) >= start,
                finish_reason="length" if length == LIMIT else "stop",
                weight_version=0,
                spans=((0, length),),
            )
    return rollouts


def with_stats(batch: TrainBatch) -> TrainBatch:
    def stats(tokens: int) -> TokenStats:
        return TokenStats(-torch.rand(tokens), torch.rand(tokens), torch.rand(tokens), -torch.rand(tokens))

    return batch.with_old_stats([[stats(len(mb.labels)) for mb in mini.micro_batches] for mini in batch.mini_batches])


def measure(dp: int, num_rollouts: int) -> dict[str, float]:
    """Return the CPU seconds of each part of one step on rank 0, `making` of other ranks' messages taken out."""
    config, seconds = make_config(num_rollouts), dict[str, float]()
    prompts = [Prompt(i, tuple(range(2, 252)), "", "") for i in range(config.train.prompts_per_step)]
    everything = make_rollouts(prompts)

    @contextmanager
    def clock(name: str, *crowds: Crowd) -> Iterator[None]:
        began = time.process_time()
        yield
        seconds[name] = time.process_time() - began - sum(crowd.making for crowd in crowds)

    drawn = [prompt.prompt_id for prompt in PromptCursor(prompts, 0).take(len(prompts))]
    requests = [(p, s) for p in drawn for s in range(SAMPLES)]
    world_size = TP * dp

    def sampled_by(rank: int) -> list[Rollout]:
        share = requests[len(requests) * rank // world_size : len(requests) * (rank + 1) // world_size]
        rollouts = [everything[key].replace(score=float(key[1] % 2), reward=float(key[1] % 2)) for key in share]
        return [rollout.replace(known_lengths=rollout.lengths) for rollout in rollouts]

    crowd = Crowd(world_size, lambda _, rank: (facts_of(sampled_by(rank)), ""))
    place, score = Place(0, world_size, 0, crowd.gather_objects), lambda response, answer: 1.0
    cursor = PromptCursor(prompts, 0)
    engine: Any = Engine(everything)
    collector = Collector(lambda: engine, cursor, InProcess([score]), Tokenizer(), config, place, lambda: None)
    with clock("collect", crowd):
        collected = collector.collect(0)
    rollouts, dp_ranks = collected.rollouts, tuple(rank // TP for rank in range(world_size))
    layout = dataclasses.replace(Layout.of(config), dp_size=dp, dp_ranks=dp_ranks)
    with clock("deal"):
        deals = deal_step(rollouts, layout)
    mine = {i for each in deals for chosen in each.bins[0] for i in chosen}
    holders = collections.defaultdict(list)
    for i in sorted(mine):
        holders[(i * world_size) // len(requests)].append(i)

    def tokens_for_me(_: Any, rank: int) -> list[Any]:
        names, full = (
            ("token_ids", "rollout_logprobs", "sampled", "routes"),
            [everything[requests[i]] for i in holders[rank]],
        )
        return [(i, {name: getattr(r, name) for name in names}) for i, r in zip(holders[rank], full, strict=True)]

    crowd = Crowd(world_size, tokens_for_me)
    with clock("hand out", crowd):
        rollouts = hand_out(rollouts, deals, layout, crowd)
    advantages = torch.rand(len(rollouts)) - 0.5
    with clock("pack"):
        batch = pack(rollouts, advantages, layout, step=0, deals=deals)
    batch = with_stats(batch)

    def totals_of_other_ids(value: Any, rank: int) -> Any:  # of those that the other ranks summed up
        return [(keys + rank, sums) for keys, sums in value] if isinstance(value[0], tuple) else value

    crowd = Crowd(dp, totals_of_other_ids)
    with clock("ledger", crowd):
        ledger(batch, None, crowd)
    crowd = Crowd(dp, lambda _, rank: ({}, {}))
    logged = [rollout for rollout in rollouts if rollout.has_tokens][:2]
    with clock("samples", crowd):
        by_id = {prompt.prompt_id: prompt for prompt in prompts}
        samples_for_log(logged, by_id, batch.mini_batches[:1], batch.mini_batches[:1], Tokenizer(), crowd)
    crowd = Crowd(dp)
    with clock("covariance metrics", crowd):
        covariance_metrics(batch.mini_batches, crowd)
    return seconds | {"all": sum(seconds.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=2048, help="of a step on dp 4")
    parser.add_argument("--growth", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for factor in (1, options.growth):
        runs = [measure(DP * factor, options.rollouts * factor) for _ in range(options.repeats)]
        rows.append({name: statistics.median(run[name] for run in runs) for name in runs[0]})
    print(f"| part | dp {DP} | dp {DP * options.growth}, batch x{options.growth} | ratio |\n|---|---|---|---|")
    for name, before in rows[0].items():
        print(f"| {name} | {before:.2f} s | {rows[1][name]:.2f} s | {rows[1][name] / before:.2f} |")
    print(f"load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
