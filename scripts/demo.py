"""The demo: GRPO, Clip-Cov and KL-Cov from the same warm start and seed, then one report. Run it with `make demo`."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

from megatron_rl.cli import main, run_training
from megatron_rl.config import load_config
from megatron_rl.report import build_report

CONFIG = Path("configs/quickstart.yaml")
FOLDER = Path("runs/demo")
# name: what it changes in the config, whose own loss is GRPO's
METHODS: dict[str, list[str]] = {
    "grpo": [],
    "clip_cov": ["loss={type: clip_cov, select_fraction: 0.02}"],
    "kl_cov": ["loss={type: kl_cov, select_fraction: 0.1, kl_coef: 2.0}"],
}


def demo() -> None:
    """Train each method, write the report; ends with a run's exit code if it does not end well."""
    began = time.monotonic()
    run_dirs = []
    for name, overrides in METHODS.items():
        shared = [f"name={name}", f"logging.run_dir={FOLDER}/{{name}}", "train.resume=never"]
        config = load_config(CONFIG, [*shared, *overrides])
        shutil.rmtree(config.run_dir, ignore_errors=True)  # the demo shows a run from its start
        print(f"== {name}: {config.run_dir}", flush=True)
        if code := run_training(config):
            sys.exit(code)
        run_dirs.append(config.run_dir)
    page = build_report(run_dirs, FOLDER / "report.html")
    print(f"== {time.monotonic() - began:.0f} s; the report: {page}")


if __name__ == "__main__":
    main(demo)
