from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from threading import Barrier, Thread, current_thread

import pytest
import torch

from megatron_rl import launch
from megatron_rl.config import parse_config
from megatron_rl.data.cursor import PromptCursor
from megatron_rl.errors import DataError
from megatron_rl.grading.registry import RewardError
from megatron_rl.grading.verdict import InProcess
from megatron_rl.rollout.answers import facts_of, from_facts
from megatron_rl.rollout.collect import CollectError, Collector, CollectStopped, rollout_metrics, sampling_params
from megatron_rl.rollout.engine import EngineError, Place, RolloutEngine, ServersLost
from megatron_rl.types import Lengths, Prompt, Rollout
from tests.tiny import answer_to

HF = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def make_config(dynamic=False, max_batches=3, prompts=4, samples=3, **options):
    return parse_config(
        {
            "model": {"hf_config": HF},
            "data": {"type": "countdown"},
            "rollout": {"samples_per_prompt": samples, "max_response_tokens": 8},
            "train": {"prompts_per_step": prompts, "prompts_per_minibatch": prompts},
            "algorithm": {
                "dynamic_sampling": {"enabled": dynamic, "max_batches": max_batches},
                **options.pop("algorithm", {}),
            },
            **options,
        }
    )


class Tokenizer:
    eos_token_id = 1

    def decode(self, token_ids):
        return " ".join(map(str, token_ids))


@dataclass
class FakeEngine(RolloutEngine):
    """The response to sample s of prompt p is the two tokens (p, s), then the stop token."""

    calls: list = field(default_factory=list)
    weight_version: int = 0

    def stream(self, requests):
        self.calls.append(requests)
        for index, request in enumerate(requests):
            yield index, self.answer(request)

    def answer(self, r):
        reason = "length" if r.prompt_id == 0 else "stop"
        tokens = [r.prompt_id, r.sample_index, 1]
        return answer_to(r, tokens, weight_version=self.weight_version, finish_reason=reason)


def no_revival():
    raise AssertionError("nothing died")


def prompts(count):
    return [Prompt(i, (7, 8), "", "") for i in range(count)]


def odd_prompts_learn(response, answer):
    """Odd prompts score 1 on sample 0 only; prompts divisible by 4 always score 1; the others 0."""
    prompt_id, sample = map(int, response.split()[:2])
    return float(sample == 0) if prompt_id % 2 else float(prompt_id % 4 == 0)


