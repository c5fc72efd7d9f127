"""The report as one HTML file that needs no network."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from megatron_rl import __version__
from megatron_rl.errors import UserError
from megatron_rl.files import refusal, write_atomically
from megatron_rl.launch import say
from megatron_rl.metrics.write import format_duration
from megatron_rl.report.catalogue import sections
from megatron_rl.report.figures import Figure, build, colour
from megatron_rl.report.panels import config_differences, samples_section, shadow_section, table_html
from megatron_rl.report.runs import ENDS, LoggedRun, NotYet, evaluation_tables, load_runs, summary_of

ASSETS = Path(__file__).parent / "assets"
# Map figures would load from these; the report has none, and nothing in it may name a CDN.
CDN_ADDRESSES = ("https://cdn.plot.ly/un/", "https://cdn.jsdelivr.net/npm/")
# The browser itself then refuses whatever would leave the file.
CONTENT_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
)
COLUMNS = (
    ("entropy_first", "{:.3f}"),
    ("entropy_last", "{:.3f}"),
    ("accuracy_first", "{:.3f}"),
    ("accuracy_last", "{:.3f}"),
    ("eval_first", "{:.3f}"),
    ("eval_last", "{:.3f}"),
    ("law_r2", "{:.2f}"),
    ("tokens_per_second", "{:,.0f}"),
)


def build_report(run_dirs: Sequence[Path], out: Path | None = None, reload_seconds: int = 0) -> Path:
    """Write one self-contained HTML file that compares the runs, and return its path.

    `out`: null puts `report.html` into the run's folder, or for several runs into the folder of the first one's parent.
    `reload_seconds`: the page reloads itself this often, at the place where it is read; 0: never.

    Raises: UserError when a folder is not a run or has no complete step yet, or the page cannot be written.
    """
    runs = load_runs(run_dirs)
    out = out or _default_page(run_dirs)
    text = render(runs, reload_seconds)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, text)  # a page that reloads itself never meets half a file
    except OSError as error:
        raise refusal(error) or UserError(f"cannot write {out}: {error}") from error
    return out


def keep_current(run_dirs: Sequence[Path], out: Path | None, seconds: int, tell: Callable[[str], None] = say) -> None:
    """Write the page, and again every `seconds` when a run grew, until Ctrl-C; then once more without reloading.

    Runs that have not begun are waited for: `tell` gets what is missing, and the page shows it where its folder exists.
    Raises: UserError when a folder holds something else than a run.
    """
    seen, said = None, ""
    try:
        while True:
            files = [
                file for path in map(Path, run_dirs) for file in (path / "metrics.jsonl", *evaluation_tables(path))
            ]
            state = [(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
            if state != seen or len(state) < len(files):
                text = _refresh(run_dirs, out, seconds)
                if text != said:
                    tell(text)
                seen, said = state, text
            time.sleep(seconds)
    except KeyboardInterrupt:
        with contextlib.suppress(NotYet):
            build_report(run_dirs, out)


def _refresh(run_dirs: Sequence[Path], out: Path | None, seconds: int) -> str:
    """Write the page or its stand-in; return the page's path, or what is waited for."""
    try:
        return str(build_report(run_dirs, out, seconds))
    except NotYet as missing:
        page, text = out or _default_page(run_dirs), f"waiting for {missing}"
    if page.parent.is_dir():  # a run's folder is the run's to make
        body = f"<header><h1>Entropy Mechanism report</h1><p>{escape(text)}</p></header>{_reload(seconds)}"
        write_atomically(page, document("waiting", [body], {}))
        text += f"\n{page}"
    return text


def _default_page(run_dirs: Sequence[Path]) -> Path:
    first = Path(run_dirs[0])
    return (first if len(run_dirs) == 1 else first.resolve().parent) / "report.html"


def _reload(seconds: int) -> str:
    return f"<script>const RELOAD_SECONDS = {seconds};</script>"


def render(runs: Sequence[LoggedRun], reload_seconds: int = 0) -> str:
    """Return the whole page as HTML."""
    plots: dict[str, Any] = {}
    body = [_header(runs), _summary(runs), _notes(runs)]
    for title, specs in sections(runs):
        figures = [build(spec, runs) for spec in specs]
        cards = [card(figure, plots) for figure in figures if not figure.missing]
        body.append(
            f'<section><h2>{escape(title)}</h2><div class="grid">{"".join(cards)}</div>{_not_shown(figures)}</section>'
        )
    body += [shadow_section(runs), samples_section(runs), _configs(runs)]
    if reload_seconds:
        body.append(_reload(reload_seconds))
    return document(", ".join(run.label for run in runs), body, plots)


