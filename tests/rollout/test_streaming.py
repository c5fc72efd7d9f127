"""Groups in drawn order, whatever comes first: against a collector that waits for whole batches, on an engine that
answers in any order."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch

from megatron_rl import launch
from megatron_rl.data.cursor import PromptCursor
from megatron_rl.grading.verdict import InProcess
from megatron_rl.rollout.collect import Collector
from megatron_rl.rollout.engine import Cost, EngineError, Place, Request, RolloutEngine, Stream, Taken
from megatron_rl.rollout.measures import is_informative
from megatron_rl.rollout.window import Group, num_settled, num_to_draw
from megatron_rl.types import Rollout
from tests.rollout.test_collect import FakeEngine, Tokenizer, ids, make_config, prompts
from tests.rollout.test_collect import collector_of as waiting_collector
from tests.tiny import answer_to

WANTED, SAMPLES, SEEDS = 6, 3, 20


def length_of(prompt: int, sample: int, seed: int) -> int:
    """Log-normal; informative prompts have the longer answers."""
    shift = 1.0 if teaches(prompt, seed) else 0.0
    return 1 + round(random.Random(f"{prompt} {sample} {seed}").lognormvariate(shift, 0.75))


def teaches(prompt: int, seed: int) -> bool:
    return random.Random(f"{prompt} {seed}").random() < 0.6


class AnyOrder(RolloutEngine):
    """Takes a time that grows with a response's length, of which some at a time are under way; a few are lost."""

    def __init__(self, seed: int, losses: float = 0.0) -> None:
        self.seed, self.losses, self.asked, self.answered = seed, losses, Counter[Any](), Counter[Any]()
        self.weight_version, self.dropped, self.num_hungry = 0, 0, 0

    def open(self, then: Any) -> Stream:
        return AnyOrderStream(self, then)


class AnyOrderStream(Stream):
    in_rounds = False

    def __init__(self, engine: AnyOrder, then: Any) -> None:
        self.engine, self.then, self.under_way = engine, then, dict[tuple[int, int], list[Any]]()
        self.random = random.Random(engine.seed)

    def add(self, requests: Any) -> None:
        for request in requests:
            key = request.prompt_id, request.sample_index
            assert key not in self.under_way, "asked for twice"
            self.engine.asked[key] += 1
            self.under_way[key] = [request, length_of(*key, self.engine.seed)]

    def take(self, seconds: float) -> Taken:
        taken = Taken()
        self.engine.num_hungry += len(self.under_way) < 7
        for key, entry in list(self.under_way.items())[:7]:  # seven at a time
            entry[1] -= self.random.randrange(3)
            if entry[1] <= 0:
                del self.under_way[key]
                if self.random.random() < self.engine.losses:
                    taken.lost.append(entry[0])
                else:
                    self.engine.answered[key] += 1
                    taken.finished.append(self.then(entry[0], self.answer(entry[0])))
        return taken

    def answer(self, request: Request) -> Rollout:
        count = length_of(request.prompt_id, request.sample_index, self.engine.seed)
        tokens = [request.prompt_id, request.sample_index, *[5] * count, 1]
        rollout: Rollout = answer_to(request, tokens, weight_version=self.engine.weight_version)
        return rollout

    def is_idle(self) -> bool:
        return not self.under_way

    def backlog(self) -> tuple[int, int]:
        return max(0, len(self.under_way) - 7), 1

    def drop(self) -> None:
        self.engine.dropped += len(self.under_way)
        self.under_way.clear()

    def cost(self) -> Cost:
        return Cost()


def batches_in_drawn_order(cursor: PromptCursor, seed: int) -> list[int]:
    """The rule in its plain form: whole batches, until their first informative groups suffice."""
    drawn: list[int] = []
    while sum(teaches(prompt, seed) for prompt in drawn) < WANTED:
        drawn += [prompt.prompt_id for prompt in cursor.take(WANTED, exclude=drawn)]
    return [prompt for prompt in drawn if teaches(prompt, seed)][:WANTED]


