"""The engine's log-probabilities as those of the old policy: what is computed, what is logged, what ends a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_rl.config import parse_config
from megatron_rl.packing import Layout, pack
from tests.policy.tiny import make_advantages, make_config, make_rollouts, policy_of
from tests.tiny import errors_of_each, measured, rows_of, tiny_raw, train_each
from tests.worlds import Worlds

LIMIT = 280.0  # seconds, see test_train.py
STEPS = 3
KL_COV = {"type": "kl_cov", "select_fraction": 0.1}
MASK = {"rollout_correction": {"weights": "none", "max_negative_kl": 0.01}}
OLD_POLICY = {"mismatch/abs_mean", "mismatch/abs_max", "mismatch/kl", "mismatch/kl_k1", "entropy/mean", "entropy/p10"}
MARKED = {"cov/mean", "entropy/predicted_change", "entropy/realised_change"}


def _raw(folder: Path, name: str, loss: dict[str, Any], every: int | None, **sections: Any) -> dict[str, Any]:
    """`every`: None recomputes."""
    old = {"old_logprobs": "rollout", "old_logprobs_check_every": every} if every else {}
    sections = {"algorithm": old, "loss": loss, "train": {"num_steps": STEPS}} | sections
    raw = tiny_raw(folder, name, **sections)
    raw["logging"] |= {"samples_per_step": 16}
    return raw


@contextmanager
def _counted_passes() -> Iterator[list[int]]:
    """The forward passes without an update, counted per step, over mini-batches."""
    from megatron_rl.policy.policy import MegatronPolicy

    stats, begin, passes = MegatronPolicy.stats, MegatronPolicy.with_old_logprobs, []

    def begun(policy: Any, batch: Any) -> Any:
        passes.append(0)
        return begin(policy, batch)

    def counted(policy: Any, *arguments: Any, **options: Any) -> Any:
        passes[-1] += 1
        return stats(policy, *arguments, **options)

    with (
        mock.patch.object(MegatronPolicy, "with_old_logprobs", begun),
        mock.patch.object(MegatronPolicy, "stats", counted),
    ):
        yield passes


def _train_counting(raws: list[dict[str, Any]]) -> tuple[list[dict[str, torch.Tensor]], list[list[int]]]:
    weights, counts = [], []
    for raw in raws:
        with _counted_passes() as passes:
            weights += train_each([raw])
        counts.append(passes)
    return weights, counts


RUNS: dict[str, tuple[dict[str, Any], int | None]] = {
    "ppo": ({"type": "ppo_clip"}, None),
    "ppo_2": ({"type": "ppo_clip"}, 2),
    "ppo_1": ({"type": "ppo_clip"}, 1),
    "kl_cov": (KL_COV | MASK, None),
    "kl_cov_2": (KL_COV | MASK, 2),
    "kl_cov_1": (KL_COV | MASK, 1),
}


@pytest.fixture(scope="module")
def runs(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Per name: raw config, final weights, passes of each step."""
    folder = tmp_path_factory.mktemp("old")
    raws = {name: _raw(folder, name, *choice) for name, choice in RUNS.items()}
    weights, counts = worlds.run(2, _train_counting, list(raws.values()), timeout=LIMIT)[0]
    return {name: found for name, *found in zip(raws, raws.values(), weights, counts, strict=True)}


def test_a_step_pays_for_what_it_must_know(runs: dict[str, Any]) -> None:
    """Two mini-batches a step. The probe is a pass of the first; KL-Cov needs the current weights' statistics."""
    passes = {name: counts for name, (_, _, counts) in runs.items()}
    assert passes["ppo"] == passes["ppo_1"] == [2 + 1] * STEPS
    assert passes["ppo_2"] == [3, 0, 3]
    assert passes["kl_cov"] == passes["kl_cov_1"] == [2 + 1 + 1] * STEPS
    assert passes["kl_cov_2"] == [4, 2 + 1, 4]


@pytest.mark.parametrize("loss", ["ppo", "kl_cov"])
def test_rows_without_the_pass_lack_what_it_tells(runs: dict[str, Any], loss: str) -> None:
    raw = runs[f"{loss}_2"][0]
    for step, row in enumerate(rows_of(raw)):
        checked = step % 2 == 0
        assert [name in row for name in OLD_POLICY] == [checked] * len(OLD_POLICY)
        assert [name in row for name in MARKED] == [checked or loss == "kl_cov"] * len(MARKED)
        assert row["loss/entropy"] > 0 and "non_finite" not in row
        if checked:
            assert 0 < row["mismatch/abs_mean"] < 1e-5
    assert [row["step"] for row in rows_of(raw, "ledger.jsonl")] == [0, 2]
    samples = rows_of(raw, "samples.jsonl")
    assert len(samples) == 16 * STEPS and all(("tokens" in row) == (row["step"] != 1) for row in samples)


