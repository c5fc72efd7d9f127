"""A study of entropy methods on countdown: every method from three seeds, then one table and one figure.

    python scripts/study.py [--steps 80] [--seeds 1 2 3] [--methods GRPO KL-Cov] [--jobs 2] [--out runs/study]

Each run is the quickstart on one process and thread, so that `--jobs` of them share a machine, with the overrides of
METHODS. Finished runs are kept: the same command continues. Writes OUT/study.md (tables) and OUT/study.svg.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import plot_curves

from megatron_rl.metrics.entropy_law import fit_law, fit_line
from megatron_rl.report.runs import LoggedRun, load_runs, summary_of

ROOT = Path(__file__).resolve().parent.parent
# name: the overrides of configs/quickstart.yaml, as one would type them
METHODS = {
    "GRPO": "{type: ppo_clip}",
    "clip-higher": "{type: ppo_clip, eps_high: 0.28}",
    "Clip-Cov": "{type: clip_cov, select_fraction: 0.02}",
    "KL-Cov": "{type: kl_cov, select_fraction: 0.1, kl_coef: 2.0}",
    "80-20": "{type: forking, eps_high: 0.2, keep_fraction: 0.2}",
    "adaptive": "{type: ppo_clip, adaptive_entropy: {target_entropy: 0.4, step: 0.01, max_coef: 0.3}}",
}
SHARED = (
    "parallel.tp=1",
    "train.entropy_tangent=true",
    "train.entropy_tangent_every=1",
    "train.save_final=false",
    "logging.tensorboard=false",
)
BLOCK = 10  # steps that are averaged before the second correlation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="all by default")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with ThreadPoolExecutor(options.jobs) as pool:  # seed by seed, so that an interrupted study compares all methods
        jobs = [pool.submit(train, options, method, seed) for seed in options.seeds for method in options.methods]
        for job in jobs:
            job.result()
    folders = {method: [folder(options, method, seed) for seed in options.seeds] for method in options.methods}
    runs = {method: load_runs(of_method) for method, of_method in folders.items()}
    (options.out / "study.md").write_text(f"{outcomes(runs)}\n{fits(runs)}", encoding="utf-8")
    plot_curves.write(options.out / "study.svg", folders)
    print(f"{time.monotonic() - began:.0f} s; {options.out}/study.md, {options.out}/study.svg")


def folder(options: argparse.Namespace, method: str, seed: int) -> Path:
    path: Path = options.out / f"{method.lower()}_{seed}"
    return path


def train(options: argparse.Namespace, method: str, seed: int) -> None:
    """One run, unless its folder holds all its steps. Raises: SystemExit with the end of its output when it fails."""
    out = folder(options, method, seed)
    if (out / "metrics.jsonl").is_file() and len(plot_curves.read(out)) == options.steps:
        return
    began = time.monotonic()
    run = [f"name={out.name}", f"logging.run_dir={out}", f"seed={seed}", f"train.num_steps={options.steps}"]
    overrides = [*SHARED, *run, "train.resume=never", f"train.eval_every={options.steps}", f"loss={METHODS[method]}"]
    command = [sys.executable, "-m", "megatron_rl", "train", str(ROOT / "configs" / "quickstart.yaml"), *overrides]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(f"{out} failed with code {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    print(f"{out.name}: {time.monotonic() - began:.0f} s, load {os.getloadavg()[0]:.1f}", flush=True)


def outcomes(runs: dict[str, list[LoggedRun]]) -> str:
    return table(
        runs,
        [
            ("entropy, first 10 steps", lambda run: summary_of(run)["entropy_first"]),
            ("entropy, last 10", lambda run: summary_of(run)["entropy_last"]),
            ("training accuracy, first 10", lambda run: summary_of(run)["accuracy_first"]),
            ("training accuracy, last 10", lambda run: summary_of(run)["accuracy_last"]),
            ("held-out accuracy at the end", lambda run: summary_of(run)["eval_last"]),
        ],
    )


def fits(runs: dict[str, list[LoggedRun]]) -> str:
    return table(
        runs,
        [
            ("law's r2", lambda run: summary_of(run)["law_r2"]),
            ("law of the first half on the second: rmse over that of the mean", law_ratio),
            ("predicted, per step", lambda run: correlation(run, "entropy/predicted_change", 1)),
            ("first order, per step", lambda run: correlation(run, "entropy/first_order_change", 1)),
            ("on the way, per step", lambda run: correlation(run, "entropy/tangent_change", 1)),
            (f"first order, means of {BLOCK}", lambda run: correlation(run, "entropy/first_order_change", BLOCK)),
        ],
    )


def table(runs: dict[str, list[LoggedRun]], columns: list[tuple[str, Callable[[LoggedRun], float]]]) -> str:
    """Markdown: means over the seeds, with the smallest and the largest in brackets."""
    lines = [["method", *(title for title, _ in columns)], ["---"] * (len(columns) + 1)]
    for method, of_method in runs.items():
        lines.append([method, *(over_seeds([value(run) for run in of_method]) for _, value in columns)])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def over_seeds(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def law_ratio(run: LoggedRun) -> float:
    """Root mean square error, over a run's second half, of the law fitted to its first half, relative to that of the
    first half's mean reward: below 1 the law says more. NaN where no law can be fitted."""
    entropy, reward = run.pairs("entropy/mean", run.reward_metric())
    half = len(entropy) // 2
    law = fit_law(entropy[:half], reward[:half])
    if law.problem:
        return math.nan
    mean = statistics.fmean(reward[:half])
    errors = [predicted - true for predicted, true in zip(law.at(entropy[half:]), reward[half:], strict=True)]
    return math.hypot(*errors) / math.hypot(*(mean - true for true in reward[half:]))


def correlation(run: LoggedRun, metric: str, block: int) -> float:
    """Pearson's, of a prediction with the realised change, over means of `block` steps."""
    predicted, realised = run.pairs(metric, "entropy/realised_change")
    starts = range(0, len(predicted) - block + 1, block)
    blocks = [[statistics.fmean(values[i : i + block]) for i in starts] for values in (predicted, realised)]
    return fit_line(*blocks).correlation


if __name__ == "__main__":
    main()
