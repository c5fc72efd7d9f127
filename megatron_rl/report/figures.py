"""The figures of the report, as Plotly JSON. A figure whose metrics no run has is a note instead."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_rl.metrics.entropy_law import fit_law, fit_line
from megatron_rl.report.runs import LoggedRun

RUN_COLOURS = ("#4269d0", "#e8780c", "#2f9e62", "#c3489b", "#8a63d2", "#0f9fb5", "#b08900", "#d1495b")
PHASE_COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e")
PHASES = ("rollout", "reward", "old_logprobs", "select", "update", "sync", "probe", "eval", "checkpoint")
MAX_POINTS = 2000  # of a trace: more than a screen has columns, and few enough for a browser
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")

Trace = dict[str, Any]
Built = tuple[list[Trace], dict[str, Any], list[list[str]]] | None  # traces, layout, table


@dataclass(frozen=True, slots=True)
class Plot:
    """What a figure shows and why: `metrics` over steps, or what `draw` makes of the runs."""

    title: str
    why: str
    metrics: dict[str, str] = field(default_factory=dict)  # name -> meaning, told apart by their dashes
    unit: str = ""
    log: bool = False
    sparse: bool = False  # measured on few steps: markers, no smoothing
    draw: Callable[[Sequence[LoggedRun]], Built] | None = None  # None when no run has `needs`
    needs: str = ""


@dataclass(frozen=True, slots=True)
class Figure:
    """A card of the page, or the reason why it cannot be shown (`missing`)."""

    title: str
    why: str
    traces: list[Trace] = field(default_factory=list)
    layout: dict[str, Any] = field(default_factory=dict)
    keys: tuple[tuple[str, str], ...] = ()  # (dash, meaning) when lines differ by more than the run
    table: list[list[str]] = field(default_factory=list)  # first row: header
    notes: tuple[str, ...] = ()
    missing: str = ""


def smooth(values: Sequence[float]) -> list[float]:
    """Return the centred moving average over about a twelfth of the run (at most 21 points), narrower at the ends."""
    half = min(10, len(values) // 24)
    windows = ((max(0, i - half), i + half + 1) for i in range(len(values)))
    return [sum(part) / len(part) for part in (values[start:stop] for start, stop in windows)]


def build(plot: Plot, runs: Sequence[LoggedRun]) -> Figure:
    """Return the figure of a plot. Runs that lack a metric are noted; when all lack it the figure is only that note."""
    if plot.draw is None:
        return _thinned(_line_figure(plot, runs))
    built = plot.draw(runs)
    if built is None:
        return Figure(plot.title, plot.why, missing=f"no run has {plot.needs}")
    traces, layout, table = built
    return _thinned(Figure(plot.title, plot.why, traces, layout, table=table))


def _thinned(figure: Figure) -> Figure:
    """Return the figure with at most about MAX_POINTS points a trace, and a note on what is left of longer ones.

    A line keeps the lowest and the highest value of each of MAX_POINTS / 2 equal stretches, so that no peak is lost;
    single points are drawn one in so many, evenly.
    """
    notes: list[str] = []
    traces = []
    for trace in figure.traces:
        count = len(trace["x"])
        if count <= MAX_POINTS:
            traces.append(trace)
            continue
        if "lines" in trace["mode"]:
            edges = [count * i // (MAX_POINTS // 2) for i in range(MAX_POINTS // 2 + 1)]
            ys = trace["y"]
            stretches = [range(start, stop) for start, stop in zip(edges, edges[1:], strict=False)]
            places = sorted({pick(part, key=ys.__getitem__) for part in stretches for pick in (min, max)})
            notes.append(f"of {count:,} steps each stretch of {count * 2 // MAX_POINTS} is drawn by its extremes")
        else:
            every = -(-count // MAX_POINTS)
            places = list(range(0, count, every))
            notes.append(f"one of {every} of {count:,} points is drawn; fits use them all")
        traces.append(trace | {axis: [trace[axis][place] for place in places] for axis in ("x", "y")})
    return replace(figure, traces=traces, notes=(*figure.notes, *dict.fromkeys(notes)))


def colour(index: int) -> str:
    """Return the colour of the run at that place in the report."""
    return RUN_COLOURS[index % len(RUN_COLOURS)]


def _line_figure(plot: Plot, runs: Sequence[LoggedRun]) -> Figure:
    present = {name: meaning for name, meaning in plot.metrics.items() if any(run.series(name)[0] for run in runs)}
    if not present:
        return Figure(plot.title, plot.why, missing=f"no run logged {', '.join(plot.metrics)}")
    absent = [(name, run.label) for run in runs for name in plot.metrics if not run.series(name)[0]]
    notes = tuple(f"{name} was not logged by {label}" for name, label in absent)
    dashes = dict(zip(present, itertools.cycle(DASHES), strict=False))
    traces: list[Trace] = []
    for name, meaning in present.items():
        for index, run in enumerate(runs):
            steps, values = run.series(name)
            if not steps:
                continue
            label = run.label if len(present) == 1 else f"{run.label}, {meaning}"
            line = {"color": colour(index), "dash": dashes[name], "width": 2}
            base = {"type": "scatter", "x": steps, "meta": index, "name": label, "hovertemplate": "%{y:.4g}"}
            if plot.sparse or len(values) < 24:
                traces.append({**base, "y": values, "mode": "lines+markers", "line": line, "marker": {"size": 5}})
                continue
            thin = {**line, "width": 1, "dash": "solid"}
            faint = {"opacity": 0.22, "hoverinfo": "skip", "hovertemplate": None, "line": thin}
            traces.append({**base, "y": values, "mode": "lines", **faint})
            traces.append({**base, "y": smooth(values), "mode": "lines", "line": line})
    layout = {**_axes("step", plot.unit), "hovermode": "x unified"}
    lowest, highest = (pick(pick(trace["y"]) for trace in traces) for pick in (min, max))
    if 0 < highest and highest - lowest <= 1e-9 * highest:  # averages differ in the last bits
        layout["yaxis"]["range"] = [0, 2 * highest]  # Plotly would show value - 1 to value + 1
    if plot.log:
        layout["yaxis"].update(type="log", dtick="D2")
    keys = tuple((dashes[name], meaning) for name, meaning in present.items()) if len(present) > 1 else ()
    return Figure(plot.title, plot.why, traces, layout, keys, notes=notes)


def change_against_realised(metric: str, runs: Sequence[LoggedRun]) -> Built:
    """Draw a prediction of the entropy's change against the realised one, a point a step, with a line through them."""
    traces: list[Trace] = []
    table = [["run", "slope", "correlation", "steps"]]
    for index, run in enumerate(runs):
        xs, ys = run.pairs(metric, "entropy/realised_change")
        if not xs:
            continue
        fit = fit_line(xs, ys)
        traces.append(_points(index, run, xs, ys))
        if fit.problem:
            table.append([run.label, f"no fit: {fit.problem}", "", str(fit.num_points)])
            continue
        ends = [min(xs), max(xs)]
        traces.append(_curve(index, ends, [fit.slope * x + fit.intercept for x in ends]))
        correlation = "–" if math.isnan(fit.correlation) else f"{fit.correlation:.3f}"
        table.append([run.label, f"{fit.slope:.3g}", correlation, str(fit.num_points)])
    if not traces:
        return None
    titles = ("predicted change of entropy, nats", "realised change, nats")
    return traces, _axes(*titles, zeroline=True), table


def control(runs: Sequence[LoggedRun]) -> Built:
    """Draw the loss's options that moved over the steps (right), with the entropy and what it was to keep to (left)."""
    traces: list[Trace] = []
    for index, run in enumerate(runs):
        names = sorted(name for name in run.columns if name.startswith("control/"))
        if not names:
            continue
        loss = run.config.get("loss") or {}
        band, adaptive = loss.get("entropy_band") or {}, loss.get("adaptive_entropy") or {}
        targets = {"band": band.get("low"), "band's upper end": band.get("high")}
        targets["target entropy"] = adaptive.get("target_entropy")
        lines = [("entropy", *run.series("entropy/mean"), "solid", "y")]
        ends = [int(run.steps[0]), int(run.steps[-1])]
        lines += [(name, ends, [level, level], "dot", "y") for name, level in targets.items() if level is not None]
        dashes = itertools.cycle(DASHES[1:2] + DASHES[3:])
        lines += [(name.removeprefix("control/"), *run.series(name), next(dashes), "y2") for name in names]
        for name, steps, values, dash, axis in lines:
            line = {"color": colour(index), "width": 2, "dash": dash}
            base = {"type": "scatter", "mode": "lines", "meta": index, "name": f"{run.label}, {name}", "line": line}
            traces.append({**base, "x": steps, "y": values, "yaxis": axis, "hovertemplate": "%{y:.4g}"})
    right = {"title": {"text": "value of the option"}, "overlaying": "y", "side": "right", "showgrid": False}
    layout = {**_axes("step", "entropy, nats"), "yaxis2": right, "hovermode": "x unified", "margin": {"r": 60}}
    return (traces, layout, []) if traces else None