def document(title: str, body: Sequence[str], plots: Mapping[str, Any]) -> str:
    """Return a self-contained page: `body` is HTML; `plots` are Plotly figures by the id of the element that shows
    them."""
    data = json.dumps(plots, allow_nan=False).replace("</", "<\\/")
    return "\n".join(
        [
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>{(ASSETS / 'report.css').read_text()}</style></head><body><main>",
            *body,
            f"</main><script>{_plotly()}</script>",
            f"<script>const FIGURES = {data};</script>",
            f"<script>{(ASSETS / 'report.js').read_text()}</script></body></html>",
        ]
    )


def _plotly() -> str:
    source = get_plotlyjs()
    for address in CDN_ADDRESSES:
        source = source.replace(address, "")
    return source


def _header(runs: Sequence[LoggedRun]) -> str:
    chips = "".join(
        f'<button class="chip" data-run="{i}" aria-pressed="true" title="show or hide this run in every figure">'
        f'<span style="background:{colour(i)}"></span>{escape(run.label)}</button>'
        for i, run in enumerate(runs)
    )
    many = f"{len(runs)} runs" if len(runs) > 1 else "1 run"
    return (
        f"<header><h1>Entropy Mechanism report</h1><p>{many}, megatron_rl {__version__}. Faint lines are the logged "
        "values, strong ones their moving average. Entropies and log-probabilities are in nats.</p></header>"
        f'<nav class="chips">{chips}</nav>'
    )


def _summary(runs: Sequence[LoggedRun]) -> str:
    rows = []
    for i, run in enumerate(runs):
        row = summary_of(run)
        cells = [style.format(row[key]) if row[key] is not None else "–" for key, style in COLUMNS]
        wall = format_duration(row["wall_seconds"]) if row["wall_seconds"] is not None else "–"
        numbers = "".join(f"<td>{escape(cell)}</td>" for cell in [str(row["steps"]), *cells, wall])
        rows.append(f'<tr><th scope="row"><i style="background:{colour(i)}"></i>{escape(run.label)}</th>{numbers}</tr>')
    return (
        '<div class="scroll"><table class="summary"><thead><tr><th rowspan="2">run</th><th rowspan="2">steps</th>'
        '<th colspan="2">entropy, nats</th><th colspan="2">training accuracy</th>'
        '<th colspan="2">evaluation accuracy</th>'
        '<th rowspan="2">R² of<br>the law</th><th rowspan="2">tokens/s</th><th rowspan="2">wall time</th></tr>'
        f"<tr>{f'<th>first {ENDS}</th><th>last {ENDS}</th>' * 2}<th>first</th><th>last</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _notes(runs: Sequence[LoggedRun]) -> str:
    items = "".join(f"<li><b>{escape(run.label)}</b>: {escape(note)}</li>" for run in runs for note in run.notes)
    return f'<ul class="notes">{items}</ul>' if items else ""


def card(figure: Figure, plots: dict[str, Any]) -> str:
    """Return the figure as an HTML article; its plot goes into `plots` for `document`."""
    name = f"figure-{len(plots)}"
    plots[name] = {"traces": figure.traces, "layout": figure.layout}
    dashes = {"solid": "none", "dash": "7 4", "dot": "2 3", "dashdot": "7 3 2 3", "longdash": "11 4"}
    keys = "".join(
        f'<span><svg width="30" height="8"><line x1="0" y1="4" x2="30" y2="4" stroke="currentColor" stroke-width="2" '
        f'stroke-dasharray="{dashes[dash]}"/></svg>{escape(meaning)}</span>'
        for dash, meaning in figure.keys
    )
    table = table_html(figure.table) if figure.table else ""
    notes = f'<p class="absent">{escape("; ".join(figure.notes))}.</p>' if figure.notes else ""
    return (
        f"<article><h3>{escape(figure.title)}</h3><p>{escape(figure.why)}</p>"
        + (f'<p class="keys">{keys}</p>' if keys else "")
        + f'<div class="plot" id="{name}"></div>{table}{notes}</article>'
    )


def _not_shown(figures: Sequence[Figure]) -> str:
    items = [f"{escape(figure.title)} ({escape(figure.missing)})" for figure in figures if figure.missing]
    return f'<p class="absent">Not shown: {"; ".join(items)}.</p>' if items else ""


def _configs(runs: Sequence[LoggedRun]) -> str:
    parts = [
        f"<details><summary>{escape(run.label)} <code>{escape(str(run.path))}</code></summary>"
        f"<pre>{escape(run.config_text) or 'no config.yaml in the run folder'}</pre></details>"
        for run in runs
    ]
    return f"<section><h2>Configuration</h2>{config_differences(runs)}{''.join(parts)}</section>"
