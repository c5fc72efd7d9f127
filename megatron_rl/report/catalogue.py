"""The figures of the report, in order: those of assets/figures.yaml, and those that depend on what the runs logged."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from megatron_rl.files import read_asset
from megatron_rl.report import figures, spending
from megatron_rl.report.benchmarks import benchmarks
from megatron_rl.report.figures import Built, Plot
from megatron_rl.report.runs import LoggedRun

# `draw` of figures.yaml -> what draws it
DRAWINGS: dict[str, Callable[[Sequence[LoggedRun]], Built]] = {
    "predicted_change": partial(figures.change_against_realised, "entropy/predicted_change"),
    "first_order_change": partial(figures.change_against_realised, "entropy/first_order_change"),
    "tangent_change": partial(figures.change_against_realised, "entropy/tangent_change"),
    "control": figures.control,
    "law": figures.law,
    "law_residuals": figures.law_residuals,
    "ledger_covariance": partial(spending.spending, "quantiles of covariance", spending.by_covariance, 0),
    "ledger_position": partial(spending.spending, "token of the response", spending.by_position, 0),
    "ledger_tokens": partial(spending.spending, "token", spending.by_token, 12),
    "ledger_quarter": partial(spending.spending, "part of the response", spending.by_quarter, 0),
    "ledger_kind": partial(spending.spending, "kind of token", spending.by_kind, 0),
    "covariance_quarter": partial(spending.mean_covariance, "part of the response", spending.by_quarter),
    "covariance_kind": partial(spending.mean_covariance, "kind of token", spending.by_kind),
    "phase_times": figures.phase_times,
}


def sections(runs: Sequence[LoggedRun]) -> list[tuple[str, list[Plot]]]:
    """Return (title, plots) of each section of the report."""
    plots = {title: list(map(_plot, stated)) for title, stated in read_asset(__file__, "figures.yaml").items()}
    plots["Performance"] += benchmarks(runs)
    plots["Updates"] = [*_of_losses(runs), *plots["Updates"]]
    return list(plots.items())


def _plot(stated: dict[str, Any]) -> Plot:
    return Plot(**stated | {"draw": DRAWINGS[stated["draw"]] if "draw" in stated else None})


def _of_losses(runs: Sequence[LoggedRun]) -> list[Plot]:
    """Return the plots of the losses' own metrics (`loss/*`)."""
    logged = sorted({name for run in runs for name in run.columns if name.startswith("loss/")})
    names = {name: name.removeprefix("loss/").replace("_", " ") for name in logged}
    clips = {name: meaning for name, meaning in names.items() if "clip" in name}
    clipping = (
        "Share of tokens whose ratio left the clip range: clipping that cuts mostly likely tokens' gains slows the "
        "collapse, clipping that cuts exploration speeds it up."
    )
    plots = [Plot("Clip fractions", clipping, clips or {"loss/clip_fraction": "clip fraction"}, "fraction")]
    why = "A term or statistic that the loss reports, averaged over the step's response tokens."
    return plots + [Plot(f"Loss: {names[name]}", why, {name: names[name]}, name) for name in names if name not in clips]
