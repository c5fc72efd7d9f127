"""The project's central claim: the layout never changes the algorithm.

One frozen step of rollouts goes through `train.run_step` (old log-probabilities, selection, two updates of which the
second is off-policy and selects under the current weights) on 1, 2 and 4 ranks. World size 1 with one micro-batch in
which every sample computes its own prompt is the reference. Everywhere else, where prompts are shared if they can be,
the selected token sets must be identical, and the numbers equal up to float32 rounding.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.invariance_case import (
    LAYOUTS,
    LOSSES,
    PROMPTS,
    SAMPLES,
    Case,
    Outcome,
    Update,
    frozen_rollouts,
    initial_weights,
    run_cases,
)
from tests.worlds import Worlds

# In brackets: the largest deviation that the full cross product showed.
COV = 5e-5  # nats * advantage units, absolute [1.3e-5; covariances reach 4, log-probabilities -13]
LOSS = 2e-6  # loss sum, absolute per unit of the denominator [3.9e-7]
GRAD_NORM = 1e-5  # relative [1.8e-6]
TOKEN_WEIGHTS = 2e-5  # absolute
WEIGHTS = 1e-6  # absolute, where the two updates move weights by up to 2e-2 [2.4e-7]
METRICS = 1e-5  # relative to max(|metric|, 1) [1.1e-6]

# (micro-batches, reordered): another split for each layout, so that the quick tests meet all of them
QUICK = {
    "tp1": (8, True),
    "tp2": (2, True),
    "pp2": (8, False),
    "dp2": (8, True),  # 12 sequences in 16 micro-batches: some are empty
    "tp2_sp": (2, False),
    "tp2_pp2": (8, True),
    "cp2": (2, True),
    "pp2_vpp2": (8, True),
    "ep2": (2, True),
    "pp2_uneven": (2, True),
    "dp2_overlap": (8, True),
    "tp2_sp_allgather": (2, False),
}
EXTRA = {
    "tp1": [Case("clip_cov", 2), Case("gspo", 1)],  # whole groups, which share their prompts
    "tp2": [Case("kl_cov_vocab", 8), Case("clip_v", 2)],
    "pp2": [Case("kl_cov_vocab", 2, reordered=True), Case("ppo_clip", 2), Case("steer", 2)],
    "dp2": [Case("ppo_clip", 2), *(Case(loss, 2, reordered=True) for loss in ("forking", "steer", "gaussian_cov"))]
    + [Case("kl_cov_rollout", 2, reordered=True), Case("ppo_clip_rollout", 2), Case("own", 2, reordered=True)]
    + [Case(loss, 2, reordered=True) for loss in ("erc", "clip_b", "clip_v", "repo_r")],
    # per-head norms: shared by ranks that hold different heads
    "tp2_sp": [Case("forking", 2), Case("kl_cov", 2, model="qwen3")],
    "tp2_pp2": [Case("geometric", 2), Case("gaussian_cov", 2), Case("kl_cov", 1, model="qwen3")],
    # all sum over sequences, whose tokens are on both ranks
    "cp2": [Case("own", 2), Case("ppo_clip", 8), Case("gspo", 2), Case("geometric", 2), Case("kl_cov_rollout", 2)]
    + [Case("gmpo", 2), Case("vespo", 2)],
}
# layouts of two or three dimensions at once meet every loss in one split
COMBINED = [layout for layout in LAYOUTS if layout not in QUICK]

Rollouts = dict[str, list]


@pytest.fixture(scope="module")
def rollouts(worlds: Worlds) -> Rollouts:
    return {model: worlds.run(1, frozen_rollouts, model)[0] for model in ("qwen2", "qwen3", "qwen3_moe")}


class References(dict[Case, Outcome]):
    """Outcomes on world size 1 with one micro-batch, computed when first asked for."""

    def __init__(self, worlds: Worlds, rollouts: Rollouts) -> None:
        super().__init__()
        self.worlds, self.rollouts = worlds, rollouts

    def compute(self, cases: list[Case]) -> None:
        missing = [case for case in cases if case not in self]
        if missing:
            (outcomes,) = self.worlds.run(1, run_cases, "tp1", missing, self.rollouts)
            self.update(zip(missing, outcomes, strict=True))

    def __missing__(self, case: Case) -> Outcome:
        self.compute([case])
        return self[case]


@pytest.fixture(scope="module")
def reference(worlds: Worlds, rollouts: Rollouts) -> References:
    return References(worlds, rollouts)


def check_layout(
    worlds: Worlds, rollouts: Rollouts, reference: References, layout: str, cases: list[Case], timeout: float
) -> None:
    unsplit = [Case(case.loss, model=case.model, scope=case.scope, share_prompts=False) for case in cases]
    reference.compute(list(dict.fromkeys(unsplit)))
    ranks = worlds.run(LAYOUTS[layout]["world_size"], run_cases, layout, cases, rollouts, timeout=timeout)
    for i, case in enumerate(cases):
        print(layout, case)  # shown when it fails
        expected = reference[unsplit[i]]
        assert bool(ranks[0][i].ledger) != case.takes_rollout  # it is of the old policy's statistics
        for rank in ranks:
            check_outcome(rank[i], expected)
            for name, weight in rank[i].weights.items():
                assert torch.equal(weight, ranks[0][i].weights[name]), f"ranks disagree on {name}"


def check_outcome(got: Outcome, expected: Outcome) -> None:
    for a, b in zip(got.updates, expected.updates, strict=True):
        assert torch.equal(a.ids, b.ids)
        torch.testing.assert_close(a.cov, b.cov, rtol=0, atol=COV)
        assert a.ids[a.selected].tolist() == b.ids[b.selected].tolist()
        torch.testing.assert_close(a.weights, b.weights, rtol=0, atol=TOKEN_WEIGHTS)
        assert a.denominator == b.denominator and not a.skipped
        assert abs(a.loss_sum - b.loss_sum) <= LOSS * b.denominator
        assert math.isclose(a.grad_norm, b.grad_norm, rel_tol=GRAD_NORM)
    assert got.metrics.keys() == expected.metrics.keys()
    for name, value in expected.metrics.items():
        if not name.startswith(("packing/", "memory/")) and name != "batch/tokens":  # padding counts there
            assert abs(got.metrics[name] - value) <= METRICS * max(abs(value), 1.0), name
    if got.ledger:  # the ranks that write it alone have it
        check_ledger(got.ledger, expected.ledger)
    assert got.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        torch.testing.assert_close(got.weights[name], weight, rtol=0, atol=WEIGHTS, msg=lambda m, n=name: f"{n}: {m}")


def model_of(layout: str) -> str:
    """Only a mixture of experts has any to deal out."""
    return "qwen3_moe" if LAYOUTS[layout].get("ep", 1) > 1 or layout.endswith("allgather") else "qwen2"


def check_ledger(got: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same groups with the same counts; sums up to rounding."""
    assert (
        [row[0] for row in got["kinds"]]
        == [row[0] for row in expected["kinds"]]
        == ["number", "operator", "sign", "word"]
    )
    got, expected = (entry | {"kinds": [row[1:] for row in entry["kinds"]]} for entry in (got, expected))
    for part in ("total", "tokens", "other_tokens", "kinds", "positions", "quarters", "covariance"):
        a, b = (np.array(entry[part], dtype=float) for entry in (got, expected))
        counts = [-5, -3]  # columns count and probed, after the group's name
        assert a.shape == b.shape and np.array_equal(a[..., counts], b[..., counts]), part
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4, err_msg=part)


