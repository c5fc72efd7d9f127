"""The end of a job's part of a run: why it failed, on top of its merged log, and whether the run has steps left."""

from pathlib import Path

import yaml

from megatron_rl.files import Failure, in_order, read_failures, write_atomically
from megatron_rl.metrics.jsonl import iter_rows

_TAIL_LINES = 40
_OF_A_RANK = "[rank "  # begins the lines that slurm/rank.sh passes on; the others are torchrun's and Slurm's


def conclude(run_dir: Path, merged: Path, *, failed: bool) -> str:
    """Put the reason on top of the merged log when the job `failed`, and return it; else return an empty text."""
    if not failed:
        return ""
    causes = in_order(read_failures(run_dir))
    lines = merged.read_text(errors="replace").splitlines() if merged.is_file() else []
    reason = _explain(causes[0], run_dir) if causes else _agents_words(lines)
    write_atomically(merged, "\n".join([reason, "", "--- all ranks, as their lines came", *lines, ""]))
    return reason


def has_steps_left(run_dir: Path) -> bool:
    """Return whether the run is short of its `train.num_steps`."""
    num_steps = yaml.safe_load((run_dir / "config.yaml").read_text())["train"]["num_steps"]
    rows = run_dir / "metrics.jsonl"
    done = max((row["step"] + 1 for _, row in iter_rows(rows, [], with_step=True)), default=0) if rows.is_file() else 0
    return done < num_steps


def _explain(failure: Failure, run_dir: Path) -> str:
    log = run_dir / "logs" / f"rank{failure.rank}.log"
    text = failure.message if failure.from_user else failure.traceback.rstrip()
    return f"rank {failure.rank} failed first (its log: {log}):\n{text}"


def _agents_words(lines: list[str]) -> str:
    """Return the last words of torchrun and Slurm: without a traceback a rank was killed, or a node was lost."""
    agents = [line for line in lines if not line.startswith(_OF_A_RANK)]
    return "\n".join(["no rank left a traceback; the last words of torchrun and Slurm:", *agents[-_TAIL_LINES:]])
