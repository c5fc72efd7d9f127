"""The learning rate of a run that goes on with mini-batches of another size is that of the step it is at."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config import Config
from tests.policy.tiny import make_config, policy_of
from tests.worlds import Worlds

STEPS, PEAK = 8, 2.0


@dataclass(frozen=True)
class Leg:
    """A stretch of a run: `updates` a step, until after `until` steps, of which `skipped` updates did nothing."""

    updates: int
    until: int = STEPS
    skipped: int = 0
    optimizer: dict[str, Any] = field(default_factory=dict)

    def config(self) -> Config:
        optimizer = {"lr": PEAK, "schedule": "cosine", "warmup_steps": 4} | self.optimizer
        train = {"num_steps": STEPS, "prompts_per_step": 8, "prompts_per_minibatch": 8 // self.updates}
        return make_config(None, optimizer=optimizer, train=train)


def _learning_rates(cases: list[tuple[list[Leg], Path]]) -> list[list[float]]:
    """Of each update of the last leg."""
    from megatron_rl.policy.checkpoint import CheckpointStore

    found: list[list[float]] = []
    for legs, folder in cases:
        step = 0
        for leg in legs:
            config, rates = leg.config(), []
            with policy_of(config, total_updates=STEPS * config.minibatches_per_step) as policy:
                store = CheckpointStore(folder, policy, policy.groups)
                if store.newest() is not None:
                    store.load(store.newest())
                for _ in range((leg.until - step) * leg.updates - leg.skipped):
                    rates.append(float(policy.optimizer.param_groups[0]["lr"]))
                    policy.scheduler.step(increment=1)
                step = leg.until
                if leg is not legs[-1]:
                    store.save(step, {})
        found.append(rates)
    return found


def expected(place: float, warmup: float, schedule: str = "cosine") -> float:
    """At `place` steps, with `warmup` in steps."""
    if place <= warmup:
        return PEAK * place / warmup
    progress = (place - warmup) / (STEPS - warmup)
    return PEAK * {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1}[schedule]


def test_the_learning_rate_goes_on_from_the_step(worlds: Worlds, tmp_path: Path) -> None:
    """Warm-up is 4 updates: of the leg that began it, so 2 steps after a beginning with 2 updates a step."""
    begun_in_warmup, begun_after = Leg(2, until=1), Leg(2, until=4)
    linear, constant = {"schedule": "linear"}, {"schedule": "constant"}
    cases: dict[str, tuple[list[Leg], float, str]] = {
        "never left": ([Leg(2)], 2, "cosine"),
        "larger mini-batches": ([begun_after, Leg(1)], 2, "cosine"),
        "smaller in the warm-up, then larger": ([begun_in_warmup, Leg(8, until=3), Leg(1)], 2, "cosine"),
        "smaller, linear": ([Leg(2, until=4, optimizer=linear), Leg(8, optimizer=linear)], 2, "linear"),
        "constant": ([Leg(2, until=1, optimizer=constant), Leg(4, optimizer=constant)], 2, "constant"),
        "another warm-up": ([begun_after, Leg(1, optimizer={"warmup_steps": 6})], 6, "cosine"),
    }
    folders = [tmp_path / name for name in cases]
    jobs = [(legs, folder) for (legs, _, _), folder in zip(cases.values(), folders, strict=True)]
    for (name, (legs, warmup, schedule)), rates in zip(
        cases.items(), worlds.run(1, _learning_rates, jobs)[0], strict=True
    ):
        *before, last = legs
        begin = before[-1].until if before else 0
        want = [expected(begin + i / last.updates, warmup, schedule) for i in range((STEPS - begin) * last.updates)]
        assert rates == pytest.approx(want, abs=1e-12), name
        assert rates[0] > 0 or begin == 0


def test_skipped_updates_stay_behind(worlds: Worlds, tmp_path: Path) -> None:
    """Two of eight updates did nothing: the schedule is one step late, whatever a step's updates are then."""
    cases = [([Leg(2, until=4, skipped=2), Leg(updates)], tmp_path / str(updates)) for updates in (2, 8)]
    for (legs, _), rates in zip(cases, worlds.run(1, _learning_rates, cases)[0], strict=True):
        assert rates[0] == pytest.approx(expected(3, 2)) and rates[-1] == pytest.approx(
            expected(7 - 1 / legs[1].updates, 2)
        )
