"""The demo: methods from the same start and seed, then one report.

`make demo` runs GRPO, Clip-Cov and KL-Cov on the quickstart; `make demo-smollm2` GRPO and KL-Cov on a real model.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

from megatron_rl.cli import main, run_training
from megatron_rl.config import load_config
from megatron_rl.report import build_report

# of each config, name: what it changes in the config, whose own loss is GRPO's
METHODS: dict[str, dict[str, list[str]]] = {
    "quickstart": {
        "grpo": [],
        "clip_cov": ["loss={type: clip_cov, select_fraction: 0.02}"],
        "kl_cov": ["loss={type: kl_cov, select_fraction: 0.1, kl_coef: 2.0}"],
    },
    "smollm2_135m": {"grpo": [], "kl_cov": ["loss={type: kl_cov, select_fraction: 0.02, kl_coef: 1.0}"]},
}


def demo() -> None:
    """Train each method, write the report; ends with a run's exit code if it does not end well."""
    name = sys.argv[1] if len(sys.argv) > 1 else "quickstart"
    folder = Path("runs/demo") if name == "quickstart" else Path("runs") / f"demo_{name}"
    began = time.monotonic()
    run_dirs = []
    for method, overrides in METHODS[name].items():
        shared = [f"name={method}", f"logging.run_dir={folder}/{{name}}", "train.resume=never"]
        config = load_config(Path("configs") / f"{name}.yaml", [*shared, *overrides])
        shutil.rmtree(config.run_dir, ignore_errors=True)  # the demo shows a run from its start
        print(f"== {method}: {config.run_dir}", flush=True)
        if code := run_training(config):
            sys.exit(code)
        run_dirs.append(config.run_dir)
    page = build_report(run_dirs, folder / "report.html")
    print(f"== {time.monotonic() - began:.0f} s; the report: {page}")


if __name__ == "__main__":
    main(demo)
