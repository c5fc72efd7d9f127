"""A profile as one HTML file: the timeline of a step across ranks, and the tables behind it."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_rl.profiling.analysis import ASSETS, PHASES, RankRecord, Summary, order, waiting
from megatron_rl.profiling.tables import ASYNCHRONOUS, phase_rows, rate_rows
from megatron_rl.report.figures import Figure
from megatron_rl.report.page import document, numbered

COLOURS = PHASES | {"waiting": "#f4b6bd", "communication": "#d1495b"}
OTHER_COLOUR = "#8b8f99"
# stretches of one kind that lie closer together than this share of the step are drawn as one: they are one pixel
_PIXEL = 1 / 4000
_ROW = 34  # pixels


def write_page(
    path: Path, facts: dict[str, Any], summary: Summary, ranks: Sequence[RankRecord], config_text: str
) -> None:
    """Write the page. `facts`: those of profile.json."""
    profile = {"facts": facts, "summary": asdict(summary)}
    step = median_step(ranks)
    timeline = Figure(
        f"Step {step} on every rank",
        "Upper row of a rank: its phases. Middle: parts of a phase. Lower: its host in collectives. The "
        "step is the one of median length; zoom with a drag, hover for names and seconds.",
        *timeline_figure(ranks, step),
    )
    where = Figure("Seconds of each phase by rank", "A longer bar of one rank is a straggler's.", *bars_figure(summary))
    calls = [(name, f"{calls:,.1f}", f"{seconds:.4f}") for name, (calls, seconds) in summary.collectives.items()]
    traced = [(name, str(count), f"{s:.4f}") for name, (count, s) in sorted(facts["trace_collectives"].items())]
    figures = numbered([timeline, where])
    text = document(
        ASSETS / "profile.html",
        f"Profile of {facts['name']}",
        figures,
        cards=figures,
        facts=facts,
        summary=summary,
        phases=phase_rows(profile),
        rates=[("what", "value"), *rate_rows(profile)],
        ranks=rank_rows(summary, ranks, on_gpu=facts["on_gpu"]),
        collectives=[("operation", "calls", "host s"), *calls],
        traced=[("in the trace of rank 0", "events", "seconds"), *traced],
        asynchronous=ASYNCHRONOUS,
        config_text=config_text,
    )
    path.write_text(text, encoding="utf-8")


def median_step(ranks: Sequence[RankRecord]) -> int:
    """Return the measured step of median length on rank 0 (of an even number: the shorter middle one)."""
    lengths = [(record.end - record.start, record.step) for record in ranks[0].steps]
    middle = statistics.median_low([length for length, _ in lengths])
    return next(step for length, step in lengths if length == middle)


def timeline_figure(ranks: Sequence[RankRecord], step: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return Plotly's traces and layout: a bar a stretch, a trace a name, in seconds from the first rank's start."""
    records = [next(record for record in rank.steps if record.step == step) for rank in ranks]
    origin = min(record.start + rank.clock_offset for rank, record in zip(ranks, records, strict=True))
    length = max(record.end + rank.clock_offset for rank, record in zip(ranks, records, strict=True)) - origin
    waits, _ = waiting(ranks)
    bars: dict[str, list[tuple[str, float, float]]] = defaultdict(list)  # name -> (row, start, end)
    rows: list[str] = []
    for rank, record in zip(ranks, records, strict=True):
        shift, label = rank.clock_offset - origin, f"rank {rank.rank}"
        used = [label]
        for span in record.spans:
            row = f"{label} {span.thread}" if span.thread else label if span.parent < 0 else f"{label} parts"
            bars[span.name].append((row, span.start + shift, span.end + shift))
            used.append(row)
        for c in record.collectives:
            row, arrived = f"{label} collectives", c.start + waits.get(id(c), 0.0)
            bars["waiting"].append((row, c.start + shift, arrived + shift))
            bars["communication"].append((row, arrived + shift, c.end + shift))
            used.append(row)
        rows += dict.fromkeys(used)
    traces = []
    for name in sorted(bars, key=order):
        merged = _merged(bars[name], length * _PIXEL)
        seconds = [round(end - start, 6) for _, start, end in merged]
        trace = _bar(name, [row for row, _, _ in merged], seconds, "<br>from %{base:.4f} s, %{x:.4f} s")
        trace["marker"]["line"] = {"width": 0}
        traces.append(trace | {"base": [round(start, 6) for _, start, _ in merged]})
    layout = {
        "barmode": "overlay",
        "bargap": 0.15,
        "height": 120 + _ROW * len(rows),
        "showlegend": True,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        "hovermode": "closest",
        "xaxis": {"title": {"text": "seconds"}, "range": [0, length]},
        "yaxis": {"categoryorder": "array", "categoryarray": rows[::-1], "type": "category"},
    }
    return traces, layout


def bars_figure(summary: Summary) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return Plotly's traces and layout: one stacked bar a rank, of the phases' own seconds, waiting included."""
    labels = [f"rank {rank}" for rank in range(len(summary.by_rank))]
    traces = [
        _bar(name, labels, [seconds_of.get(name, 0.0) for seconds_of in summary.by_rank], ": %{x:.3f} s")
        for name in summary.phases
        if name != "checkpoint"
    ]
    layout = {
        "barmode": "stack",
        "showlegend": True,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
        "height": 160 + _ROW * len(labels),
        "xaxis": {"title": {"text": "seconds of a step"}},
        "yaxis": {"type": "category", "autorange": "reversed"},
    }
    return traces, layout


def rank_rows(summary: Summary, ranks: Sequence[RankRecord], *, on_gpu: bool) -> list[list[str]]:
    """Return a header, then one row a rank: its place, and the seconds a step that the others waited for it."""
    rows = [["rank", "tp, pp, dp", "host", "others waited for it, s"]]
    for rank, caused in zip(ranks, summary.caused_waiting, strict=True):
        place = f"{rank.place['tp']}, {rank.place['pp']}, {rank.place['dp']}"
        rows.append([str(rank.rank), place, rank.host, "–" if on_gpu else f"{caused:.3f}"])
    return rows


def _merged(stretches: list[tuple[str, float, float]], gap: float) -> list[tuple[str, float, float]]:
    merged: list[tuple[str, float, float]] = []
    for row, start, end in sorted(stretches):
        if merged and merged[-1][0] == row and start - merged[-1][2] < gap:
            merged[-1] = (row, merged[-1][1], max(end, merged[-1][2]))
        else:
            merged.append((row, start, end))
    return merged


def _bar(name: str, rows: list[str], seconds: list[float], hover: str) -> dict[str, Any]:
    base = {"type": "bar", "orientation": "h", "name": name, "hovertemplate": name + hover}
    return base | {"y": rows, "x": seconds, "marker": {"color": COLOURS.get(name, OTHER_COLOUR)}}
