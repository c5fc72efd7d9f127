"""The report's parts that are text: configurations compared, shadow results, the sample browser."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from megatron_rl.report.runs import LoggedRun


def table_html(cells: Sequence[Sequence[str]]) -> str:
    """Return an HTML table of plain text whose first row is its header."""
    head, *rows = [[escape(cell) for cell in row] for row in cells]
    titles = "".join(f"<th>{cell}</th>" for cell in head)
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="small"><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def config_differences(runs: Sequence[LoggedRun]) -> str:
    """Return an HTML table of the options that differ between the runs; nothing for one run."""
    known = [run for run in runs if run.config]
    if len(known) < 2:
        return ""
    flat = [dict(_flatten(run.config)) for run in known]
    names = sorted({name for options in flat for name in options})
    rows = [[name, *(options.get(name, "–") for options in flat)] for name in names]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    if not differing:
        return '<p class="absent">All options are the same.</p>'
    table = table_html([["option", *(run.label for run in known)], *differing])
    return f'<article class="differences"><h3>Options that differ</h3>{table}</article>'


def _flatten(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    leaves: list[tuple[str, str]] = []
    for name, item in value.items():
        whole = isinstance(item, dict) and item
        leaves += _flatten(item, f"{prefix}{name}.") if whole else [(prefix + str(name), str(item))]
    return leaves


def shadow_section(runs: Sequence[LoggedRun]) -> str:
    """Return the section on the newest `megatron-rl shadow` of each run: the methods on one frozen batch."""
    parts = [_shadow(run) for run in runs if run.shadow]
    missing = [run.label for run in runs if not run.shadow]
    absent = f"No replay (megatron-rl shadow RUN) of: {', '.join(missing)}." if missing else ""
    return (
        f'<section><h2>Methods on one frozen batch</h2><div class="wide">{"".join(parts)}</div>'
        f'<p class="absent">{escape(absent)}</p></section>'
    )


def _shadow(run: LoggedRun) -> str:
    names = list(run.shadow["losses"])
    parts = []
    for mini_batch in run.shadow["minibatches"]:
        cells = [["method", "restrained", "dH, logits", "dH, step", "gradient norm", f"cosine with {names[0]}"]]
        for i, name in enumerate(names):
            row = mini_batch["methods"][name]
            numbers = [row["restrained"], row["predicted_change"], row["entropy_slope"], row["grad_norm"]]
            cells.append([name, *(_number(value) for value in [*numbers, mini_batch["cosine"][i][0]])])
        picky = [i for i, name in enumerate(names) if mini_batch["methods"][name]["restrained"]]
        overlap = [["overlap", *(names[i] for i in picky)]]
        overlap += [[names[i], *(_number(mini_batch["overlap"][i][j]) for j in picky)] for i in picky]
        policy = (
            "on-policy" if mini_batch["minibatch"] == 0 else f"after {mini_batch['minibatch']} of the step's updates"
        )
        title = f"{run.label}: step {run.shadow['step']}, {mini_batch['tokens']} tokens, {policy}"
        parts.append(
            f"<article><h3>{escape(title)}</h3><p>Restrained tokens, the entropy change that each method's gradient "
            "predicts (first order, per unit step of the logits and of the parameters), and shared tokens over all of "
            f"either method's.</p>{table_html(cells)}{table_html(overlap)}</article>"
        )
    return "".join(parts)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def samples_section(runs: Sequence[LoggedRun]) -> str:
    """Return the sample browser; its data are JSON that report.js shows as text, never as markup."""
    chosen = [{"label": run.label, "samples": _plain(list(run.samples))} for run in runs if run.samples]
    if not chosen:
        return '<section><h2>Samples</h2><p class="absent">No run has a samples.jsonl.</p></section>'
    missing = [run.label for run in runs if run.samples and not any("tokens" in row for row in run.samples)]
    note = f"Without values per token (older runs): {', '.join(missing)}." if missing else ""
    data = json.dumps(chosen, allow_nan=False).replace("</", "<\\/")
    options = "".join(f"<option>{name}</option>" for name in ("entropy", "logprob", "covariance", "selected"))
    return (
        '<section><h2>Samples</h2><article id="samples"><p class="pick"><label>run <select id="sample-run"></select>'
        '</label> <label>step <select id="sample-step"></select></label> <label>colour tokens by '
        f'<select id="sample-colour">{options}</select></label></p>'
        "<p>Stronger is larger in magnitude, within the step shown; blue is negative covariance; "
        f'outlined tokens were selected by the method. Hover for the values.</p><p class="absent">{escape(note)}</p>'
        f'<div id="sample-list"></div></article><script>const SAMPLES = {data};</script></section>'
    )


def _plain(value: Any) -> Any:
    """Return the value with null where JSON has no number."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
