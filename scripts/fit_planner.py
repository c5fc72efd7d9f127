"""Fits the planner's constants and scores them on what they have not seen; with --write makes
megatron_rl/plan/data/constants.json anew: python scripts/fit_planner.py [--write]."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from megatron_rl.plan import published
from megatron_rl.plan.fit import fit
from megatron_rl.plan.score import all_errors, cpu_memory_errors, summarise

TARGET = Path(__file__).resolve().parent.parent / "megatron_rl/plan/data/constants.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    constants = {name: float(f"{value:.4g}") for name, value in asdict(fit(published.rows())).items()}
    scores = {}
    for kind, (what, held_out, errors) in all_errors().items():
        score = summarise(what, held_out, errors)
        scores[kind] = asdict(score) | {"median": round(score.median, 3), "worst": round(score.worst, 3)}
    text = json.dumps({"constants": constants, "scores": scores}, indent=2) + "\n"
    print(text)
    print("rows that set CPU_HEAP:", [(name, round(error, 3)) for name, error in cpu_memory_errors("fit")])
    if options.write:
        TARGET.write_text(text)


if __name__ == "__main__":
    main()
