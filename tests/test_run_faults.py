"""Signals and dead ranks, through the real command line, and moments that no signal of a test hits.

Nothing may hang, nothing may be lost or counted twice, and the message names the cause.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import torch
import yaml

from megatron_rl import cli, files, launch
from megatron_rl.config import parse_config
from megatron_rl.errors import UserError
from tests.tiny import errors_of_each, measured, rows_of, tiny_raw, train_each
from tests.worlds import ROOT, Worlds

LIMIT = (
    280.0  # seconds a world or a command may take: on a machine that does other things too, ranks wait for each other
)
TRAIN = {"prompts_per_step": 4, "prompts_per_minibatch": 2, "micro_batch_tokens": 96}

# --- the command line -------------------------------------------------------------------------------------------------


class Command:
    """`megatron-rl train` on a config, as a process."""

    def __init__(self, raw: dict[str, Any], folder: Path) -> None:
        self.raw, self.pids = raw, set[int]()
        config = folder / f"{raw['name']}.yaml"
        config.write_text(yaml.safe_dump(raw))
        env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "megatron_rl", "train", str(config)],
            cwd=folder,
            env=env | {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "MEGATRON_RL_DEVICE": "cpu"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def until_row(self, step: int) -> None:
        """Wait until metrics.jsonl has the step."""
        deadline = time.monotonic() + LIMIT
        while _last_step(self.raw) < step:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, f"step {step} did not come"
            time.sleep(0.01)
        self.pids |= {child.pid for child in psutil.Process(self.process.pid).children(recursive=True)}

    def rank(self, rank: int) -> int:
        """Its process id."""
        children = psutil.Process(self.process.pid).children()
        return next(child.pid for child in children if child.environ().get("RANK") == str(rank))

    def end(self) -> tuple[int, str, str]:
        """(exit code, stdout, stderr); no process that was seen is left."""
        out, err = self.process.communicate(timeout=LIMIT)
        left = [pid for pid in self.pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
        assert not left, f"processes {left} outlive the run"
        return self.process.returncode, out, err


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[dict[str, Any]], Command]]:
    commands: list[Command] = []

    def _start(raw: dict[str, Any]) -> Command:
        commands.append(Command(raw, tmp_path))
        return commands[-1]

    yield _start
    for command in commands:
        with contextlib.suppress(ProcessLookupError):
            command.process.kill()  # the ranks die with it
        command.process.communicate()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not let the tests mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def _last_step(raw: dict[str, Any]) -> int:
    with contextlib.suppress(FileNotFoundError, IndexError, json.JSONDecodeError):  # not there, empty, half a line
        return rows_of(raw)[-1]["step"]
    return -1


def _checkpoints(raw: dict[str, Any], folder: Path) -> list[str]:
    return [path.name for path in (folder / raw["name"] / "checkpoints").iterdir()]


def test_a_disk_that_fills_up_is_named_and_the_same_command_goes_on(
    tmp_path: Path, small_disk: Path, start: Callable[[dict[str, Any]], Command]
) -> None:
    options = {"train": {"num_steps": 40, "save_every": 6, "async_save": False}, "logging": {"samples_per_step": 8}}
    raw = tiny_raw(tmp_path, "full", **options)
    raw["logging"]["run_dir"] = str(small_disk / "{name}")
    command, saved = start(raw), small_disk / "full" / "checkpoints" / "step_00000006"
    command.until_row(5)
    deadline = time.monotonic() + LIMIT
    while not saved.is_dir():
        assert time.monotonic() < deadline and command.process.poll() is None
        time.sleep(0.001)
    ballast = small_disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    code, _, err = command.end()
    assert code == 1 and err.count("\n") == 1
    assert err.startswith(f"error: cannot use {small_disk / 'full'}/") and "No space left on device; 0 bytes are" in err
    assert f"{saved} is safe, and the same command goes on from there" in err

    ballast.unlink()
    command = start(raw)
    code, _, err = command.end()
    assert (code, err) == (0, "")
    assert [row["step"] for row in rows_of(raw)] == list(range(40))
    assert [row["step"] for row in rows_of(raw, "samples.jsonl")] == [step for step in range(40) for _ in range(8)]


@pytest.mark.timeout(900)  # five starts: 40 s on an idle machine
def test_a_run_that_is_stopped_killed_and_interrupted_ends_like_one_that_was_not(
    worlds: Worlds, tmp_path: Path, start: Callable[[dict[str, Any]], Command]
) -> None:
    """One command, four times: SIGTERM, SIGKILL of a rank, SIGINT, and to the end. The same rows, the same weights."""
    options: dict[str, Any] = {
        "loss": {"type": "clip_cov", "select_fraction": 0.05, "cov_low": 0.05, "cov_high": 9.0},
        "optimizer": {"schedule": "cosine", "warmup_steps": 3, "weight_decay": 0.01},
        "train": {"num_steps": 24, "save_every": 3, "keep_checkpoints": 1, "grace_seconds": 60, **TRAIN},
        "logging": {"samples_per_step": 2},
    }
    raw = tiny_raw(tmp_path, "stopped", **options, reward={"function": "tests.tiny:slow_mostly_digits"})

    command = start(raw)
    command.until_row(1)
    command.process.send_signal(signal.SIGTERM)
    code, out, err = command.end()
    done = len(rows_of(raw))
    assert code == 143 and 2 <= done < 20
    assert f"stopped after step {done} of 24; the same command continues" in out
    assert "stopping: up to 60 s" in err and "killed" not in err and "Traceback" not in err
    assert _checkpoints(raw, tmp_path) == [f"step_{done:08d}"]

    command = start(raw)
    command.until_row(done + 3)
    os.kill(command.rank(1), signal.SIGKILL)
    code, out, err = command.end()
    assert code == 1
    assert err.count("rank 1 was killed by SIGKILL") == 1 and "Traceback (most" not in err + out

    command = start(raw)
    command.until_row(done + 5)
    command.process.send_signal(signal.SIGINT)
    code, out, err = command.end()
    assert code == 130 and "Traceback" not in out + err

    code, out, err = start(raw).end()
    assert code == 0 and "Traceback" not in err
    assert _checkpoints(raw, tmp_path) == ["step_00000024"]

    whole = tiny_raw(tmp_path, "whole", **options)
    expected = worlds.run(2, train_each, [whole], timeout=LIMIT)[0][0]
    rows = rows_of(raw)
    assert [row["step"] for row in rows] == list(range(24))
    assert [measured(row) for row in rows] == [measured(row) for row in rows_of(whole)]
    assert rows_of(raw, "samples.jsonl") == rows_of(whole, "samples.jsonl")
    weights = worlds.run(2, train_each, [raw], timeout=LIMIT)[0][0]  # trains nothing: loads step 24
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert len(rows_of(raw)) == 24


FAULTY_ENGINE = """
import os
from megatron_rl.rollout.engine import EngineError
from megatron_rl.rollout.transformers import TransformersEngine
from tests.tiny import mostly_digits