@pytest.mark.parametrize("loss", ["ppo", "kl_cov"])
def test_a_check_changes_nothing(runs: dict[str, Any], loss: str) -> None:
    (sparse, some, _), (dense, every, _) = runs[f"{loss}_2"], runs[f"{loss}_1"]
    assert all(torch.equal(some[name], every[name]) for name in every)
    for few, all_of_them in zip(rows_of(sparse), rows_of(dense), strict=True):
        kept = measured(few)
        assert kept == {name: value for name, value in measured(all_of_them).items() if name in kept}


@pytest.mark.parametrize("loss", ["ppo", "kl_cov"])
def test_an_engine_that_agrees_gives_the_same_step(runs: dict[str, Any], loss: str) -> None:
    recomputed, taken = (rows_of(runs[name][0])[0] for name in (loss, f"{loss}_2"))
    assert loss == "ppo" or 0 < taken["loss/is_dropped_negative_fraction"] < 1
    for name in ("optimizer/grad_norm", "loss/policy", "loss/entropy", "reward/mean", "cov/mean"):
        assert taken[name] == pytest.approx(recomputed[name], rel=1e-3, abs=1e-6), name


def _old_policies() -> None:
    config = make_config(None, algorithm={"old_logprobs": "rollout"}, train={"micro_batch_tokens": 400})
    kl_cov = make_config(None, loss=KL_COV).loss
    with policy_of(config) as policy:
        for step in (0, 1):
            rollouts = pack(make_rollouts(), make_advantages(), Layout.of(config, policy.groups), step=step)
            batch = policy.with_old_logprobs(rollouts)
            for micro_batch in batch.micro_batches:
                assert torch.equal(micro_batch.old_logprobs, micro_batch.rollout_logprobs)
                assert (micro_batch.stats is not None) == (step == 0)
            first, second = batch.mini_batches[:2]
            assert policy.with_selection_stats(first, config.loss) is first  # PPO marks nothing
            (marked,) = policy.with_selection_stats(first, kl_cov).micro_batches
            assert torch.equal(marked.old_logprobs, marked.stats.logprobs)
            assert policy._kept._output is not None  # its update begins with this pass
            (later,) = policy.with_selection_stats(second, kl_cov).micro_batches
            assert torch.equal(later.old_logprobs, later.rollout_logprobs) and later.stats is not None


def test_the_old_policy_is_the_engines_but_where_it_is_known_exactly(worlds: Worlds) -> None:
    """KL-Cov's first mini-batch is computed before the weights move."""
    worlds.run(1, _old_policies)


def _without_sync(raws: list[dict[str, Any]]) -> list[tuple[str, bool, str]]:
    """The engine keeps its first weights, and claims to have the current ones."""
    from megatron_rl.rollout.served import Served

    sync = Served.sync

    def only_first(served: Served) -> None:
        if served.weight_version == 0:
            sync(served)
        served.engine.weight_version = served.weight_version  # type: ignore[attr-defined]

    with mock.patch.object(Served, "sync", only_first):
        return errors_of_each(raws)


def test_an_engine_that_drifts_away_ends_the_run_before_the_weights_move(worlds: Worlds, tmp_path: Path) -> None:
    """float32: rounding passes, and an engine whose weights are two steps old does not. What the steps before reached
    is saved."""
    options: dict[str, Any] = {"optimizer": {"lr": 1e-2}, "train": {"num_steps": 5}}
    raws = [_raw(tmp_path, name, KL_COV, 2, **options) for name in ("fresh", "stale")]
    assert worlds.run(2, errors_of_each, raws[:1], timeout=LIMIT)[0] == [("", False, "")]
    for rank in worlds.run(2, _without_sync, raws[1:], timeout=LIMIT):
        ((kind, is_users, message),) = rank
        assert (kind, is_users) == ("EngineError", True)
        assert message.startswith("step 3, before its updates: engine and trainer differ in the log-probabilities of")
        assert "nats on average, allowed 0.001." in message and "raise algorithm.max_mismatch" in message
    assert len(rows_of(raws[1])) == 2
    assert [path.name for path in (parse_config(raws[1]).run_dir / "checkpoints").glob("step_*")] == ["step_00000002"]


def test_the_stated_limit_counts(worlds: Worlds, tmp_path: Path) -> None:
    raws = [_raw(tmp_path, name, {"type": "ppo_clip"}, 2) for name in ("low", "high")]
    for raw, limit in zip(raws, (1e-12, 1.0), strict=True):
        raw["algorithm"]["max_mismatch"] = limit
    low, high = (message for _, _, message in worlds.run(2, errors_of_each, raws, timeout=LIMIT)[0])
    assert "step 1, before its updates" in low and "allowed 1e-12." in low and high == ""
    assert rows_of(raws[0]) == [] and len(rows_of(raws[1])) == STEPS
