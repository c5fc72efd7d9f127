"""The real `slurm/32b_kl_cov.sbatch` on a real Slurm of this machine, with overrides that only shrink it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from megatron_rl.config import load_config
from tests.slurm.cluster import PROGRAMS, Cluster, steps_of, until
from tests.tiny import HF, measured

ROOT = Path(__file__).resolve().parent.parent.parent
SBATCH_FILES = sorted((ROOT / "slurm").glob("*.sbatch"))
LIMIT = 600.0  # seconds a job may take: two starts of Python on two ranks, on a machine that does other things too
STEPS = 12
_SEARCH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
MISSING = [name for name in PROGRAMS if shutil.which(name, path=_SEARCH) is None]
SITE = """
export MEGATRON_RL_RUNS={runs}
site_setup() {{
    export PATH={bin}:$PATH MEGATRON_RL_DEVICE=cpu GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1
}}
site_srun=()
"""

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(MISSING), reason=f"Slurm is not installed (no {', '.join(MISSING)}): make test-slurm"),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd and munged run jobs as root here; be root"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    folder.chmod(0o755)  # munged looks
    site = folder / "site.sh"
    site.write_text(SITE.format(runs=folder / "runs", bin=Path(sys.executable).parent))
    cluster = Cluster(folder, {"MEGATRON_RL_SITE": str(site)})
    yield cluster
    cluster.close()
    shutil.rmtree(folder)


def shrink(name: str, *more: str, reward: str = "tests.slurm.rewards:slow") -> list[str]:
    """Two ranks on two nodes, a model of two layers, the embedded engine."""
    return [
        f"name={name}",
        f"model={{hf_config: {json.dumps(HF)}}}",
        "parallel={world_size: 2, tp: 2, sp: true}",
        "data={type: countdown, num_train: 64, num_eval: 8, max_prompt_tokens: 16}",
        "rollout={samples_per_prompt: 4, max_response_tokens: 12}",
        f"reward.function={reward}",
        "algorithm.dynamic_sampling.enabled=false",
        "loss.select_fraction=0.1",
        f"train={{num_steps: {STEPS}, prompts_per_step: 4, prompts_per_minibatch: 2, micro_batch_tokens: 96}}",
        "logging.tensorboard=false",
        *more,
    ]


def submit(cluster: Cluster, *overrides: str) -> str:
    return cluster.submit(ROOT, "--nodes=2", "--time=180", "slurm/32b_kl_cov.sbatch", *overrides)


@pytest.fixture(scope="module")
def whole(cluster: Cluster) -> tuple[str, Path]:
    """(job, run folder) of a run that nothing disturbed."""
    job = submit(cluster, *shrink("whole"))
    assert cluster.wait_for(job, ("COMPLETED", "FAILED"), LIMIT)["JobState"] == "COMPLETED", cluster.output(job)
    return job, cluster.folder / "runs" / "whole"


def rows(run_dir: Path) -> list[dict[str, object]]:
    return [measured(json.loads(line)) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_the_job_trains_and_leaves_a_run_folder(cluster: Cluster, whole: tuple[str, Path]) -> None:
    job, run_dir = whole
    assert steps_of(run_dir) == list(range(STEPS))
    frozen = load_config(run_dir / "config.yaml")
    assert frozen.loss.type == "kl_cov" and frozen.optimizer.lr == 1e-6 and frozen.train.num_steps == STEPS
    assert (run_dir / "code" / job / "megatron_rl" / "train.py").read_text() == (
        ROOT / "megatron_rl" / "train.py"
    ).read_text()
    facts = json.loads((run_dir / "slurm" / f"{job}.json").read_text())
    assert facts["nodes"] == 2 and facts["overrides"] == shrink("whole")
    output = cluster.output(job)
    assert "2 of 2 on 2 nodes" in output and "FAIL" not in output
    assert f"step {STEPS}/{STEPS}" in output
    own = [(run_dir / "logs" / f"rank{rank}.log").read_text() for rank in range(2)]
    assert all(f"--- train, job {job}.0 on n" in text for text in own) and f"step {STEPS}/{STEPS}" in own[0]
    merged = (run_dir / "logs" / f"job-{job}.0.log").read_text()
    assert all(f"[rank {rank}] --- train" in merged for rank in range(2))
    checkpoint = run_dir / "checkpoints" / f"step_{STEPS:08d}"
    assert (checkpoint / "metadata.json").is_file()


def test_another_run_of_that_name_gets_a_folder_of_its_own(cluster: Cluster, whole: tuple[str, Path]) -> None:
    _, run_dir = whole
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()}
    job = submit(cluster, *shrink("whole", "seed=2", "train.num_steps=1"))
    assert cluster.wait_for(job, ("COMPLETED", "FAILED"), LIMIT)["JobState"] == "COMPLETED", cluster.output(job)
    other = run_dir.with_name(f"whole-{job}")
    assert steps_of(other) == [0] and yaml.safe_load((other / "config.yaml").read_text())["seed"] == 2
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()} == before


def test_a_warning_saves_requeues_and_resumes(cluster: Cluster, whole: tuple[str, Path]) -> None:
    job = submit(cluster, *shrink("warned"))
    run_dir = cluster.folder / "runs" / "warned"
    until(lambda: len(steps_of(run_dir)) >= 3, LIMIT, lambda: cluster.output(job))
    cluster.run("scancel", "--signal=USR1", "--batch", job)  # what --signal=B:USR1@SECONDS does before the time limit
    until(lambda: cluster.facts(job)["Restarts"] == "1", LIMIT, lambda: cluster.output(job))
    saved = steps_of(run_dir)
    assert len(saved) < STEPS, "the run was over before the signal came"
    assert (run_dir / "checkpoints" / f"step_{len(saved):08d}").is_dir()
    facts = cluster.wait_for(job, ("COMPLETED", "FAILED"), LIMIT)
    output = cluster.output(job)
    assert facts["JobState"] == "COMPLETED", output
    assert "got USR1: saving after this step" in output and f"step_{len(saved):08d}, {len(saved)} steps" in output
    assert rows(run_dir) == rows(whole[1]), "no gap, no repeat, and bit for bit what the undisturbed run did"
    assert not run_dir.with_name(f"warned-{job}").exists()


def test_a_dead_node_ends_in_a_requeue_that_goes_on_from_the_checkpoint(
    cluster: Cluster, whole: tuple[str, Path]
) -> None:
    job = submit(cluster, *shrink("orphaned", "train.save_every=2"))
    run_dir = cluster.folder / "runs" / "orphaned"
    until(lambda: len(steps_of(run_dir)) >= 4, LIMIT, lambda: cluster.output(job))
    nodes = cluster.run("scontrol", "show", "hostnames", cluster.facts(job)["NodeList"]).split()
    cluster.kill_node(nodes[1])  # the second: the script runs on the first
    try:
        until(lambda: cluster.facts(job)["Restarts"] == "1", LIMIT, lambda: cluster.output(job))
        facts = cluster.wait_for(job, ("COMPLETED", "FAILED"), LIMIT)
        assert facts["JobState"] == "COMPLETED", cluster.output(job)
        assert nodes[1] not in cluster.run("scontrol", "show", "hostnames", facts["NodeList"]).split()
        assert rows(run_dir) == rows(whole[1])
    finally:
        cluster.start_nodes()


def test_the_first_failing_ranks_traceback_is_on_top(cluster: Cluster) -> None:
    job = submit(cluster, *shrink("sabotaged", "reward.workers=0", reward="tests.slurm.rewards:sabotage"))
    facts = cluster.wait_for(job, ("COMPLETED", "FAILED"), LIMIT)
    assert facts["JobState"] == "FAILED" and facts["Restarts"] == "0", cluster.output(job)
    run_dir = cluster.folder / "runs" / "sabotaged"
    reason, _, lines = (run_dir / "logs" / f"job-{job}.0.log").read_text().partition("--- all ranks")
    assert reason.startswith("rank 1 failed first") and reason.rstrip().endswith("ArithmeticError: boom in packing")
    assert "[rank 0]" in lines
    assert "ArithmeticError: boom in packing" in cluster.output(job)


def test_conform_compares_the_layout_of_two_nodes_with_one_process(cluster: Cluster) -> None:
    overrides = shrink("ignored", reward="tests.tiny:mostly_digits")
    arguments = ["--nodes=2", "slurm/conform.sbatch", "configs/32b_kl_cov.yaml", *overrides[1:]]
    job = cluster.submit(ROOT, *arguments)
    facts = cluster.wait_for(job, ("COMPLETED", "FAILED"), LIMIT)
    assert facts["JobState"] == "COMPLETED", cluster.output(job)
    answer = json.loads((cluster.folder / "runs" / f"conform-{job}" / "conform" / "conform.json").read_text())
    assert answer["ok"] and answer["layouts"]["run"]["tp"] == 2 and answer["layouts"]["reference"]["tp"] == 1
    assert "engine" in {verdict["name"] for verdict in answer["verdicts"]}
    assert "tp2 sp against one process" in cluster.output(job)


def test_a_conform_that_cannot_be_fails_the_job_and_takes_options(cluster: Cluster) -> None:
    overrides = shrink("ignored", reward="tests.tiny:mostly_digits")
    options = ["--nodes=2", "--export=ALL,MEGATRON_RL_CONFORM=--against tp=4"]
    job = cluster.submit(ROOT, *options, "slurm/conform.sbatch", "configs/32b_kl_cov.yaml", *overrides[1:])
    facts = cluster.wait_for(job, ("COMPLETED", "FAILED"), LIMIT)
    assert facts["JobState"] == "FAILED", cluster.output(job)
    assert "--against tp=4: the reference needs 4 processes, and the run has 2" in cluster.output(job)
    assert not (cluster.folder / "runs" / f"conform-{job}" / "conform" / "conform.json").exists()


@pytest.mark.parametrize("path", SBATCH_FILES, ids=lambda path: path.stem)
def test_slurm_takes_every_file_as_it_is(cluster: Cluster, path: Path) -> None:
    nodes = 1 if path.stem.startswith("7b") else 4
    told = subprocess.run(
        ["sbatch", "--test-only", f"slurm/{path.name}", "seed=2"],
        env=cluster.env, cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert told.returncode == 0 and f"using {8 * nodes} processors on node" in told.stderr, told.stderr


def test_shellcheck_has_nothing_to_say() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: make test-slurm")
    scripts = [str(path) for path in sorted((ROOT / "slurm").iterdir())]
    told = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout
