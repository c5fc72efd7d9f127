"""Figures of accuracy by benchmark: in the course of training, and of the evaluations in the runs' folders."""

from collections.abc import Sequence
from typing import Any

from megatron_rl.config.benchmarks import PRESETS
from megatron_rl.report.figures import Built, Plot, Trace, colour
from megatron_rl.report.runs import Evaluation, LoggedRun

_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")


def benchmarks(runs: Sequence[LoggedRun]) -> list[Plot]:
    """Return a figure for each evaluation set that a run logged as eval/SET/accuracy, and one with all side by side."""
    return [*(_course(name) for name in _logged(runs)), BY_BENCHMARK]


def _logged(runs: Sequence[LoggedRun]) -> list[str]:
    parts = {tuple(name.split("/")) for run in runs for name in run.columns}
    return sorted("/".join(part) for part in parts if len(part) == 3 and part[0] == "eval" and part[2] == "accuracy")


def _course(metric: str) -> Plot:
    def built(runs: Sequence[LoggedRun]) -> Built:
        traces: list[Trace] = []
        for index, run in enumerate(runs):
            steps, values = run.series(metric)
            if not steps:
                continue
            low, high = (dict(zip(*run.series(f"{metric}_{end}"), strict=True)) for end in ("low", "high"))
            ends = [(low.get(step, value), high.get(step, value)) for step, value in zip(steps, values, strict=True)]
            line = {"color": colour(index), "width": 2}
            style = {"mode": "lines+markers", "meta": index, "name": run.label, "line": line}
            traces.append(_with_bars(steps, values, ends) | style)
        axes = {"xaxis": {"title": {"text": "step"}}, "yaxis": {"title": {"text": "fraction"}}}
        return traces, {**axes, "hovermode": "x unified"}, []

    why = "Held-out accuracy with its interval: runs whose bars overlap are not told apart by this set."
    return Plot(f"Accuracy on {_title(metric.split('/')[1])}", why, draw=built, needs=metric)


def _side_by_side(runs: Sequence[LoggedRun]) -> Built:
    evaluations = [
        (i, evaluation) for i, run in enumerate(runs) for evaluation in (*_last_logged(run), *run.evaluations)
    ]
    if not evaluations:
        return None
    several = len(runs) > 1
    titles = list(dict.fromkeys(title for _, evaluation in evaluations for title in evaluation.accuracy))
    traces: list[Trace] = []
    rows = [["evaluation", *titles]]
    for number, (index, evaluation) in enumerate(evaluations):
        name = f"{runs[index].label}: {evaluation.name}" if several else evaluation.name
        here = [title for title in titles if title in evaluation.accuracy]
        values = [evaluation.accuracy[title][0] for title in here]
        ends = [evaluation.accuracy[title][1:] for title in here]
        marker = {"color": colour(index), "size": 9, "symbol": _SYMBOLS[number % len(_SYMBOLS)]}
        style = {"mode": "markers", "meta": index, "name": name, "marker": marker}
        traces.append(_with_bars(here, values, ends) | style)
        rows.append([name, *(_cell(evaluation, title) for title in titles)])
    layout = {
        "xaxis": {"title": {"text": "benchmark"}, "type": "category"},
        "yaxis": {"title": {"text": "fraction"}, "rangemode": "tozero"},
        "hovermode": "x unified",
        "scattermode": "group",
    }
    return traces, layout, rows


BY_BENCHMARK = Plot(
    "Accuracy by benchmark",
    "The last evaluation in training, and those that megatron-rl eval left in the run's folder, with their intervals: "
    "what overlaps is not told apart.",
    draw=_side_by_side,
    needs="an evaluation (eval.sets in training, or megatron-rl eval)",
)


def _last_logged(run: LoggedRun) -> list[Evaluation]:
    """Return the newest evaluation in training, all its sets together, in a list; an empty one without any."""
    metrics = _logged([run])
    if not metrics:
        return []
    step = max(run.series(metric)[0][-1] for metric in metrics)
    accuracy = {}
    for metric in metrics:
        at_step = [dict(zip(*run.series(metric + end), strict=True)).get(step) for end in ("", "_low", "_high")]
        value, low, high = at_step
        if value is not None:
            known = (value, value if low is None else low, value if high is None else high)
            accuracy[_title(metric.split("/")[1])] = known
    return [Evaluation(f"in training, step {step}", accuracy)]


def _with_bars(xs: Sequence[Any], values: Sequence[float], ends: Sequence[tuple[float, float]]) -> Trace:
    """Return points with bars from the lower to the upper of their ends."""
    up = [high - value for value, (_, high) in zip(values, ends, strict=True)]
    down = [value - low for value, (low, _) in zip(values, ends, strict=True)]
    bars = {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1, "width": 3}
    return {"type": "scatter", "x": xs, "y": values, "error_y": bars, "hovertemplate": "%{y:.4g}"}


def _cell(evaluation: Evaluation, title: str) -> str:
    estimate = evaluation.accuracy.get(title)
    return "–" if estimate is None else "{:.3f} [{:.3f}, {:.3f}]".format(*estimate)


def _title(name: str) -> str:
    return PRESETS[name].title if name in PRESETS else name
