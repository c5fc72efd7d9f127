"""A run that was killed, stopped or branched off goes on as if it had not been, or says why it cannot."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import torch

from megatron_rl.config import parse_config
from tests.test_run_faults import Command, start  # noqa: F401  a fixture
from tests.tiny import HF, errors_of_each, measured, rows_of, tiny_raw, train_each, trained
from tests.worlds import Worlds

LIMIT = 280.0
TRAIN = {"prompts_per_step": 4, "prompts_per_minibatch": 2, "micro_batch_tokens": 96}
Weights = dict[str, torch.Tensor]

# --- killed runs ------------------------------------------------------------------------------------------------------

# grades as tests.tiny:mostly_digits does; hangs once in the middle of step 3 (8 gradings a step and rank), and in the
# middle of the save after step 6 while there is a file `slow`
REWARD = """
import os, time
from pathlib import Path
from tests.tiny import mostly_digits

calls, fsync = 0, os.fsync

def slow_fsync(handle):
    time.sleep(60 if Path("slow").exists() and Path("killed/checkpoints/.step_00000006").exists() else 0)
    fsync(handle)

os.fsync = slow_fsync

def score(response, answer):
    global calls
    calls += 1
    if os.environ["RANK"] == "1" and calls == 3 * 8 + 5 and not Path("hangs").exists():
        Path("hangs").touch()
        time.sleep(600)
    return mostly_digits(response, answer)
"""


def _kill_when(command: Command, condition: Callable[[], bool]) -> None:
    """SIGKILL to the process that holds the run together: no other is left that could still write."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert command.process.poll() is None, command.process.communicate()
        assert time.monotonic() < deadline, "what to wait for did not come"
        time.sleep(0.002)
    processes = psutil.Process(command.process.pid).children(recursive=True)
    command.process.send_signal(signal.SIGKILL)
    assert not psutil.wait_procs(processes, timeout=5)[1]
    assert command.end()[0] == -signal.SIGKILL


def _names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.mark.timeout(600)
@pytest.mark.parametrize("in_background", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["sync", "async"])
def test_a_run_killed_in_a_step_and_in_a_save_ends_like_one_that_was_not(
    worlds: Worlds,
    tmp_path: Path,
    start: Callable[[dict[str, Any]], Command],  # noqa: F811
    in_background: bool,
) -> None:
    """Bit for bit on TP2: weights, metrics, samples. What the second kill left goes on under DP2 and PP2 as well."""
    options: dict[str, Any] = {
        "loss": {"type": "kl_cov", "select_fraction": 0.05, "ref_kl_coef": 0.1},
        "optimizer": {"schedule": "cosine", "warmup_steps": 3, "weight_decay": 0.01},
        "train": {"num_steps": 8, "save_every": 2, "eval_every": 4, "async_save": in_background, **TRAIN},
        "logging": {"samples_per_step": 16},
    }
    (tmp_path / "killing.py").write_text(REWARD)
    raw = tiny_raw(tmp_path, "killed", **options, reward={"function": "killing:score"})
    run_dir = tmp_path / "killed"

    _kill_when(start(raw), (tmp_path / "hangs").exists)
    assert [row["step"] for row in rows_of(raw)] == [0, 1, 2] and _names(run_dir) == ["step_00000002"]

    (tmp_path / "slow").touch()
    draft = run_dir / "checkpoints" / ".step_00000006"
    _kill_when(start(raw), lambda: any(draft.glob("*.distcp")))
    (tmp_path / "slow").unlink()
    assert [row["step"] for row in rows_of(raw)][:6] == [0, 1, 2, 3, 4, 5]
    assert _names(run_dir) == [".step_00000006", "step_00000002", "step_00000004"]
    others = {}
    for name, parallel in (("dp2", {"tp": 1, "world_size": 2}), ("pp2", {"tp": 1, "pp": 2})):
        shutil.copytree(run_dir, tmp_path / name)
        others[name] = tiny_raw(tmp_path, name, **options, parallel=parallel)

    code, out, err = start(raw).end()
    assert code == 0 and "Traceback" not in err, err
    assert f"continuing from {run_dir}/checkpoints/step_00000004, 4 steps" in out
    assert _names(run_dir) == ["step_00000006", "step_00000008"]

    straight = tiny_raw(tmp_path, "straight", **options)
    expected, ended, *elsewhere = worlds.run(2, train_each, [straight, raw | {"reward": {}}], timeout=LIMIT)[0]
    assert [measured(row) for row in rows_of(raw)] == [measured(row) for row in rows_of(straight)]
    assert rows_of(raw, "samples.jsonl") == rows_of(straight, "samples.jsonl")
    assert _equal(ended, expected)
    elsewhere = worlds.run(2, train_each, list(others.values()), timeout=LIMIT)[0]
    for (name, other), weights in zip(others.items(), elsewhere, strict=True):
        print(f"{name}: {_worst(weights, expected):.1e}")
        assert 0 < _worst(weights, expected) < 1e-5
        assert _texts(other) == _texts(straight)


