"""Profiles as tables: of strings for the page, of rich for the terminal."""

from collections.abc import Iterable
from typing import Any

from rich import box
from rich.table import Table

# rate -> (what it is called, format)
RATES = {
    "tokens_per_second_per_process": ("tokens/s per process", "{:,.0f}"),
    "generated_tokens_per_second": ("generated tokens/s", "{:,.0f}"),
    "mfu_forward_backward": ("MFU of forward and backward", "{:.4f}"),
    "mfu_old_logprobs": ("MFU of old log-probabilities", "{:.4f}"),
    "mfu_step": ("MFU of the step", "{:.4f}"),
}
FRACTIONS = {
    "communication_fraction": "communication, fraction of the step",
    "waiting_fraction": "waiting for other ranks, fraction of the step",
    "pipeline_bubble": "pipeline bubble, fraction of the passes",
    "untracked_fraction": "outside every phase, fraction of the step",
}
_NARROW: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False, "collapse_padding": True}
ASYNCHRONOUS = "not measured: the device runs asynchronously, see the trace"


def phase_rows(profile: dict[str, Any]) -> list[list[str]]:
    """Return a header, a row a phase, their sum; `slowest`: a rank (its seconds), MiB: the peak, "–": unmeasured."""
    summary = profile["summary"]
    wall, on_gpu = summary["step_seconds"], profile["facts"]["on_gpu"]
    rows = [["phase", "s", "share", "device s", "comm s", "wait s", "slowest", "MiB"]]
    for name, cost in summary["phases"].items():
        own = [of_rank.get(name, 0.0) for of_rank in summary["by_rank"]]
        slowest = max(range(len(own)), key=own.__getitem__)
        rows.append(
            [
                name if name != "checkpoint" else "checkpoint (one)",
                f"{cost['seconds']:.3f}",
                f"{cost['seconds'] / wall:.3f}" if name != "checkpoint" else "–",
                f"{cost['device_seconds']:.3f}" if cost["device_seconds"] else "–",
                "–" if on_gpu else f"{cost['communication_seconds']:.3f}",
                "–" if on_gpu else f"{cost['waiting_seconds']:.3f}",
                f"{slowest} ({own[slowest]:.3f})",
                f"{cost['peak_bytes'] / 2**20:,.0f}" if cost["peak_bytes"] else "–",
            ]
        )
    stepwise = [cost for name, cost in summary["phases"].items() if name != "checkpoint"]
    total = {key: sum(cost[key] for cost in stepwise) for key in stepwise[0]}
    other = wall - total["seconds"]
    rows.append(["no phase", f"{other:.3f}", f"{other / wall:.3f}", *["–"] * 5])
    sums = [total["device_seconds"], total["communication_seconds"], total["waiting_seconds"]]
    peak = max(cost["peak_bytes"] for cost in stepwise) / 2**20
    shown = [f"{sums[0]:.3f}", *(["–", "–"] if on_gpu else [f"{value:.3f}" for value in sums[1:]])]
    rows.append(["step", f"{wall:.3f}", "1.000", *shown, "", f"{peak:,.0f}"])
    return rows


def rate_rows(profile: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (name, value) of rates and fractions, in reading order."""
    summary, facts = profile["summary"], profile["facts"]
    peak = summary["peak_flops"]
    source = facts["peak_source"]
    rows = []
    for key, (label, style) in RATES.items():
        value = summary["rates"][key]
        none = source if key.startswith("mfu") and peak is None else "not measured"
        rows.append((label, none if value is None else style.format(value)))
    rows.append(("peak FLOP/s of all processes", f"{peak:.3g} ({source})" if peak else source))
    for key, label in FRACTIONS.items():
        value = summary[key]
        rows.append((label, ASYNCHRONOUS if value is None else f"{value:.3f}"))
    names = ", ".join(map(str, summary["stragglers"])) or "none"
    rows.append(("stragglers", ASYNCHRONOUS if facts["on_gpu"] else names))
    return rows


def summary_table(profile: dict[str, Any]) -> Table:
    """Return a table of the phases, with the rates in its caption."""
    facts, (header, *rows) = profile["facts"], phase_rows(profile)
    caption = "\n".join(f"{label}: {value}" for label, value in rate_rows(profile))
    title = f"{facts['name']}: {len(profile['summary']['steps'])} steps, {facts['layout']}, {facts['device']}"
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", **_NARROW)
    for column in header:
        table.add_column(column, justify="left" if column == "phase" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def compare_rows(first: dict[str, Any], second: dict[str, Any]) -> list[list[str]]:
    """Return a header and rows (name, first, second, second / first): phases, the step, the rates."""

    def row(name: str, values: Iterable[float | None], style: str = "{:.3f}") -> list[str]:
        a, b = values
        shown = ["–" if value is None else style.format(value) for value in (a, b)]
        return [name, *shown, f"{b / a:.2f}" if a and b is not None else "–"]

    a, b = first["summary"], second["summary"]
    names = list(a["phases"]) + [name for name in b["phases"] if name not in a["phases"]]
    rows = [["what", "first", "second", "ratio"]]
    for name in names:
        costs = [summary["phases"].get(name) for summary in (a, b)]
        rows.append(row(f"{name}, s", [None if cost is None else cost["seconds"] for cost in costs]))
    rows.append(row("step, s", [a["step_seconds"], b["step_seconds"]]))
    rows += [row(label, [a["rates"][key], b["rates"][key]], style) for key, (label, style) in RATES.items()]
    rows += [row(label, [a[key], b[key]]) for key, label in FRACTIONS.items()]
    peaks = [max(cost["peak_bytes"] for cost in s["phases"].values()) / 2**20 for s in (a, b)]
    rows.append(row("peak memory of a process, MiB", peaks, "{:,.0f}"))
    return rows


def compare_table(first: dict[str, Any], second: dict[str, Any], name: str, other: str) -> Table:
    """Return `compare_rows` as a table, with what else differs between the two in its caption."""
    header, *rows = compare_rows(first, second)
    keys = ("device", "torch", "processes", "layout")
    differing = [key for key in keys if first["facts"][key] != second["facts"][key]]
    caption = "\n".join(f"{key}: {first['facts'][key]} against {second['facts'][key]}" for key in differing)
    table = Table(title=f"{name} against {other}", caption=caption or None, title_justify="left", **_NARROW)
    for column in header:
        table.add_column(column, justify="left" if column == "what" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
