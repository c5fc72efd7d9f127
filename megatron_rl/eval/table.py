"""The results in the layout of the paper's table, beside its published rows: Markdown, CSV, JSON.

Tables for people are in percent, as the paper's is; JSON holds fractions.
"""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rl.config.benchmarks import PAPER_SETS, PRESETS, PUBLISHED
from megatron_rl.eval.evaluator import MEANS, SetResult
from megatron_rl.eval.statistics import Estimate, mean_of
from megatron_rl.files import write_atomically

NONE = "–"


def average(results: Sequence[SetResult], *, confidence: float) -> Estimate | None:
    """Return the mean over the paper's seven sets; None unless all of them were evaluated."""
    by_name = {result.name: result for result in results}
    if any(name not in by_name for name in PAPER_SETS):
        return None
    return mean_of([by_name[name].accuracy for name in PAPER_SETS], confidence=confidence)


@dataclass(frozen=True, slots=True)
class Table:
    """Results to read: grids of (head, rows), whose first column names the row, and notes on how to read them."""

    model: str
    grids: tuple[tuple[list[str], list[list[str]]], ...]
    notes: tuple[str, ...]

    def markdown(self) -> str:
        """Return the grids as pipe tables, and the notes."""
        return "\n\n".join([*(_pipes(head, rows) for head, rows in self.grids), "\n".join(self.notes)]) + "\n"


def write_tables(folder: Path, model: str, results: Sequence[SetResult], *, confidence: float) -> Table:
    """Write table.md, table.csv and table.json; return the table."""
    table = as_table(model, results, confidence=confidence)
    write_atomically(folder / "table.md", table.markdown())
    write_atomically(folder / "table.csv", as_csv(model, results, confidence=confidence))
    rows = as_json(model, results, confidence=confidence)
    write_atomically(folder / "table.json", json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return table


def as_table(model: str, results: Sequence[SetResult], *, confidence: float) -> Table:
    """Return the table, one line of details per set, and the notes that keep the comparison honest."""
    by_name, in_paper, others = _columns(results)
    mean = average(results, confidence=confidence)
    titles = [PRESETS[name].title for name in in_paper] + (["Avg."] if in_paper else []) + [r.title for r in others]
    cells = [_cell(by_name[name].accuracy) if name in by_name else NONE for name in in_paper]
    cells += [_cell(mean)] if in_paper else []
    rows = [[model, *cells, *(_cell(result.accuracy) for result in others)]]
    notes = [f"Percent correct, with {confidence:.0%} intervals (bootstrap over problems)."]
    if in_paper:
        for row in PUBLISHED:
            scores = [f"{score:.1f}" for score in (*row.scores, row.average)]
            rows.append([f"{row.model} {row.method}, published", *scores, *[NONE] * len(others)])
        means = ", ".join(f"{row.model} {row.method} {np.mean(row.scores):.1f}" for row in PUBLISHED)
        notes += [
            f"Avg. is the mean of the seven sets{'.' if mean else ', and needs all of them.'}",
            "Published: arXiv 2505.22617, Table 2. Its Avg. is quoted as printed, which is not the mean of the printed "
            f"columns: {means}.",
        ]
    return Table(model, ((["model", *titles], rows), _details(results)), tuple(notes))


def _columns(results: Sequence[SetResult]) -> tuple[dict[str, SetResult], tuple[str, ...], list[SetResult]]:
    """Return (results by set; the paper's sets, if any was evaluated; the other results)."""
    by_name = {result.name: result for result in results}
    in_paper = PAPER_SETS if any(name in by_name for name in PAPER_SETS) else ()
    return by_name, in_paper, [result for result in results if result.name not in PAPER_SETS]


def _details(results: Sequence[SetResult]) -> tuple[list[str], list[list[str]]]:
    head = ["set", "problems", "samples", "temperature", "avg", "pass@n", "maj@n", "tokens", "cut", "no box"]
    rows = []
    for result in results:
        whole = result.problems == result.num_in_file
        problems = str(result.problems) if whole else f"first {result.problems} of {result.num_in_file}"
        estimates, n = result.estimates, result.samples
        rows.append(
            [
                result.title,
                problems,
                str(n),
                f"{result.temperature:g}" if result.temperature else "greedy",
                _cell(result.accuracy),
                _cell(estimates.get(f"pass@{n}")),
                _cell(estimates.get(f"maj@{n}")),
                f"{result.length_mean:.0f}",
                f"{100 * result.truncated_fraction:.1f}",
                f"{100 * result.unboxed_fraction:.1f}",
            ]
        )
    return head, rows


def _pipes(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return NONE
    return f"{100 * estimate.value:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def as_csv(model: str, results: Sequence[SetResult], *, confidence: float) -> str:
    """Return one line per model, in percent; each column is followed by the ends of its interval, empty where
    published."""
    by_name, in_paper, others = _columns(results)
    estimates: list[tuple[str, Estimate | None]] = [
        (PRESETS[name].title, by_name[name].accuracy if name in by_name else None) for name in in_paper
    ]
    estimates += [("Avg.", average(results, confidence=confidence))] if in_paper else []
    estimates += [(result.title, result.accuracy) for result in others]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", *(title + end for title, _ in estimates for end in ("", " low", " high"))])
    ours = [[f"{100 * x:.3f}" for x in (e.value, e.low, e.high)] if e else [""] * 3 for _, e in estimates]
    writer.writerow([model, *(cell for cells in ours for cell in cells)])
    if in_paper:
        for row in PUBLISHED:
            cells = [cell for score in (*row.scores, row.average) for cell in (score, "", "")]
            writer.writerow([f"{row.model} {row.method}, published", *cells, *[""] * 3 * len(others)])
    return text.getvalue()


def as_json(model: str, results: Sequence[SetResult], *, confidence: float) -> dict[str, Any]:
    """Return everything: all pass@k and maj@k with their intervals, as fractions; the published rows in percent."""
    sets = {
        result.name: {
            **{name: getattr(result, name) for name in ("title", "problems", "samples", "temperature", *MEANS)},
            "problems_in_file": result.num_in_file,
            "estimates": {name: _triple(estimate) for name, estimate in result.estimates.items()},
        }
        for result in results
    }
    whole = average(results, confidence=confidence)
    published = [
        {
            "model": row.model,
            "method": row.method,
            "scores": dict(zip(PAPER_SETS, row.scores, strict=True)),
            "average_as_printed": row.average,
        }
        for row in PUBLISHED
    ]
    return {
        "model": model,
        "confidence": confidence,
        "sets": sets,
        "average": None if whole is None else _triple(whole),
        "published_percent": published,
    }


def _triple(estimate: Estimate) -> dict[str, float]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}
