"""The run folder of a Slurm job, in which it freezes what it runs: the resolved config, and a copy of the code.

A folder belongs to the job that made it, through all its requeues, and never to two. Of a job that is gone, a later one
with the same resolved config continues the run; any other job of that name gets a folder NAME-JOB of its own, because
one that waited for hours in a queue should not end over a name.
"""

import json
import shutil
import subprocess
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.config import Config, dump_config, load_config
from megatron_rl.errors import ConfigError
from megatron_rl.files import write_atomically
from megatron_rl.rehearse.kept import carry_verdict

# of an unversioned checkout: what a run needs
_PARTS = ("megatron_rl", "kernels", "configs", "slurm", "scripts", "pyproject.toml")
_LARGEST_UNTRACKED_BYTES = 2**20  # a file that git neither tracks nor ignores may be code, or a model


@dataclass(frozen=True)
class Job:
    """The job that runs this, as Slurm describes it."""

    id: str
    nodes: int
    gpus_per_node: int
    live_jobs: Collection[str]  # ids of jobs that wait or run


def claim(config_path: Path, overrides: Sequence[str], job: Job, root: Path) -> tuple[Path, int]:
    """Claim a run folder for `job`, write `config.yaml` and `code/JOB/` into it; return (folder, processes of a node).

    `root`: the project's folder.
    `parallel.world_size` follows the allocation unless it is overridden.
    Raises: ConfigError when the config, or its number of processes on this many nodes, cannot work.
    """
    given = list(overrides)
    if not any(_sets_world_size(override) for override in given):
        if not job.gpus_per_node:
            raise ConfigError(
                "the job has no GPUs, so the number of processes is unknown; ask for some (--gpus-per-node), or give "
                "parallel.world_size=N"
            )
        given.append(f"parallel.world_size={job.nodes * job.gpus_per_node}")
    config = load_config(config_path, given)
    if config.parallel.processes % job.nodes:
        raise ConfigError(
            f"parallel.world_size={config.parallel.processes} cannot be dealt out evenly over {job.nodes} nodes; "
            "change it, or sbatch -N"
        )
    if not _take(config, job):
        config = load_config(config_path, [*given, f"name={config.name}-{job.id}"])
        if not _take(config, job):
            raise ConfigError(f"{config.run_dir} belongs to another run; move it, or give this one another name")
    _freeze(config, overrides, job, root)
    carry_verdict(config_path, config.run_dir / "config.yaml")
    return config.run_dir.resolve(), config.parallel.processes // job.nodes


def code_folder(run_dir: Path, job_id: str) -> Path:
    """Return the folder with the copy of the code that a job runs."""
    return run_dir / "code" / job_id


def _sets_world_size(override: str) -> bool:
    key, _, value = override.partition("=")
    return key == "parallel.world_size" or (key == "parallel" and "world_size" in value)


def _take(config: Config, job: Job) -> bool:
    """Try to take the run folder; return whether it is this job's now.

    A race is decided by who makes the folder, or a file that must not exist yet.
    """
    run_dir = config.run_dir
    owner = run_dir / "slurm" / "owner"
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    try:
        run_dir.mkdir()
    except FileExistsError:
        if not owner.is_file():
            return False
        former = owner.read_text().strip()
        if former == job.id:
            return True
        frozen = run_dir / "config.yaml"
        if former in job.live_jobs or not frozen.is_file() or frozen.read_text() != dump_config(config):
            return False
        try:
            (run_dir / "slurm" / f"heir_of_{former}").touch(exist_ok=False)
        except FileExistsError:
            return False
    owner.parent.mkdir(exist_ok=True)
    write_atomically(owner, job.id)
    return True


def _freeze(config: Config, overrides: Sequence[str], job: Job, root: Path) -> None:
    run_dir = config.run_dir
    target = code_folder(run_dir, job.id)
    (run_dir / "logs").mkdir(exist_ok=True)
    if not target.is_dir():
        draft = target.with_name(f".{job.id}")
        shutil.rmtree(draft, ignore_errors=True)
        left_out = _copy_code(root, draft)
        facts = {
            "job": job.id,
            "nodes": job.nodes,
            "overrides": list(overrides),
            "commit": _git(root, "rev-parse", "HEAD").strip() or None,
            "changed": _git(root, "status", "--porcelain").splitlines(),
            "left_out": left_out,
        }
        write_atomically(run_dir / "slurm" / f"{job.id}.json", json.dumps(facts, indent=1))
        draft.rename(target)
    write_atomically(run_dir / "config.yaml", dump_config(config))


def _copy_code(root: Path, target: Path) -> list[str]:
    """Copy what git tracks, and small files that it neither tracks nor ignores; return the larger ones, left out."""
    left_out = []
    tracked = set(_git(root, "ls-files", "-z").split("\0"))
    for name in _files(root):
        source = root / name
        if not source.exists() and not source.is_symlink():
            continue  # tracked, and removed since
        if tracked and name not in tracked and source.stat().st_size > _LARGEST_UNTRACKED_BYTES:
            left_out.append(name)
            continue
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, copy, follow_symlinks=False)
    return left_out


def _files(root: Path) -> Iterator[str]:
    versioned = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if versioned:
        yield from filter(None, versioned.split("\0"))
        return
    for part in _PARTS:
        paths = [root / part] if (root / part).is_file() or (root / part).is_symlink() else (root / part).rglob("*")
        for path in paths:
            if (path.is_file() or path.is_symlink()) and "__pycache__" not in path.parts:
                yield path.relative_to(root).as_posix()


def _git(root: Path, *arguments: str) -> str:
    """Return a git command's output; empty where `root` is no checkout of its own or git is missing (a container)."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout if done.returncode == 0 and (root / ".git").exists() else ""
