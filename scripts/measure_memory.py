"""Measures the peak resident memory of a rank for the shapes below, against the planner's prediction, and with --write
makes scripts/calibration/measured_memory.csv anew: python scripts/measure_memory.py [--only NAME] [--write]."""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from calibration.measured import COLUMNS, DATA, predicted_bytes

from megatron_rl.config import load_config
from megatron_rl.models.hardware import HARDWARE

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/quickstart.yaml"
# never stopping, so that every response has its full length and the tokens are those that the planner counts
_SHORT = ["warm_start=null", "train.num_steps=3", "train.eval_every=0", "train.save_final=false"]
_FULL = [*_SHORT, "rollout.stop_token_ids=[]"]
_LONG = [
    *_FULL,
    "rollout.max_response_tokens=232",
    "model.hf_config.max_position_embeddings=256",
    "train.micro_batch_tokens=8192",
    "train.prompts_per_step=8",
    "train.prompts_per_minibatch=8",
]
_FEW = ["train.prompts_per_step=8", "train.prompts_per_minibatch=4"]


def _model(layers: int, hidden: int, ffn: int, heads: int) -> list[str]:
    sizes = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
    }
    return [f"model.hf_config.{key}={value}" for key, value in sizes.items()]


# name -> (what it is for, overrides of the quickstart). `process` gives CPU_PROCESS_BYTES and `fit` CPU_HEAP of
# models/hardware.py; `score` entered neither number, though they were seen while the formulas were written.
SHAPES: dict[str, tuple[str, list[str]]] = {
    "process": (
        "process",
        [
            *_SHORT,
            *_model(1, 32, 32, 4),
            "train.prompts_per_step=2",
            "train.prompts_per_minibatch=2",
            "rollout.samples_per_prompt=2",
            "train.micro_batch_tokens=64",
        ],
    ),
    "wide": ("fit", [*_FULL, *_FEW, *_model(8, 768, 2304, 12)]),
    "long": ("fit", _LONG),
    "quickstart": ("score", ["train.num_steps=8", "train.eval_every=4"]),
    "recompute": ("score", [*_LONG, "model.recompute=full"]),
    "sequence-parallel": ("score", [*_LONG, "parallel.sp=true"]),
    "vocabulary": ("score", [*_FULL, "model.hf_config.vocab_size=16384"]),
    "data-parallel": (
        "score",
        [*_FULL, *_FEW, *_model(8, 512, 1536, 8), "parallel.tp=1", "parallel.world_size=2"],
    ),
    "pipeline": ("score", [*_FULL, *_FEW, *_model(8, 512, 1536, 8), "parallel.tp=1", "parallel.pp=2"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=SHAPES, action="append", help="these shapes; default all")
    parser.add_argument("--write", action="store_true", help="write the planner's data file")
    options = parser.parse_args()
    rows = []
    print(
        f"{'shape':18} {'measured':>9} {'predicted':>9} {'error':>7}  MiB; load {os.getloadavg()[0]:.0f} at the start"
    )
    for name in options.only or SHAPES:
        use, overrides = SHAPES[name]
        peak = measure(name, overrides)
        predicted = predicted_bytes(load_config(ROOT / CONFIG, overrides), HARDWARE["cpu"])
        print(f"{name:18} {peak / 2**20:9.0f} {predicted / 2**20:9.0f} {predicted / peak - 1:+7.1%}", flush=True)
        rows.append({"name": name, "use": use, "overrides": json.dumps(overrides), "peak_bytes": str(peak)})
    if options.write:
        with open(DATA, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def measure(name: str, overrides: list[str]) -> int:
    """Bytes: the largest peak of the run's steps on rank 0, which logs it."""
    with tempfile.TemporaryDirectory() as folder:
        options = [f"name={name}", f"logging.run_dir={folder}/run", *overrides]
        if "warm_start=null" not in overrides:
            options.append(f"warm_start.cache_dir={folder}/warm_start")  # a cached one would not be measured
        command = [sys.executable, "-m", "megatron_rl", "train", CONFIG, *options]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=1800)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    return int(max(json.loads(line)["memory/peak_bytes"] for line in lines))


if __name__ == "__main__":
    main()
