"""Memory and time of a report, and of cutting files back on resume, on the files of a very long run.

    python scripts/bench_report.py [--steps 100000] [--metrics 60] [--gigabytes 1] [--page page.html]

Writes metrics.jsonl and samples.jsonl into a temporary folder, and measures each job in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOKENS = 4096  # of a sample


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--metrics", type=int, default=60, help="numbers a step")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of samples.jsonl")
    parser.add_argument("--page", type=Path, help="where to leave the page")
    parser.add_argument("--job", choices=["report", "cut"], help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(measured(options.job, options.run, options.page, options.steps)))
        return
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        write_metrics(run / "metrics.jsonl", options.steps, options.metrics)
        write_samples(run / "samples.jsonl", options.steps, options.gigabytes)
        sizes = {path.name: path.stat().st_size / 1e9 for path in sorted(run.glob("*.jsonl"))}
        print(", ".join(f"{name} {size:.2f} GB" for name, size in sizes.items()), flush=True)
        page = options.page or run / "report.html"
        for job in ("report", "cut"):
            command = [sys.executable, __file__, "--job", job, "--run", str(run), "--page", str(page)]
            command += ["--steps", str(options.steps)]
            told = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            print(f"{job:7} {told['seconds']:6.1f} s, peak {told['peak_mb']:.0f} MB of memory", flush=True)
        print(f"the page has {page.stat().st_size / 1e6:.1f} MB")


def measured(job: str, run: Path, page: Path, steps: int) -> dict[str, float]:
    """Do a job in this process: its seconds, and the peak of resident memory in MB, imports included."""
    from megatron_rl.metrics.jsonl import cut_from_step
    from megatron_rl.report import build_report

    began = time.monotonic()
    if job == "report":
        build_report([run], page)
    else:
        for name in ("metrics.jsonl", "samples.jsonl"):
            cut_from_step(run / name, steps - 10)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return {"seconds": time.monotonic() - began, "peak_mb": peak}


def write_metrics(path: Path, steps: int, metrics: int) -> None:
    from megatron_rl.report.catalogue import sections

    names = [name for title, plots in sections([]) if title != "Time" for plot in plots for name in plot.metrics]
    names += ["entropy/predicted_change", "entropy/realised_change", "time/total", "time/rollout", "time/update"]
    names += [f"other/{i}" for i in range(metrics - len(names))]
    with path.open("w", encoding="utf-8") as file:
        for step in range(steps):
            row = {name: math.sin(step / 999 + i) + (step * 7919 % 97) / 500 for i, name in enumerate(names)}
            file.write(json.dumps({"step": step, **row}) + "\n")


def write_samples(path: Path, steps: int, gigabytes: float) -> None:
    values = [-1.234 * (i % 7) for i in range(TOKENS)]
    tokens = {"text": [" token"] * TOKENS, "token_id": list(range(TOKENS)), "selected": [1, 5]}
    tokens |= {"logprob": values, "entropy": values, "covariance": values}
    sample = json.dumps({"prompt": "1+1", "response": " token" * TOKENS, "score": 1.0, "tokens": tokens})
    count = max(1, int(gigabytes * 1e9 / len(sample)))
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            file.write(f'{{"step": {i * steps // count}, {sample[1:]}\n')


if __name__ == "__main__":
    main()