@pytest.mark.parametrize("layout", QUICK)
def test_selection_losses_and_weights_do_not_depend_on_the_layout(
    worlds: Worlds, rollouts: Rollouts, reference: References, layout: str
) -> None:
    count, reordered = QUICK[layout]
    model = model_of(layout)
    cases = [Case(loss, count, reordered, model=model) for loss in ("clip_cov", "kl_cov")] + EXTRA.get(layout, [])
    check_layout(worlds, rollouts, reference, layout, cases, timeout=240)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("layout", QUICK)
def test_every_split_and_packing_on_every_layout(
    worlds: Worlds, rollouts: Rollouts, reference: References, layout: str
) -> None:
    model = model_of(layout)
    counts = (2, 4, 8) if "vpp" in LAYOUTS[layout] else (1, 2, 8)
    cases = [Case(loss, n, order, model=model) for loss in LOSSES for n in counts for order in (False, True)]
    # as many micro-batches as the token budget asks for
    cases += [Case(loss, None, budget=64, model=model) for loss in LOSSES]
    if model == "qwen2":
        cases += [Case("kl_cov", n, model="qwen3") for n in counts[:2]]
    check_layout(worlds, rollouts, reference, layout, cases, timeout=1100)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", COMBINED)
def test_dimensions_at_once(worlds: Worlds, rollouts: Rollouts, reference: References, layout: str) -> None:
    model = model_of(layout)
    cases = [Case(loss, 2, True, model=model) for loss in LOSSES] + [Case("kl_cov", None, budget=64, model=model)]
    check_layout(worlds, rollouts, reference, layout, cases, timeout=500)