def run(config, cursor, reward_fn=odd_prompts_learn, world_size=1, step=0):
    """`collect` on `world_size` threads whose gather is a shared list. Returns each rank's result."""
    barrier, slots, results = Barrier(world_size), [None] * world_size, [None] * world_size
    states, engines = [None] * world_size, [FakeEngine(weight_version=step) for _ in range(world_size)]

    def rank_main(rank):
        def gather(local):
            slots[rank] = local
            barrier.wait(10)
            everything = list(slots)
            barrier.wait(10)
            return everything

        own = PromptCursor(cursor._prompts, 3)
        own.restore(cursor.state())
        try:
            place = Place(rank, world_size, rank, gather)
            collector = Collector(
                lambda: engines[rank], own, InProcess([reward_fn]), Tokenizer(), config, place, no_revival
            )
            results[rank] = collector.collect(step)
        except Exception as error:
            results[rank] = error
        states[rank] = own.state()

    threads = [Thread(target=rank_main, args=(rank,), name=f"rank {rank}") for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(state == states[0] for state in states)
    cursor.restore(states[0])
    return results, engines


def ids(result):
    return [(r.prompt_id, r.sample_index) for r in result.rollouts]


TOKENS = ("token_ids", "rollout_logprobs", "sampled", "routes")


def test_all_but_the_tokens_reaches_the_other_ranks():
    rollouts = [
        Rollout(
            prompt_id=4,
            sample_index=index,
            token_ids=torch.arange(length),
            rollout_logprobs=-torch.arange(length).float(),
            sampled=torch.arange(length) > 1,
            finish_reason="stop",
            weight_version=3,
            known_lengths=Lengths(length, 2, length - 2),
            **more,
        )
        for index, length, more in [
            (0, 3, {"score": 1.0, "reward": 0.5, "error": "no", "unfinished": "crash", "terms": (2.0,)}),
            (1, 5, {"score": 0.0, "reward": 0.0, "spans": ((3, 2),), "routes": torch.arange(20).view(5, 2, 2)}),
        ]
    ]
    for got, sent in zip(from_facts(facts_of(rollouts)), rollouts, strict=True):
        assert sent.has_tokens and not got.has_tokens and got.response_length == sent.response_length
        for name in {f.name for f in dataclasses.fields(Rollout)} - set(TOKENS):
            assert getattr(got, name) == getattr(sent, name), name
        for read in (lambda r: r.response_ids, lambda r: len(r.token_ids), lambda r: int(r.sampled.sum())):
            with pytest.raises((IndexError, TypeError, RuntimeError)):  # nobody takes them for empty
                read(got)
    assert rollouts[0].replace(known_lengths=None).lengths == (3, 2, 1)


@pytest.mark.parametrize("dynamic", [False, True])
def test_every_world_size_collects_the_same(dynamic):
    config = make_config(dynamic, max_batches=6)
    ((single,), _) = run(config, PromptCursor(prompts(40), 3))
    for world_size in (2, 5):
        results, engines = run(config, PromptCursor(prompts(40), 3), world_size=world_size)
        for result in results:
            assert ids(result) == ids(single) and result.metrics == single.metrics
            assert [r.reward for r in result.rollouts] == [r.reward for r in single.rollouts]
            assert [r.lengths for r in result.rollouts] == [r.lengths for r in single.rollouts]
        held = [[r.has_tokens for r in result.rollouts] for result in results]
        assert [sum(ranks) for ranks in zip(*held, strict=True)] == [1] * 12  # each on the rank that sampled it
        shares = [len(engine.calls[0]) for engine in engines]
        assert sum(shares) == 12 and max(shares) - min(shares) <= 1


def test_groups_come_in_draw_order_with_all_samples():
    config, cursor = make_config(), PromptCursor(prompts(40), 3)
    expected = [p.prompt_id for p in PromptCursor(prompts(40), 3).take(8)]
    for first in (0, 4):
        ((result,), _) = run(config, cursor)
        assert ids(result) == [(p, s) for p in expected[first : first + 4] for s in range(3)]
        assert set(result.prompts_by_id) == set(expected[first : first + 4])


def test_dynamic_sampling_refills_in_draw_order():
    order = [p.prompt_id for p in PromptCursor(prompts(40), 3).take(40)]
    config, cursor = make_config(dynamic=True, max_batches=10), PromptCursor(prompts(40), 3)
    ((result,), (engine,)) = run(config, cursor)
    odd = [p for p in order if p % 2]
    assert ids(result) == [(p, s) for p in odd[:4] for s in range(3)]
    needed = order[: order.index(odd[3]) + 1]
    assert len(engine.calls) > 1 and len(engine.calls[0]) == 12
    # over what it had to know, whatever else was drawn
    assert result.metrics["sampling/kept_group_fraction"] == 4 / len(needed)
    assert result.metrics["sampling/all_correct_fraction"] == sum(p % 4 == 0 for p in needed) / len(needed)
    assert result.metrics["sampling/all_wrong_fraction"] == sum(p % 4 == 2 for p in needed) / len(needed)
    assert cursor.state()["position"] == len(needed)
    drawn = sum(map(len, engine.calls)) / 3
    discarded = 3 * 3 * (drawn - len(needed)) / (3 * 3 * drawn)  # tokens of 3 samples
    assert result.metrics["sampling/discarded_token_fraction"] == pytest.approx(discarded)


def test_dynamic_sampling_gives_up_on_every_rank_with_the_numbers():
    results, _ = run(make_config(dynamic=True), PromptCursor(prompts(40), 3), lambda r, a: 1.0, world_size=2)
    for error in results:
        assert isinstance(error, CollectError)
        assert "kept 0 of 12 groups" in str(error) and "all correct 1.000" in str(error)
        assert "max_batches (3)" in str(error)


def test_a_rank_that_is_asked_to_stop_stops_all_before_more_is_drawn(monkeypatch):
    asked = []

    def stop_requested(run_dir):
        asked.append(current_thread().name)
        return current_thread().name == "rank 1"

    monkeypatch.setattr(launch, "stop_requested", stop_requested)
    cursor = PromptCursor(prompts(40), 3)
    results, engines = run(make_config(dynamic=True, max_batches=10), cursor, world_size=3)
    assert [len(engine.calls) for engine in engines] == [1, 1, 1] and sorted(asked) == ["rank 0", "rank 1", "rank 2"]
    for error in results:
        assert isinstance(error, CollectStopped) and "stopped in step 1, which had kept" in str(error)
    asked.clear()
    ((result,), _) = run(make_config(), cursor, world_size=1)  # a step that is whole is not stopped
    assert len(result.rollouts) == 12 and not asked


def test_dynamic_sampling_compares_shaped_rewards():
    # every sample is 3 tokens long but prompt 0's are cut: all penalties are equal, so no group becomes informative
    algorithm = {"overlong": {"penalty_buffer": 8, "penalty_factor": 1.0}}
    ((result,), _) = run(make_config(algorithm=algorithm), PromptCursor(prompts(40), 3))
    assert [r.reward - r.score for r in result.rollouts] == pytest.approx([-3 / 8] * 12)


def test_a_prompt_never_comes_twice_in_a_step():
    cursor = PromptCursor(prompts(6), 3)
    for _ in range(10):
        ((result,), _) = run(make_config(), cursor)
        assert len({r.prompt_id for r in result.rollouts}) == 4
    ((error,), _) = run(make_config(dynamic=True), cursor, lambda r, a: 0.0)
    assert isinstance(error, DataError) and "only 0 have not been drawn" in str(error)
    ((error,), (engine,)) = run(make_config(prompts=7), cursor)
    assert isinstance(error, DataError) and not engine.calls  # too small a data set costs nothing


def test_failing_rewards_end_the_step_on_every_rank():
    def fails_on_rank_0_share(response, answer):
        if response.startswith("0 ") or int(response.split()[0]) % 2:
            raise RuntimeError("no verifier")
        return 1.0

    results, _ = run(make_config(), PromptCursor(prompts(40), 3), fails_on_rank_0_share, world_size=3)
    for error in results:
        assert isinstance(error, RewardError) and "no verifier" in str(error)
    ((result,), _) = run(make_config(reward={"max_failures": 1.0}), PromptCursor(prompts(40), 3), fails_on_rank_0_share)
    failed = [bool(r.error) for r in result.rollouts]
    assert any(failed) and result.metrics["reward/failed_fraction"] == sum(failed) / 12


def test_seeds_differ_by_step_and_not_by_rank():
    config = make_config()
    seeds = {sampling_params(config, Tokenizer(), step).seed for step in range(100)}
    assert len(seeds) == 100 and min(seeds) >= 0
    _, engines = run(config, PromptCursor(prompts(40), 3), world_size=2, step=5)
    assert {r.sampling for e in engines for r in e.calls[0]} == {sampling_params(config, Tokenizer(), 5)}


def test_stop_tokens():
    assert sampling_params(make_config(), Tokenizer(), 0).stop_token_ids == (1,)
    config = make_config().model_copy(
        update={"rollout": make_config().rollout.model_copy(update={"stop_token_ids": (4,)})}
    )
    assert sampling_params(config, Tokenizer(), 0).stop_token_ids == (4,)
    bare = Tokenizer()
    bare.eos_token_id = None
    with pytest.raises(DataError, match="set rollout.stop_token_ids"):
        sampling_params(make_config(), bare, 0)


def test_overlong_filter_takes_out_what_was_cut_and_keeps_its_tokens():
    config = make_config(prompts=5, algorithm={"overlong": {"filter": True}})
    ((result,), _) = run(config, PromptCursor(prompts(5), 3))
    assert {r.prompt_id for r in result.rollouts if not r.counts} == {0}
    assert all(r.sampled.any() for r in result.rollouts)
    assert result.metrics["response/length_min"] == 3 and result.metrics["response/truncated_fraction"] == 1 / 5


def test_metrics_by_hand():
    def rollout(reward, score, length, reason="stop", error=""):
        mask = torch.arange(length + 2) >= 2
        return Rollout(0, 0, torch.zeros(length + 2), torch.zeros(length + 2), mask, reason, 0, score, reward, error)

    groups = [
        [rollout(1.0, 1.0, 2), rollout(0.0, 1.0, 8, "length")],
        [rollout(0.0, 0.0, 4, error="x"), rollout(0.0, 0.0, 6)],
    ]
    assert rollout_metrics(groups) == pytest.approx(
        {
            "reward/mean": 0.25,
            "reward/std": 0.1875**0.5,
            "reward/accuracy": 0.5,
            "reward/failed_fraction": 0.25,
            "reward/unfinished_fraction": 0.0,
            "response/length_mean": 5.0,
            "response/length_max": 8.0,
            "response/length_min": 2.0,
            "response/truncated_fraction": 0.25,
            "sampling/kept_group_fraction": 0.5,
            "sampling/all_correct_fraction": 0.5,
            "sampling/all_wrong_fraction": 0.5,
        }
    )


def test_evaluation():
    config = make_config(train={"prompts_per_step": 4, "prompts_per_minibatch": 4, "eval_samples": 2})
    engine = FakeEngine()
    cursor, place = PromptCursor(prompts(4), 3), Place(0, 1, 0, lambda local: [local])
    collector = Collector(
        lambda: engine, cursor, InProcess([odd_prompts_learn]), Tokenizer(), config, place, no_revival
    )
    got = collector.evaluate(prompts(4))
    # prompt 0 scores 1, 1; prompts 1 and 3 score 1, 0; prompt 2 scores 0, 0
    assert got == {
        "eval/accuracy": 0.5,
        "eval/pass_at_n": 0.75,
        "eval/length_mean": 3.0,
        "eval/truncated_fraction": 0.25,
        "eval/failed_fraction": 0.0,
    }
    assert engine.calls[0][0].sampling.seed != sampling_params(config, Tokenizer(), 0).seed
    with pytest.raises(CollectError, match="no held-out problems"):
        collector.evaluate([])


def collector_of(engine, revive=no_revival, steps=6, num_prompts=40, **rollout):
    raw = {"engine": "sglang", "samples_per_prompt": 3, "max_response_tokens": 8} | rollout
    loss = {"type": "ppo_clip", "rollout_correction": {"cap": 2.0}}
    config = make_config(rollout=raw, loss=loss, train=TRAIN | {"num_steps": steps})
    cursor, place = PromptCursor(prompts(num_prompts), 3), Place(0, 1, 0, lambda local: [local])
    return Collector(lambda: engine, cursor, InProcess([odd_prompts_learn]), Tokenizer(), config, place, revive)


TRAIN = {"prompts_per_step": 4, "prompts_per_minibatch": 4}


@dataclass
class DyingEngine(FakeEngine):
    """Loses what is left after `lives` answers, until it is revived."""

    lives: int = 5

    def stream(self, requests):
        self.calls.append(requests)
        for index, request in enumerate(requests):
            if self.lives == 0:
                raise ServersLost("killed")
            self.lives -= 1
            yield index, self.answer(request)


def test_only_what_dead_servers_lost_is_asked_for_again():
    engine, revived = DyingEngine(), []

    def revive():
        revived.append(len(engine.calls))
        engine.lives = 4

    result = collector_of(engine, revive).collect(0)
    assert ids(result) == [(p.prompt_id, s) for p in PromptCursor(prompts(40), 3).take(4) for s in range(3)]
    assert [len(call) for call in engine.calls] == [12, 7, 3] and revived == [1, 2]


def test_a_broken_engine_ends_the_step_with_its_own_words():
    class Broken(FakeEngine):
        def stream(self, requests):
            raise EngineError("the weights have diverged")
            yield

    with pytest.raises(EngineError, match="the weights have diverged"):
        collector_of(Broken()).collect(0)