stream = TransformersEngine.stream

def fail_at_step_1(self, requests):
    if self.weight_version == 1 and os.environ["RANK"] == "1":
        raise EngineError("the engine of rank 1 gave up")
    return stream(self, requests)

TransformersEngine.stream = fail_at_step_1
"""


def test_an_engine_that_fails_on_one_rank_ends_the_run_with_a_checkpoint(
    tmp_path: Path, start: Callable[[dict[str, Any]], Command]
) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY_ENGINE)
    command = start(tiny_raw(tmp_path, reward={"function": "faulty:mostly_digits"}))
    command.until_row(0)
    code, out, err = command.end()
    assert code == 1
    assert err == "error: the engine of rank 1 gave up\n" and "Traceback" not in out
    assert "saved after 1 steps" in out
    assert len(rows_of(command.raw)) == 1 and _checkpoints(command.raw, tmp_path) == ["step_00000001"]


BROKEN = """
import os
from tests.tiny import mostly_digits

if os.environ["RANK"] == "1":
    raise OSError("connection refused")
"""


def test_a_fault_of_the_user_on_one_rank_is_a_message(
    tmp_path: Path, start: Callable[[dict[str, Any]], Command]
) -> None:
    """Its text reads like a lost connection, and the other rank then loses one: cause and effect are told apart."""
    (tmp_path / "broken.py").write_text(BROKEN)
    code, _, err = start(tiny_raw(tmp_path, reward={"function": "broken:mostly_digits"})).end()
    assert code == 1
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1, err
    assert lines[0].startswith(
        "error: reward.function='broken:mostly_digits': importing broken failed with OSError: con"
    )


# --- moments that no signal of a test hits ----------------------------------------------------------------------------


def _die_after_a_checkpoint(raw: dict[str, Any]) -> tuple[str, list[str]]:
    """The error's type, and the processes that saving left behind."""
    from megatron_rl.policy.checkpoint import CheckpointStore

    save = CheckpointStore.save

    def save_and_die(self: CheckpointStore, step: int, extra: dict[str, Any], **options: Any) -> Path:
        save(self, step, extra, **options)
        raise RuntimeError("died")

    with mock.patch.object(CheckpointStore, "save", save_and_die):
        kind = errors_of_each([raw])[0][0]
    return kind, [" ".join(child.cmdline()) for child in psutil.Process().children()]


