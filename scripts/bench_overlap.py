"""Step time with rollouts generated ahead of the training, on an SGLang server that is made slow without using the CPU
(each of its forward passes sleeps): python scripts/bench_overlap.py --sleep 0.02."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SKIP = 2  # steps at the start: caches, the first batch that nothing overlaps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sleep", type=float, default=0.02, help="seconds of each forward pass of the server")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=64, help="of every response")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        rows = {k: measure(Path(folder), options, max_staleness=k) for k in (0, 1)}
    phases = {k: {name: mean(rows[k], name) for name in ("total", "rollout", "sync")} for k in rows}
    rollout, rest = phases[0]["rollout"], phases[0]["total"] - phases[0]["rollout"]
    predicted = max(rollout, rest) + phases[0]["sync"] * (rollout > rest)
    print(f"{options.tokens} tokens a response, forward pass + {options.sleep:g} s, load {load:.1f} at the start")
    for k, seconds in phases.items():
        print(f"max_staleness {k}: step {seconds['total']:.2f} s, of it waiting for rollouts {seconds['rollout']:.2f}")
    print(f"predicted for 1: max(rollout {rollout:.2f}, the rest {rest:.2f}) = {predicted:.2f} s with the update")
    print(f"staleness of 1: mean {mean(rows[1], 'staleness/mean', ''):.2f}, interrupted {interrupted(rows[1]):.2f}")


def measure(folder: Path, options: argparse.Namespace, *, max_staleness: int) -> list[dict[str, Any]]:
    """The metrics of a run whose own server is slowed down as soon as it has weights."""
    name = f"staleness_{max_staleness}"
    overrides = {
        "name": name,
        "logging.run_dir": f"{folder}/{{name}}",
        "logging.tensorboard": "false",
        "model.hf_config.max_position_embeddings": 256,
        "rollout.engine": "sglang",
        "rollout.max_response_tokens": options.tokens,
        "rollout.stop_token_ids": "[]",
        "rollout.server.max_concurrency": 256,
        "rollout.server.kv_tokens": 32768,
        "rollout.max_staleness": max_staleness,
        "loss.rollout_correction": "{cap: 2}",
        "warm_start": "null",
        "train.num_steps": options.steps,
        "train.eval_every": 0,
        "train.save_final": "false",
    }
    command = [sys.executable, "-m", "megatron_rl", "train", str(ROOT / "configs" / "quickstart.yaml")]
    command += [f"{key}={value}" for key, value in overrides.items()]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert run.stdout is not None
    for line in run.stdout:
        if " is ready after " in line:
            url = next(word for word in line.split() if word.startswith("http"))
            post(f"{url}/slow_down", {"forward_sleep_time": options.sleep})
    if run.wait():
        sys.exit(f"the run failed with exit code {run.returncode}")
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()][SKIP:]


def post(url: str, body: dict[str, Any]) -> None:
    time.sleep(0.5)
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    urllib.request.urlopen(request, timeout=60).read()


def mean(rows: list[dict[str, Any]], name: str, prefix: str = "time/") -> float:
    return statistics.mean(row[prefix + name] for row in rows)


def interrupted(rows: list[dict[str, Any]]) -> float:
    """Share of the responses that a weight update met half-way."""
    return mean(rows, "staleness/interrupted_fraction", "")


if __name__ == "__main__":
    main()
