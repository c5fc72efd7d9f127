"""Figures of the ledger: who spent the entropy."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from megatron_rl.report.figures import Built, colour
from megatron_rl.report.runs import LoggedRun

Spending = dict[str, float]


def by_token(row: dict[str, Any], spent: int) -> Spending:
    """Return the spending of the token strings that a row names. `spent`: the place of its column."""
    return {repr(text)[1:-1]: values[spent] for text, _, *values in row["tokens"]}


def by_position(row: dict[str, Any], spent: int) -> Spending:
    """Return the spending of the stretches of the response."""
    return {
        f"{first}–{last}" if last > first else str(first): values[spent] for first, last, *values in row["positions"]
    }


def by_kind(row: dict[str, Any], column: int) -> Spending:
    """Return a column of the kinds of tokens; nothing for a row that was written before there were any."""
    return {kind: values[column] for kind, *values in row.get("kinds", [])}


def by_quarter(row: dict[str, Any], column: int) -> Spending:
    """Return a column of the quarters of the response; nothing for a row that was written before there were any."""
    return {f"{25 * quarter}–{25 * quarter + 25}%": values[column] for quarter, *values in row.get("quarters", [])}


def by_covariance(row: dict[str, Any], spent: int) -> Spending:
    """Return the spending between the quantiles of covariance."""
    edges = [0.0, *row["quantiles"], 1.0]
    names = [f"{100 * a:g}–{100 * b:g}%" for a, b in zip(edges, edges[1:], strict=False)]
    return {name: values[spent] for name, (_, *values) in zip(names, row["covariance"], strict=True)}


def spending(
    axis: str, groups: Callable[[dict[str, Any], int], Spending], top: int, runs: Sequence[LoggedRun]
) -> Built:
    """Draw what each group spent of the entropy, a bar a run. `top`: only so many groups, the largest; 0: all."""
    spent = [_shares(run, groups) for run in runs]
    names = list(dict.fromkeys(name for shares in spent for name in shares))
    if top:
        names = sorted(names, key=lambda name: -max(abs(shares.get(name, 0.0)) for shares in spent))[:top]
    return _bars(names, axis, "share of all spending", spent, runs)


def mean_covariance(axis: str, groups: Callable[[dict[str, Any], int], Spending], runs: Sequence[LoggedRun]) -> Built:
    """Draw the mean covariance of each group's tokens over all logged steps, a bar a run."""
    means = []
    for run in runs:
        sums, counts = Counter[str](), Counter[str]()
        for row in run.ledger():
            columns = row["columns"]
            if "covariance" in columns:
                sums.update(groups(row, columns.index("covariance")))
                counts.update(groups(row, columns.index("count")))
        means.append({name: total / counts[name] for name, total in sorted(sums.items())})
    names = sorted({name for of_run in means for name in of_run})
    return _bars(names, axis, "mean covariance, nats × advantage", means, runs)


def _bars(names: list[str], axis: str, unit: str, values: Sequence[Spending], runs: Sequence[LoggedRun]) -> Built:
    traces = [
        {"type": "bar", "meta": i, "name": run.label, "x": names, "y": [of_run.get(name, 0.0) for name in names]}
        | {"marker": {"color": colour(i)}, "hovertemplate": "%{y:.3g}"}
        for i, (run, of_run) in enumerate(zip(runs, values, strict=True))
        if of_run
    ]
    x = {"title": {"text": axis}, "type": "category"}
    y = {"title": {"text": unit}, "zeroline": True}
    layout = {"xaxis": x, "yaxis": y, "barmode": "group", "hovermode": "x unified"}
    return (traces, layout, []) if traces else None


def _shares(run: LoggedRun, groups: Callable[[dict[str, Any], int], Spending]) -> Spending:
    """Return {group: its first-order spending over all logged steps, as a share of the covariance groups'
    magnitudes}."""
    sums: Spending = {}
    scale = 0.0
    for row in run.ledger():
        spent = row["columns"].index("spent")
        scale += sum(abs(value) for value in by_covariance(row, spent).values())
        for name, value in groups(row, spent).items():
            sums[name] = sums.get(name, 0.0) + value
    return {name: value / scale for name, value in sums.items()} if scale else {}