def test_a_death_right_after_a_checkpoint_loses_no_row_and_leaves_no_process(worlds: Worlds, tmp_path: Path) -> None:
    raw = tiny_raw(tmp_path, train={"num_steps": 4, "save_every": 2, "save_final": False, **TRAIN})
    assert worlds.run(2, _die_after_a_checkpoint, raw, timeout=LIMIT) == [("RuntimeError", [])] * 2
    worlds.run(2, train_each, [raw], timeout=LIMIT)
    assert [row["step"] for row in rows_of(raw)] == [0, 1, 2, 3]


def _warm_start_while_another_run_publishes(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """The folder of the cached weights appears between rank 0's look and rank 1's."""
    from megatron_rl import warm_start

    real, rank = Path.is_file, os.environ["RANK"]

    def is_file(path: Path) -> bool:
        return real(path) or (rank == "1" and path.name == "model.safetensors")

    def train(*arguments: Any) -> None:
        patch.stop()
        trained(*arguments)

    trained, patch = warm_start._train, mock.patch.object(Path, "is_file", is_file)
    with mock.patch.object(warm_start, "_train", train):
        patch.start()
        return train_each([raw])


def test_ranks_agree_on_whether_the_warm_start_is_cached(worlds: Worlds, tmp_path: Path) -> None:
    """Otherwise rank 0 would train alone, and wait for ever."""
    options = {"warm_start": {"steps": 3, "batch_size": 8}, "train": {"num_steps": 1, "save_final": False, **TRAIN}}
    raced, alone = (tiny_raw(tmp_path, name, **options) for name in ("raced", "alone"))
    for raw in (raced, alone):
        raw["warm_start"] = raw["warm_start"] | {"cache_dir": str(tmp_path / f"{raw['name']}_cache")}
    weights = worlds.run(2, _warm_start_while_another_run_publishes, raced, timeout=60)[0][0]
    expected = worlds.run(2, train_each, [alone], timeout=LIMIT)[0][0]
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_refused_run_leaves_the_config_of_the_one_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    config = parse_config(tiny_raw(tmp_path))
    config.run_dir.mkdir()
    (config.run_dir / "config.yaml").write_text("the other's")
    with launch._hold(config.run_dir), pytest.raises(UserError, match="in use by a run"):
        cli.run_training(config)
    assert (config.run_dir / "config.yaml").read_text() == "the other's"


def test_whose_fault_a_user_error_is() -> None:
    """Its text may quote anything; what it was raised from decides."""
    assert not files.is_lost_peer(UserError("the reward function failed: server timed out, connection reset"))
    lost = UserError("cannot load the checkpoint")
    lost.__cause__ = RuntimeError("[pair.cc:547] Connection closed by peer [127.0.0.1]:4242")
    assert files.is_lost_peer(lost)
