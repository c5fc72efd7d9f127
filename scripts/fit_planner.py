"""Fits the planner's constants and scores them on public measurements and on this project's own CPU runs
(scripts/calibration/) that they have not seen. With --score prints each error; with --write makes
megatron_rl/plan/data/constants.json anew: python scripts/fit_planner.py [--score] [--write]."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from calibration import published
from calibration.fit import fit
from calibration.score import all_errors, cpu_memory_errors, summarise

TARGET = Path(__file__).resolve().parent.parent / "megatron_rl/plan/data/constants.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--score", action="store_true", help="print the errors, row by row, and no constants")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    scores, lines = {}, []
    for kind, (what, held_out, errors) in all_errors().items():
        score = summarise(what, held_out, errors)
        scores[kind] = asdict(score) | {"median": round(score.median, 3), "worst": round(score.worst, 3)}
        lines += [f"{what}: {score.rows} rows, median {score.median:.1%}, worst {score.worst:.1%} ({held_out})"]
        lines += [f"  {error:+7.1%}  {name}" for name, error in errors]
    constants = {name: float(f"{value:.4g}") for name, value in asdict(fit(published.rows())).items()}
    text = json.dumps({"constants": constants, "scores": scores}, indent=2) + "\n"
    print("\n".join(lines) if options.score else text)
    print("rows that set CPU_HEAP:", [(name, round(error, 3)) for name, error in cpu_memory_errors("fit")])
    if options.write:
        TARGET.write_text(text)


if __name__ == "__main__":
    main()