def collector_of(
    engine: RolloutEngine, seed: int, revived: list[int], dynamic: bool = True, **rollout: Any
) -> Collector:
    def score(response: str, answer: str) -> float:
        prompt, sample = map(int, response.split()[:2])
        return float(teaches(prompt, seed) and sample == 0)

    raw = {"engine": "sglang", "samples_per_prompt": SAMPLES, "max_response_tokens": 8, **rollout}
    loss = {"type": "ppo_clip", "rollout_correction": {"cap": 2.0}}
    train = {"prompts_per_step": WANTED, "prompts_per_minibatch": WANTED, "num_steps": 9}
    config = make_config(dynamic, 10, rollout=raw, train=train, loss=loss)
    place = Place(0, 1, 0, lambda local: [local])
    cursor = PromptCursor(prompts(90), seed)
    return Collector(lambda: engine, cursor, InProcess([score]), Tokenizer(), config, place, lambda: revived.append(1))


@pytest.mark.parametrize("losses", [0.0, 0.1])
def test_the_same_groups_as_by_whole_batches_over_twenty_seeds(losses: float) -> None:
    revivals, num_asked, num_needed = list[int](), 0, 0
    for seed in range(SEEDS):
        engine = AnyOrder(seed, losses)
        collector = collector_of(engine, seed, revivals)
        for step in range(3):
            plain = PromptCursor(prompts(90), seed)
            plain.restore(collector.cursor.state())
            expected = batches_in_drawn_order(plain, seed)
            engine.weight_version = step
            result = collector.collect(step)
            ids = [(r.prompt_id, r.sample_index) for r in result.rollouts]
            assert ids == [(prompt, sample) for prompt in expected for sample in range(SAMPLES)]
            assert set(result.prompts_by_id) == set(expected)
            # what is not needed is drawn again: the next prompt is the one behind the last that was kept
            after = PromptCursor(prompts(90), seed)
            after.restore(collector.resume_point)
            while after.take(1)[0].prompt_id != expected[-1]:
                pass
            assert collector.cursor.state() == after.state()
            # all of the informative prompts up to there, however long: no length is preferred
            lengths = [r.response_length for r in result.rollouts]
            assert lengths == [3 + length_of(p, s, seed) for p in expected for s in range(SAMPLES)]
            num_needed += round(result.metrics["sampling/num_groups"])
        if not losses:
            num_asked += sum(engine.asked.values()) // SAMPLES
            assert all(count == engine.asked[key] or engine.dropped for key, count in engine.answered.items())
        collector.close()
    assert bool(revivals) == bool(losses)
    if not losses:  # prompts that were not needed: those under way at the end, and one that waits
        assert num_asked - num_needed <= 3 * SEEDS * (7 / SAMPLES + 1)


def test_ahead_of_the_training_no_sample_is_lost_or_doubled() -> None:
    for seed in range(5):
        engine = AnyOrder(seed)
        collector = collector_of(engine, seed, [], max_staleness=2)
        plain, seen = PromptCursor(prompts(90), seed), list[tuple[int, int]]()
        for step in range(4):
            engine.weight_version = step
            result = collector.collect(step)
            seen += [(r.prompt_id, r.sample_index) for r in result.rollouts]
            assert max(step - r.weight_version for r in result.rollouts) <= 2
            collector.go_ahead(step)
            assert collector._window  # the servers have work while the policy trains
        order = [prompt.prompt_id for prompt in plain.take(90)]
        expected = [prompt for prompt in order if teaches(prompt, seed)][: 4 * WANTED]
        assert seen == [(prompt, sample) for prompt in expected for sample in range(SAMPLES)]
        assert engine.dropped == 0
        collector.close()


def test_while_the_last_responses_of_a_step_come_the_next_step_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, stops = AnyOrder(0), [False]
    monkeypatch.setattr(launch, "stop_requested", lambda run_dir: stops[0])
    collector = collector_of(engine, 0, [], dynamic=False, max_staleness=1)
    for step in range(4):
        engine.weight_version = step
        collector.collect(step)
        assert len(collector._window) > 1
        collector.go_ahead(step)
    assert engine.num_hungry == 0  # of seven slots
    stops[0] = True  # what the step has drawn is finished, and nothing is begun
    assert len(collector.collect(4).rollouts) == WANTED * SAMPLES and not collector._window
    collector.close()