def _stopped_between_batches(raw: dict[str, Any]) -> str:
    """Train until rank 1 is asked to stop in a step of several generation batches, the second step or later; return
    what was said."""
    from megatron_rl import launch

    def stop_requested(run_dir: Path | None = None) -> bool:
        in_a_step = sys._getframe(1).f_code.co_name != "train"
        return os.environ["RANK"] == "1" and in_a_step and len(rows_of(raw)) >= 1

    said = io.StringIO()
    parse_config(raw).run_dir.mkdir(parents=True, exist_ok=True)
    (parse_config(raw).run_dir / "metrics.jsonl").touch()
    with mock.patch.object(launch, "stop_requested", stop_requested), contextlib.redirect_stdout(said), trained(raw):
        return said.getvalue()


def test_a_run_stopped_between_generation_batches_repeats_the_step(worlds: Worlds, tmp_path: Path) -> None:
    """The batches that the step had are dropped on every rank; resumed, it draws the same prompts: bit for bit."""
    options: dict[str, Any] = {
        "algorithm": {"dynamic_sampling": {"enabled": True}},
        "reward": {"function": "tests.test_train:seldom"},
        "train": {"num_steps": 4, **TRAIN},
        "logging": {"samples_per_step": 16},
    }
    raw, straight = (tiny_raw(tmp_path, name, **options) for name in ("stopped", "straight"))
    said = worlds.run(2, _stopped_between_batches, raw, timeout=LIMIT)[0]
    steps = len(rows_of(raw))
    assert 1 <= steps < 4 and f"stopped in step {steps + 1}, which had kept" in said and "begun anew" in said
    assert _names(tmp_path / "stopped") == [f"step_{steps:08d}"]
    ended, expected = worlds.run(2, train_each, [raw, straight], timeout=LIMIT)[0]
    assert rows_of(straight)[steps]["sampling/num_groups"] > raw["train"]["prompts_per_step"]
    assert [measured(row) for row in rows_of(raw)] == [measured(row) for row in rows_of(straight)]
    assert rows_of(raw, "samples.jsonl") == rows_of(straight, "samples.jsonl") and _equal(ended, expected)


