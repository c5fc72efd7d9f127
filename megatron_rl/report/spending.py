"""Figures of the ledger: who spent the entropy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_rl.report.figures import Built, CustomPlot, colour
from megatron_rl.report.runs import LoggedRun

TOP_TOKENS = 12
Spending = dict[str, float]


def _by_token(row: dict[str, Any], spent: int) -> Spending:
    return {repr(text)[1:-1]: values[spent] for text, _, *values in row["tokens"]}


def _by_position(row: dict[str, Any], spent: int) -> Spending:
    return {
        f"{first}–{last}" if last > first else str(first): values[spent] for first, last, *values in row["positions"]
    }


def _by_covariance(row: dict[str, Any], spent: int) -> Spending:
    edges = [0.0, *row["quantiles"], 1.0]
    names = [f"{100 * a:g}–{100 * b:g}%" for a, b in zip(edges, edges[1:], strict=False)]
    return {name: values[spent] for name, (_, *values) in zip(names, row["covariance"], strict=True)}


def _ledger(
    title: str, why: str, axis: str, groups: Callable[[dict[str, Any], int], Spending], top: int = 0
) -> CustomPlot:
    def built(runs: Sequence[LoggedRun]) -> Built:
        spent = [_shares(run, groups) for run in runs]
        if not any(spent):
            return None
        names = list(dict.fromkeys(name for shares in spent for name in shares))
        if top:
            names = sorted(names, key=lambda name: -max(abs(shares.get(name, 0.0)) for shares in spent))[:top]
        traces = [
            {"type": "bar", "meta": i, "name": run.label, "x": names, "y": [shares.get(name, 0.0) for name in names]}
            | {"marker": {"color": colour(i)}, "hovertemplate": "%{y:.3f}"}
            for i, (run, shares) in enumerate(zip(runs, spent, strict=True))
            if shares
        ]
        x = {"title": {"text": axis}, "type": "category"}
        y = {"title": {"text": "share of all spending"}, "zeroline": True}
        return traces, {"xaxis": x, "yaxis": y, "barmode": "group", "hovermode": "x unified"}, []

    return CustomPlot(title, why, "a ledger.jsonl (logging.ledger_every)", built)


def _shares(run: LoggedRun, groups: Callable[[dict[str, Any], int], Spending]) -> Spending:
    """Return {group: its first-order spending over all logged steps, as a share of the covariance groups'
    magnitudes}."""
    sums: Spending = {}
    scale = 0.0
    for row in run.ledger():
        spent = row["columns"].index("spent")
        scale += sum(abs(value) for value in _by_covariance(row, spent).values())
        for name, value in groups(row, spent).items():
            sums[name] = sums.get(name, 0.0) + value
    return {name: value / scale for name, value in sums.items()} if scale else {}


LEDGER = [
    _ledger(
        "Who spent the entropy: covariance",
        "By quantile of covariance, to first order; negative groups gave entropy back. A tall bar over the last "
        "percent is what Clip-Cov and KL-Cov are built on.",
        "quantiles of covariance",
        _by_covariance,
    ),
    _ledger(
        "Who spent the entropy: position",
        "By place in the response: tells whether the opening or the working is being fixed.",
        "token of the response",
        _by_position,
    ),
    _ledger(
        "Who spent the entropy: tokens",
        f"The {TOP_TOKENS} token strings that spent or gave back most, among those that the ledger names.",
        "token",
        _by_token,
        TOP_TOKENS,
    ),
]