def law(runs: Sequence[LoggedRun]) -> Built:
    """Draw reward over entropy, a point a step, with the law that is fitted to them."""
    traces: list[Trace] = []
    table = [["run", "a", "b", "ceiling b − a", "R²"]]
    for index, run in enumerate(runs):
        fit = fit_law(*run.pairs("entropy/mean", run.reward_metric()))
        if not fit.entropy:
            continue
        name = run.label if run.reward_metric() == "reward/accuracy" else f"{run.label}, mean reward"
        traces.append(_points(index, run, fit.entropy, fit.reward))
        if fit.a is None or fit.b is None:
            table.append([name, f"no fit: {fit.problem}", "", "", "", ""])
            continue
        low, high = min(fit.entropy), max(fit.entropy)
        grid = [low + (high - low) * i / 60 for i in range(61)]
        traces.append(_curve(index, grid, fit.at(grid)))
        r2 = "–" if fit.r2 is None else f"{fit.r2:.3f}"
        a, b = _with_interval(fit.a, fit.a_interval), _with_interval(fit.b, fit.b_interval)
        ceiling = _with_interval(fit.b - fit.a, fit.ceiling_interval)
        table.append([name, a, b, ceiling, r2])
    return (traces, _axes("entropy H, nats", "reward R"), table) if traces else None


def law_residuals(runs: Sequence[LoggedRun]) -> Built:
    """Draw what the fitted law leaves of the reward, over entropy."""
    traces: list[Trace] = []
    table = [["run", "σ", "alarm"]]
    for index, run in enumerate(runs):
        fit = fit_law(*run.pairs("entropy/mean", run.reward_metric()))
        if fit.residual_std is None:
            continue
        traces.append(_points(index, run, fit.entropy, fit.residuals))
        alarms = run.series("law/alarm")[1]
        raised = f"on {round(sum(alarms))} of {len(alarms)} steps" if alarms else "not logged"
        table.append([run.label, f"{fit.residual_std:.3g}", raised])
    return (traces, _axes("entropy H, nats", "R − fit", zeroline=True), table) if traces else None


def phase_times(runs: Sequence[LoggedRun]) -> Built:
    """Draw the mean seconds a step: a phase that runs on few steps (evaluation) is spread over all of them."""
    logged = {name.removeprefix("time/") for run in runs for name in run.columns if name.startswith("time/")}
    phases = [*(p for p in PHASES if p in logged), *sorted(logged - {*PHASES, "total"})]
    if not logged:
        return None
    means = [{p: sum(run.series(f"time/{p}")[1]) / len(run.steps) for p in [*phases, "total"]} for run in runs]
    if "total" in logged:
        for mean in means:
            mean["other"] = max(0.0, mean["total"] - sum(mean[p] for p in phases))
        phases.append("other")
    labels = [run.label for run in runs]
    traces = []
    for place, phase in enumerate(phases):
        fill = "#8b8f98" if phase == "other" else PHASE_COLOURS[place % len(PHASE_COLOURS)]
        seconds = [mean[phase] for mean in means]
        hover = "%{x:.3g} s<extra>" + phase.replace("_", " ") + "</extra>"
        bar = {"type": "bar", "orientation": "h", "name": phase.replace("_", " "), "x": seconds, "y": labels}
        traces.append({**bar, "marker": {"color": fill}, "hovertemplate": hover, "showlegend": True})
    layout = _axes("seconds a step, mean", "")
    layout.update(barmode="stack", showlegend=True, legend={"orientation": "h", "y": -0.25, "traceorder": "normal"})
    layout["yaxis"].update(autorange="reversed")
    return traces, layout, []


def _points(index: int, run: LoggedRun, xs: Sequence[float], ys: Sequence[float]) -> Trace:
    marker = {"size": 6, "opacity": 0.45, "color": colour(index)}
    hover = "%{x:.4g}, %{y:.4g}"
    base = {"type": "scatter", "mode": "markers", "meta": index, "name": run.label, "marker": marker}
    return {**base, "x": list(xs), "y": list(ys), "hovertemplate": hover}


def _curve(index: int, xs: Sequence[float], ys: Sequence[float]) -> Trace:
    line = {"color": colour(index), "width": 2}
    base = {"type": "scatter", "mode": "lines", "meta": index}
    return {**base, "x": list(xs), "y": list(ys), "line": line, "hoverinfo": "skip"}


def _axes(x: str, y: str, *, zeroline: bool = False) -> dict[str, Any]:
    return {
        "xaxis": {"title": {"text": x}},
        "yaxis": {"title": {"text": y}, "zeroline": zeroline},
        "hovermode": "closest",
    }


def _with_interval(value: float, interval: tuple[float, float] | None) -> str:
    return f"{value:.3g}" if interval is None else f"{value:.3g}\n[{interval[0]:.3g}, {interval[1]:.3g}]"
