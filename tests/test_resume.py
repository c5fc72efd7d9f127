"""A run that was killed, stopped or branched off goes on as if it had not been, or says why it cannot."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import torch
from transformers import AutoConfig, PretrainedConfig

from megatron_rl.config import Config, dump_config, parse_config
from megatron_rl.config_checks import ConfigError
from megatron_rl.errors import UserError
from megatron_rl.resume import check_drift, checkpoint_to_resume
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
        "select_fraction": 0.2,
        "entropy_band": {"low": 0.1, "high": 2.5, "option": "kl_coef", "minimum": 0.1, "maximum": 2.0, "gain": 0.2},
    },
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
    for i, option in ((0, "entropy_coef"), (4, "kl_coef")):
        straight, _, cut, branch = raws[i : i + 4]
        rows = [measured(row) for row in rows_of(straight)]
        assert [measured(row) for row in rows_of(cut)] == rows
        assert rows_of(cut, "ledger.jsonl") == rows_of(straight, "ledger.jsonl") and len(rows) == 5
        values = [row[f"control/{option}"] for row in rows]
        assert len(set(values)) == 5 and values[3:] == [row[f"control/{option}"] for row in rows_of(branch)]
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
        return {"eval/accuracy": ACCURACY[collector.engine.weight_version]}

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


# --- which checkpoint, and with which config --------------------------------------------------------------------------


def _config(folder: Path, **sections: Any) -> Config:
    return parse_config(tiny_raw(folder, **sections))


def _checkpoint(run_dir: Path, step: int, config: Config) -> Path:
    """What `resume` reads of a checkpoint."""
    path = run_dir / "checkpoints" / f"step_{step:08d}"
    _hf().save_pretrained(path / "hf")
    (path / "config.yaml").write_text(dump_config(config))
    (path / "metadata.json").touch()
    return path


def _hf(**changes: Any) -> PretrainedConfig:
    return AutoConfig.for_model(**(HF | {"vocab_size": 21} | changes))


@pytest.mark.parametrize("inside", ["nonesuch", "run", "run/checkpoints", "converted"])
def test_what_is_no_checkpoint_is_refused_at_load(tmp_path: Path, inside: str) -> None:
    path = _checkpoint(tmp_path / "run", 4, _config(tmp_path))
    shutil.copytree(path, tmp_path / "converted")
    (tmp_path / "converted" / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=f"train.resume={tmp_path}/{inside}") as caught:
        _config(tmp_path, train=TRAIN | {"resume": str(tmp_path / inside)})
    assert (f"did you mean {path}?" in str(caught.value)) == inside.startswith("run")
    assert ("set model.path to it" in str(caught.value)) == (inside == "converted")
    assert _config(tmp_path, train=TRAIN | {"resume": str(path)}).train.resume == str(path)


def test_the_best_needs_evaluations(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keep_best=true has no evaluations"):
        _config(tmp_path, train=TRAIN | {"keep_best": True})


def test_which_checkpoint_a_run_goes_on_from(tmp_path: Path) -> None:
    def config(resume: str | Path, name: str = "own") -> Config:
        return _config(tmp_path, name=name, train=TRAIN | {"resume": str(resume)})

    elsewhere = _checkpoint(tmp_path / "other", 7, config("auto", "other"))
    assert checkpoint_to_resume(config("auto"), None) is None
    assert checkpoint_to_resume(config("never"), None) is None
    assert checkpoint_to_resume(config(elsewhere), None) == elsewhere
    older, newest = (_checkpoint(tmp_path / "own", step, config(elsewhere)) for step in (8, 9))
    assert checkpoint_to_resume(config("auto"), newest) == newest
    assert checkpoint_to_resume(config(elsewhere), newest) == newest  # it began there
    assert checkpoint_to_resume(config(newest), newest) == newest
    with pytest.raises(UserError, match="holds an earlier run and train.resume=never would overwrite it"):
        checkpoint_to_resume(config("never"), newest)
    with pytest.raises(UserError, match=f"would go back behind {newest} of the same run"):
        checkpoint_to_resume(config(older), newest)
    third = _checkpoint(tmp_path / "third", 1, config("auto", "third"))
    with pytest.raises(UserError, match=f"did not begin from train.resume={third} .* says {elsewhere}"):
        checkpoint_to_resume(config(third), newest)


CHANGES: dict[str, tuple[dict[str, Any], list[str], bool]] = {
    # options, what is said of them, whether the run is refused when the checkpoint is its own
    "nothing": ({}, [], False),
    "harmless": (
        {
            "name": "renamed",
            "parallel": {"tp": 1, "pp": 2},
            "optimizer": {"lr": 1e-4},
            "train": {"num_steps": 9, "micro_batch_tokens": 512, "save_every": 3, "async_save": True},
            "logging": {"samples_per_step": 5},
            "rollout": {"batch_size": 3},
            "model": {"hf_config": HF | {"vocab_size": 21}, "recompute": "full"},  # the same, more explicitly
        },
        [],
        False,
    ),
    "sampling": ({"rollout": {"temperature": 0.9}}, ["rollout.temperature: 1.0 -> 0.9"], False),
    "loss": (
        {"loss": {"type": "kl_cov"}},
        ["loss.eps_high: 0.2 -> None", "loss.kl_coef: None -> 1.0", "loss.type: 'ppo_clip' -> 'kl_cov'"],
        False,
    ),
    "batch": ({"train": {"prompts_per_minibatch": 1}}, ["train.prompts_per_minibatch: 2 -> 1"], False),
    "schedule": (
        {"optimizer": {"schedule": "linear"}, "train": {"num_steps": 9}},
        ["optimizer.schedule: 'constant' -> 'linear'", "optimizer.schedule now ends at train.num_steps=9"],
        False,
    ),
    "initial policy": ({"warm_start": {"steps": 3}}, ["warm_start.steps: None -> 3"], False),
    "seed": ({"seed": 4}, ["seed: 3 -> 4"], True),
    "data": ({"data": {"num_train": 65}}, ["data.num_train: 64 -> 65"], True),
    "reference": (
        {"warm_start": {"steps": 3}, "loss": {"ref_kl_coef": 0.1}},
        ["warm_start.steps: None -> 3"],
        True,
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_options(tmp_path: Path, name: str) -> None:
    sections, said, is_refused = CHANGES[name]
    path = _checkpoint(tmp_path / "run", 4, _config(tmp_path))
    config = _config(tmp_path, **(sections | {"train": TRAIN | sections.get("train", {})}))
    notes = check_drift(path, config, _hf(), own=False)
    assert (notes == []) == (said == []), notes
    for text in said:
        assert any(text in note for note in notes), notes
    if is_refused:
        with pytest.raises(UserError, match=f"cannot go on from {path}") as caught:
            check_drift(path, config, _hf(), own=True)
        assert all(text in str(caught.value) for text in said) and f"train.resume={path}" in str(caught.value)
    else:
        assert check_drift(path, config, _hf(), own=True) == notes


@pytest.mark.parametrize("own", [True, False])
def test_another_architecture_is_always_refused(tmp_path: Path, own: bool) -> None:
    """Also one whose shapes are the same, which the tensors would not tell."""
    path = _checkpoint(tmp_path / "run", 4, _config(tmp_path))
    with pytest.raises(UserError, match="the model's rms_norm_eps: 1e-06 -> 1e-05"):
        check_drift(path, _config(tmp_path), _hf(rms_norm_eps=1e-5), own=own)
    with pytest.raises(UserError, match="model.dtype: 'float32' -> 'bfloat16'"):
        check_drift(path, _config(tmp_path, model={"dtype": "bfloat16"}), _hf(), own=own)


def test_other_problems_behind_the_same_names_are_refused(worlds: Worlds, tmp_path: Path) -> None:
    """A file that was edited between two processes: as many rows, another answer."""
    from megatron_rl.data import build_tokenizer

    build_tokenizer(_config(tmp_path)).save_pretrained(tmp_path / "tokenizer")
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
