"""Whose a run folder is, and what a job freezes in it. Slurm is played by `Job`; tests/slurm has the real one."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from megatron_rl.cluster.freeze import Job, claim
from megatron_rl.errors import ConfigError
from tests.tiny import tiny_raw

JOB = Job("7", nodes=2, gpus_per_node=4, live_jobs={"7"})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A small project under git."""
    root = tmp_path / "project"
    (root / "megatron_rl").mkdir(parents=True)
    (root / "kernels").mkdir()
    (root / "megatron_rl" / "train.py").write_text("version = 1\n")
    (root / "megatron_rl" / "kernels").symlink_to("../kernels")
    (root / ".gitignore").write_text("ignored.py\n")
    subprocess.run(
        "git init -q && git add -A && git -c user.name=a -c user.email=a@b commit -qm a", cwd=root, shell=True
    )
    return root


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_raw(tmp_path / "runs")))
    return path


def test_the_world_follows_the_allocation_unless_it_is_said(root: Path, config: Path) -> None:
    run_dir, per_node = claim(config, ["train.prompts_per_minibatch=4"], JOB, root)
    frozen = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert (frozen["parallel"]["world_size"], per_node) == (8, 4)
    assert run_dir.is_absolute() and run_dir.name == "tiny"
    for index, override in enumerate(("parallel.world_size=2", "parallel={tp: 2, world_size: 2}")):
        assert claim(config, [f"name=said{index}", override], JOB, root)[1] == 1
    with pytest.raises(ConfigError, match="cannot be dealt out evenly over 3 nodes"):
        claim(config, ["name=odd", "parallel.world_size=4"], dataclasses.replace(JOB, nodes=3), root)
    with pytest.raises(ConfigError, match="no GPUs.*parallel.world_size=N"):
        claim(config, ["name=bare"], dataclasses.replace(JOB, gpus_per_node=0), root)


def test_a_requeued_job_keeps_its_folder_and_its_code(root: Path, config: Path) -> None:
    run_dir, _ = claim(config, [], JOB, root)
    (root / "megatron_rl" / "train.py").write_text("version = 2\n")
    assert claim(config, [], JOB, root)[0] == run_dir
    assert (run_dir / "code" / "7" / "megatron_rl" / "train.py").read_text() == "version = 1\n"


def test_only_the_same_command_of_a_dead_job_continues_a_run(root: Path, config: Path) -> None:
    first, _ = claim(config, [], JOB, root)
    (first / "metrics.jsonl").write_text("{}\n")
    again = Job("8", 2, 4, live_jobs={"8"})
    while_it_runs, _ = claim(config, [], Job("9", 2, 4, live_jobs={"7", "9"}), root)
    another, _ = claim(config, ["seed=4"], Job("10", 2, 4, live_jobs=set()), root)
    assert (while_it_runs.name, another.name) == ("tiny-9", "tiny-10")
    assert yaml.safe_load((another / "config.yaml").read_text())["name"] == "tiny-10"
    assert claim(config, [], again, root)[0] == first and (first / "metrics.jsonl").exists()
    assert sorted(path.name for path in (first / "code").iterdir()) == ["7", "8"]
    # of two that find it dead one gets it: job 7 has an heir
    (first / "slurm" / "owner").write_text("7")
    assert claim(config, [], Job("11", 2, 4, live_jobs=set()), root)[0].name == "tiny-11"


def test_a_folder_that_no_job_made_is_left_alone(root: Path, config: Path, tmp_path: Path) -> None:
    by_hand = tmp_path / "runs" / "tiny"
    by_hand.mkdir(parents=True)
    assert claim(config, [], JOB, root)[0].name == "tiny-7"
    assert list(by_hand.iterdir()) == []


def test_what_of_the_code_is_frozen(root: Path, config: Path) -> None:
    (root / "mine.py").write_text("new\n")
    (root / "ignored.py").write_text("ignored\n")
    (root / "model.bin").write_bytes(bytes(2**20 + 1))
    run_dir, _ = claim(config, ["seed=3"], JOB, root)
    code = run_dir / "code" / "7"
    assert (code / "mine.py").is_file() and not (code / "ignored.py").exists() and not (code / "model.bin").exists()
    assert (code / "megatron_rl" / "kernels").readlink() == Path("../kernels")
    facts = json.loads((run_dir / "slurm" / "7.json").read_text())
    assert facts["left_out"] == ["model.bin"] and len(facts["commit"]) == 40
    assert facts["overrides"] == ["seed=3"] and "?? mine.py" in facts["changed"]


def test_code_without_git_is_frozen_too(root: Path, config: Path) -> None:
    shutil.rmtree(root / ".git")
    run_dir, _ = claim(config, [], JOB, root)
    code = run_dir / "code" / "7"
    assert (code / "megatron_rl" / "train.py").is_file() and (code / "megatron_rl" / "kernels").is_symlink()
    assert json.loads((run_dir / "slurm" / "7.json").read_text())["commit"] is None
