"""`python -m megatron_rl.cluster claim|conclude`, for slurm/launch.sh."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_rl.cli import main
from megatron_rl.cluster.conclude import conclude, has_steps_left
from megatron_rl.cluster.freeze import Job, claim, code_folder
from megatron_rl.files import write_atomically
from megatron_rl.launch import say

UNFINISHED = 75  # exit code: the run has steps left

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command("claim")
def claim_command(
    config: Path,
    overrides: Annotated[list[str] | None, typer.Argument()] = None,
    root: Annotated[Path, typer.Option(help="the project's folder")] = Path(),
    live_jobs: Annotated[str, typer.Option(help="ids of jobs that wait or run")] = "",
    record: Annotated[Path, typer.Option(help="where to write the run folder and the processes of a node")] = Path(),
) -> None:
    """Take a run folder for this job and freeze config and code in it."""
    job = Job(
        id=os.environ["SLURM_JOB_ID"],
        nodes=int(os.environ["SLURM_JOB_NUM_NODES"]),
        gpus_per_node=int(os.environ.get("SLURM_GPUS_ON_NODE") or 0),
        live_jobs=live_jobs.split(),
    )
    run_dir, per_node = claim(config, overrides or [], job, root)
    say(f"run folder {run_dir}, {job.nodes} nodes of {per_node} processes")
    record.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(record, f"{run_dir}\n{code_folder(run_dir, job.id)}\n{per_node}\n")


@app.command("conclude")
def conclude_command(run_dir: Path, merged: Path, code: int) -> None:
    """Explain why training ended with exit code `code`, unless it is 0; exit with 75 when steps are left."""
    if reason := conclude(run_dir, merged, failed=code != 0):
        say(reason, error=True)
    if has_steps_left(run_dir):
        sys.exit(UNFINISHED)


main(app)