def _texts(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """The logged samples without their tokens' statistics, which another layout rounds otherwise."""
    return [{key: value for key, value in row.items() if key != "tokens"} for row in rows_of(raw, "samples.jsonl")]


def _equal(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _worst(a: Weights, b: Weights) -> float:
    return max((a[name] - b[name]).abs().max().item() for name in a)


# --- what comes back --------------------------------------------------------------------------------------------------


def _train_and_listen(raws: list[dict[str, Any]]) -> list[tuple[Weights, str]]:
    """One run after the other: the final weights of each, and what it printed."""
    found = []
    for raw in raws:
        with contextlib.redirect_stdout(io.StringIO()) as printed, trained(raw) as run:
            weights = {name: tensor.clone() for name, tensor in run.policy.hf_weights()}
        found.append((weights, printed.getvalue()))
    return found


def test_the_reference_is_the_initial_policy_again_and_more_steps_may_be_asked_for(
    worlds: Worlds, tmp_path: Path
) -> None:
    """Had the second process taken the resumed weights for its reference, its first update would see a KL of 0."""
    options: dict[str, Any] = {
        "warm_start": {"steps": 3, "batch_size": 8, "cache_dir": str(tmp_path / "warm")},
        "loss": {"ref_kl_coef": 0.5},
    }
    straight, short, longer = (
        tiny_raw(tmp_path, name, **options, train={"num_steps": steps, "save_final": True, **TRAIN})
        for name, steps in (("straight", 4), ("resumed", 2), ("resumed", 4))
    )
    (expected, _), _, (weights, printed), (same, nothing) = worlds.run(
        2, _train_and_listen, [straight, short, longer, longer], timeout=LIMIT
    )[0]
    assert _equal(weights, expected) and _equal(same, expected)
    assert [measured(row) for row in rows_of(longer)] == [measured(row) for row in rows_of(straight)]
    assert all(row["loss/ref_kl"] > 0 for row in rows_of(longer)[1:])
    assert f"continuing from {tmp_path}/resumed/checkpoints/step_00000002, 2 steps" in printed
    assert f"nothing to train: {tmp_path}/resumed has 4 steps and train.num_steps=4; raise it to go on" in nothing


CONTROLLED: dict[str, dict[str, Any]] = {
    # an untrained policy's entropy is about 3 nats: below the target, above the band
    "adaptive": {"type": "forking", "adaptive_entropy": {"target_entropy": 9.0, "step": 0.01}},
    "band": {
        "type": "kl_cov",
        "select_fraction": {"from": 0.2, "to": 0.1, "steps": 4},
        "entropy_band": {"low": 0.1, "high": 2.5, "option": "kl_coef", "minimum": 0.1, "maximum": 2.0, "gain": 0.2},
    },
    "own": {"type": "examples.my_method:UsualLoss"},  # a state of the loss itself
}


def test_what_follows_the_entropy_goes_on_exactly(worlds: Worlds, tmp_path: Path) -> None:
    """Coefficients, the law's history and the ledger, bit for bit; a branch takes over the coefficients."""
    raws = []
    for loss in CONTROLLED:
        path = str(tmp_path / f"{loss}_cut" / "checkpoints" / "step_00000003")
        runs = (("straight", 5, "auto"), ("cut", 3, "auto"), ("cut", 5, "auto"), ("branch", 5, path))
        for name, steps, resume in runs:
            train = {"num_steps": steps, "save_final": steps == 3, "resume": resume, **TRAIN}
            raws.append(tiny_raw(tmp_path, f"{loss}_{name}", loss=CONTROLLED[loss], train=train))
    weights = worlds.run(2, train_each_and_remember_the_law, raws, timeout=LIMIT)[0]
    for i, option in ((0, "entropy_coef"), (4, "kl_coef"), (8, "usual_entropy")):
        straight, _, cut, branch = raws[i : i + 4]
        rows = [measured(row) for row in rows_of(straight)]
        assert [measured(row) for row in rows_of(cut)] == rows
        assert rows_of(cut, "ledger.jsonl") == rows_of(straight, "ledger.jsonl") and len(rows) == 5
        values = [row[f"control/{option}"] for row in rows]
        assert len(set(values)) == 5 and values[3:] == [row[f"control/{option}"] for row in rows_of(branch)]
        if option == "kl_coef":
            moved = [row["control/select_fraction"] for row in rows_of(branch)]
            assert moved == [row["control/select_fraction"] for row in rows[3:]] == pytest.approx([0.125, 0.1])
        (first, law), (second, law_of_cut), (_, law_of_branch) = (weights[i + k] for k in (0, 2, 3))
        assert _equal(first, second) and law == law_of_cut
        assert len(law["entropy"]) == 5 and len(law_of_branch["entropy"]) == 2  # another run's law


def train_each_and_remember_the_law(raws: list[dict[str, Any]]) -> list[tuple[Weights, dict[str, Any]]]:
    found = []
    for raw in raws:
        with trained(raw) as run:
            weights = {name: tensor.clone() for name, tensor in run.policy.hf_weights()}
            found.append((weights, run.law.state()))
    return found


ACCURACY = {1: 0.2, 2: 0.5, 3: 0.5, 4: 0.4, 5: 0.45, 6: 0.3}  # after that many steps


def _train_with_accuracies(raws: list[dict[str, Any]]) -> None:
    from megatron_rl.rollout.collect import Collector

    def evaluated(collector: Any, *_: Any) -> dict[str, float]:
        return {"eval/accuracy": ACCURACY[collector._engine().weight_version]}

    with mock.patch.object(Collector, "evaluate", evaluated):
        train_each(raws)


@pytest.mark.parametrize("in_background", [False, True], ids=["sync", "async"])
def test_the_best_checkpoint_outlives_a_resume(worlds: Worlds, tmp_path: Path, in_background: bool) -> None:
    """The second process must remember 0.5, or it would take 0.4 and then 0.45 for the best."""
    train = {"eval_every": 1, "keep_best": True, "keep_checkpoints": 1, "async_save": in_background, **TRAIN}
    raws = [tiny_raw(tmp_path, train=train | {"num_steps": steps, "save_final": True}) for steps in (3, 6)]
    worlds.run(2, _train_with_accuracies, raws, timeout=LIMIT)
    assert _names(tmp_path / "tiny") == ["best", "step_00000002", "step_00000006"]
    assert (tmp_path / "tiny" / "checkpoints" / "best").resolve().name == "step_00000002"


# --- from another run's checkpoint ------------------------------------------------------------------------------------


def test_a_run_branches_off_from_a_checkpoint_and_then_goes_on_by_itself(worlds: Worlds, tmp_path: Path) -> None:
    train = {"num_steps": 2, "save_final": True, **TRAIN}
    source, straight = (tiny_raw(tmp_path, "source", train=train | {"num_steps": steps}) for steps in (2, 6))
    path = tmp_path / "source" / "checkpoints" / "step_00000002"
    branching = train | {"num_steps": 4, "resume": str(path)}
    same, other = (tiny_raw(tmp_path, name, seed=seed, train=branching) for name, seed in (("same", 3), ("other", 4)))
    worlds.run(2, train_each, [source], timeout=LIMIT)
    ranks = worlds.run(2, _train_and_listen, [same, other], timeout=LIMIT)
    (_, same_said), (other_weights, other_said) = ranks[0]
    assert f"other problems or another seed than {path}: they are drawn from the start" in other_said
    assert "changed since step_00000002: seed: 3 -> 4" in other_said and "changed" not in same_said

    # the same commands once more: their own checkpoints, though the one that they began from is gone
    shutil.move(path.parent, tmp_path / "moved")
    longer = same | {"train": branching | {"num_steps": 6}}
    (same_weights, same_said), (again, other_said) = worlds.run(2, _train_and_listen, [longer, other], timeout=LIMIT)[0]
    assert f"continuing from {tmp_path}/same/checkpoints/step_00000004, 4 steps" in same_said
    assert f"continuing from {tmp_path}/other/checkpoints/step_00000004, 4 steps" in other_said
    assert _equal(again, other_weights)

    shutil.move(tmp_path / "moved", path.parent)
    expected = worlds.run(2, train_each, [straight], timeout=LIMIT)[0][0]
    assert _equal(same_weights, expected) and not _equal(other_weights, expected)
    assert [measured(row) for row in rows_of(longer)] == [measured(row) for row in rows_of(straight)[2:]]


def test_the_same_problems_go_on_wherever_they_lie(worlds: Worlds, tmp_path: Path) -> None:
    """A scratch folder that moved; and held-out problems that are others there."""
    from megatron_rl.data.tokenizer import build_tokenizer

    build_tokenizer(parse_config(tiny_raw(tmp_path))).save_pretrained(tmp_path / "a" / "tokenizer")
    lines = [json.dumps({"problem": f"{i}+0=", "answer": str(i)}) for i in range(8)]
    (tmp_path / "a" / "train.jsonl").write_text("\n".join(lines))
    (tmp_path / "a" / "eval.jsonl").write_text("\n".join(lines[:2]))

    def raw(folder: str, steps: int, name: str = "tiny") -> dict[str, Any]:
        train = {"num_steps": steps, "save_final": True, **TRAIN}
        raw = tiny_raw(tmp_path, name, train=train, parallel={"tp": 1})
        paths = {f"{part}_path": str(tmp_path / folder / f"{part}.jsonl") for part in ("train", "eval")}
        tokenizer = {"tokenizer": str(tmp_path / folder / "tokenizer")}
        return raw | {
            "data": {"type": "jsonl", "max_prompt_tokens": 8} | paths | tokenizer,
            "model": {"hf_config": HF | {"vocab_size": 21}},
        }

    straight, _ = worlds.run(1, train_each, [raw("a", 3, "straight"), raw("a", 1)], timeout=LIMIT)[0]
    shutil.move(tmp_path / "a", tmp_path / "b")
    resumed = worlds.run(1, train_each, [raw("b", 3)], timeout=LIMIT)[0][0]
    assert _equal(resumed, straight)
    (tmp_path / "b" / "eval.jsonl").write_text("\n".join(lines[1:3]))
    found = worlds.run(1, errors_of_each, [raw("b", 4)], timeout=LIMIT)[0][0]
    assert found[:2] == ("UserError", True) and "the held-out problems are not those of its run" in found[2]


def test_other_problems_behind_the_same_names_are_refused(worlds: Worlds, tmp_path: Path) -> None:
    """A file that was edited between two processes: as many rows, another answer."""
    from megatron_rl.data.tokenizer import build_tokenizer

    build_tokenizer(parse_config(tiny_raw(tmp_path))).save_pretrained(tmp_path / "tokenizer")
    data = {
        "type": "jsonl",
        "train_path": str(tmp_path / "train.jsonl"),
        "tokenizer": str(tmp_path / "tokenizer"),
        "max_prompt_tokens": 8,
    }
    raws = [tiny_raw(tmp_path, train={"num_steps": n, "save_final": True, **TRAIN}) for n in (1, 2)]
    for raw in raws:
        raw["data"], raw["model"] = data, {"hf_config": HF | {"vocab_size": 21}}
    for answers, raw, error in (
        ("01234567", raws[0], ""),
        ("01234568", raws[1], "the training problems are not those"),
    ):
        lines = [json.dumps({"problem": f"{i}+0=", "answer": answer}) for i, answer in enumerate(answers)]
        (tmp_path / "train.jsonl").write_text("\n".join(lines))
        for found in worlds.run(2, errors_of_each, [raw], timeout=LIMIT):
            assert error in found[0][2] and bool(found[0][2]) == bool(error), found