@pytest.mark.parametrize("max_staleness", [1, 2])
def test_rollouts_ahead_are_those_of_the_next_steps_and_the_cursor_waits(max_staleness: int) -> None:
    order = [p.prompt_id for p in PromptCursor(prompts(40), 3).take(24)]
    engine = FakeEngine()
    collector = waiting_collector(engine, max_staleness=max_staleness)
    for step in range(6):
        engine.weight_version = step
        result = collector.collect(step)
        assert [p for p, s in ids(result) if s == 0] == order[4 * step : 4 * step + 4]
        collector.go_ahead(step)
        collector._meet(0)
        # a checkpoint here draws the prompts again that are only ahead
        assert collector.cursor_state()["position"] == 4 * (step + 1)
        assert len(collector._window) == 4 * min(max_staleness, 5 - step)
        age = 0 if step == 0 else min(step, max_staleness)
        assert result.metrics["staleness/max"] == result.metrics["staleness/mean"] == age
    assert sum(map(len, engine.calls)) == 6 * 12
    collector.close()


def test_rollouts_that_began_too_long_ago_are_asked_for_again() -> None:
    engine = FakeEngine()
    collector = waiting_collector(engine, max_staleness=1)
    collector.collect(0)
    collector.go_ahead(0)
    collector._meet(0)
    engine.weight_version = 3
    result = collector.collect(3)  # as after steps without generation: what was ahead is of version 0
    assert {r.weight_version for r in result.rollouts} == {3} and result.metrics["staleness/discarded"] == 12
    with pytest.raises(EngineError, match="still come from weights before 4"):
        collector.collect(5)
    collector.close()


def test_a_prompt_that_comes_again_may_be_too_old_again() -> None:
    engine = FakeEngine()
    collector = waiting_collector(engine, max_staleness=1, steps=99, num_prompts=8)
    for step in range(0, 15, 3):  # each time what is ahead is of the version three steps before
        engine.weight_version = step
        result = collector.collect(step)
        assert {r.weight_version for r in result.rollouts} == {step}
        assert result.metrics["staleness/discarded"] == (12 if step else 0)
        collector.go_ahead(step)
        collector._meet(0)
    collector.close()


def answer(reward: float) -> Rollout:
    return Rollout(0, 0, *[torch.zeros(1)] * 3, "stop", 0, score=reward, reward=reward)


def group_of(kept: bool | None, answers: tuple[float, ...] = ()) -> Group:
    requests: Any = [None] * 4
    rollouts = [] if kept is None else [answer(0.0), answer(float(kept))]
    return Group(prompts(1)[0], requests, rollouts=rollouts, answers=dict(enumerate(map(answer, answers))))


def test_nothing_is_settled_before_all_that_was_drawn_earlier() -> None:
    groups = [group_of(kept) for kept in (True, None, True, False, True)]
    assert num_settled(groups, 2, is_informative) is None and num_settled(groups, 1, is_informative) == 1
    groups[1] = group_of(False)
    assert num_settled(groups, 2, is_informative) == 3 and num_settled(groups, 3, is_informative) == 5
    assert num_settled(groups, 4, is_informative) is None


def test_how_many_are_drawn_by_hand() -> None:
    keeps = is_informative
    assert num_to_draw([], 32, keeps) == 32  # nothing is known: all may be kept
    judged = [group_of(True)] * 10 + [group_of(False)] * 8  # with the prior 12 of 20: p = 0.6
    assert num_to_draw(judged, 22, keeps) == 20  # 12 missing / 0.6
    assert num_to_draw(judged, 22, keeps, 0.5) == 31  # 20 + 0.5 * 22
    assert num_to_draw(judged, 10, keeps) == num_to_draw(judged, 9, keeps, 1.0) == 0
    silent, agree, differ = group_of(None), group_of(None, (1.0, 1.0, 1.0)), group_of(None, (1.0, 0.0))
    assert num_to_draw([*judged, *[silent] * 8], 22, keeps) == 12
    assert num_to_draw([*judged, *[agree] * 8], 22, keeps) == 18  # a fourth of each is to come
    assert num_to_draw([*judged, *[differ] * 3], 22, keeps) == 15  # 9 missing / 0.6
    assert num_to_draw([], 6, keeps, seen=[True, False, False, False, False, False, False]) == 18  # p = 3 / 9