@pytest.mark.parametrize("loss", ["clip_cov", "kl_cov", "kl_cov_vocab"])
def test_the_frozen_step_can_tell(reference: References, loss: str, worlds: Worlds) -> None:
    """The selections are non-trivial and far from rounding; the updates move weights by far more than the tolerance."""
    outcome = reference[Case(loss)]
    first, second = outcome.updates
    assert not first.log_ratio.any() and second.log_ratio.abs().max() > 0.1  # on-policy, then off-policy
    for update in outcome.updates:
        assert int(update.selected.sum()) == math.floor(0.06 * len(update.ids)) == 7
        if loss == "clip_cov":
            inside, margin = clip_cov_candidates(update)
            assert int(inside.sum()) > 14 and not (update.selected & ~inside).any()
        else:
            largest = update.cov.sort(descending=True).values
            margin = float(largest[6] - largest[7])
            assert torch.equal(update.cov >= largest[6], update.selected)
        assert margin > 10 * COV
    start = worlds.run(1, initial_weights, "qwen2")[0]
    for name, weight in outcome.weights.items():
        assert float((weight - start[name]).abs().max()) > 100 * WEIGHTS, name
    other = reference[Case("ppo_clip")]
    assert abs(outcome.updates[1].grad_norm / other.updates[1].grad_norm - 1) > 1000 * GRAD_NORM


def clip_cov_candidates(update: Update) -> tuple[torch.Tensor, float]:
    """Tokens inside the bounds that PPO's clip left, and how far the nearest token is from changing sides."""
    low, high, bound = LOSSES["clip_cov"]["cov_low"], LOSSES["clip_cov"]["cov_high"], 1 + LOSSES["clip_cov"]["eps_high"]
    ratio = update.log_ratio.exp()
    margin = torch.cat([update.cov - low, update.cov - high, ratio - bound]).abs().min()
    clipped = (ratio > bound) & (update.advantages > 0)  # eps_low is 1: nothing is clipped from below
    return (update.cov > low) & (update.cov < high) & ~clipped, float(margin)


@pytest.mark.parametrize("layout", ["tp1", "dp2", "pp2"])
def test_a_mini_batch_that_overlong_filtering_masked_is_harmless(
    worlds: Worlds, rollouts: Rollouts, layout: str
) -> None:
    """All of the second mini-batch, or all of the step: nothing is selected, no update moves the weights."""
    half, everything = PROMPTS * SAMPLES // 2, PROMPTS * SAMPLES
    cases = [Case(loss, 2, filtered=n) for loss in ("clip_cov", "kl_cov", "ppo_clip") for n in (half, everything)]
    start = worlds.run(1, initial_weights, "qwen2")[0]
    for outcomes in worlds.run(LAYOUTS[layout]["world_size"], run_cases, layout, cases, rollouts):
        for case, outcome in zip(cases, outcomes, strict=True):
            assert [len(update.ids) for update in outcome.updates] == [119 if case.filtered == half else 0, 0]
            assert [update.skipped for update in outcome.updates] == [case.filtered == everything, True]
            moved = [name for name, weight in outcome.weights.items() if not torch.equal(weight, start[name])]
            assert len(moved) == (0 if case.filtered == everything else len(outcome.weights))
            assert all(torch.isfinite(weight).all() for weight in outcome.weights.values())


@pytest.mark.parametrize("loss", ["clip_cov", "kl_cov"])
def test_a_scope_of_one_micro_batch_does_depend_on_the_split(
    worlds: Worlds, rollouts: Rollouts, reference: References, loss: str
) -> None:
    """The authors' scope: the check above is able to fail. On one micro-batch the two scopes are the same."""
    split = Case(loss, 8, scope="microbatch")
    ((outcome,),) = worlds.run(1, run_cases, "tp1", [split], rollouts)
    whole, exact = reference[Case(loss, scope="microbatch")], reference[Case(loss)]
    for a, b, c in zip(outcome.updates, whole.updates, exact.updates, strict=True):
        assert torch.equal(b.ids[b.selected], c.ids[c.selected])
        assert set(a.ids[a.selected].tolist()) != set(b.ids[b.selected].tolist())
    with pytest.raises(AssertionError):
        check_outcome(outcome, whole)
