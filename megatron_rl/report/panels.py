"""The report's parts that are text: configurations compared, shadow results, samples."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_rl.metrics.jsonl import without_non_finite
from megatron_rl.report.runs import LoggedRun


def config_differences(runs: Sequence[LoggedRun]) -> list[list[str]]:
    """Return a header and a row for each option that differs between the runs; nothing for one run."""
    known = [run for run in runs if run.config]
    if len(known) < 2:
        return []
    flat = [dict(_flatten(run.config)) for run in known]
    names = sorted({name for options in flat for name in options})
    rows = [[name, *(options.get(name, "–") for options in flat)] for name in names]
    return [["option", *(run.label for run in known)], *(row for row in rows if len(set(row[1:])) > 1)]


def _flatten(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    leaves: list[tuple[str, str]] = []
    for name, item in value.items():
        whole = isinstance(item, dict) and item
        leaves += _flatten(item, f"{prefix}{name}.") if whole else [(prefix + str(name), str(item))]
    return leaves


def replay_tables(runs: Sequence[LoggedRun]) -> list[dict[str, Any]]:
    """Return `title` and the tables `methods` and `overlap` of each mini-batch in the runs' newest shadow results."""
    tables = []
    batches = [(run, batch) for run in runs if run.shadow for batch in run.shadow["minibatches"]]
    for run, mini_batch in batches:
        names, index = list(run.shadow["losses"]), mini_batch["minibatch"]
        policy = f"after {index} of the step's updates" if index else "on-policy"
        cells = [["method", "restrained", "dH, logits", "dH, step", "gradient norm", f"cosine with {names[0]}"]]
        for i, name in enumerate(names):
            row = mini_batch["methods"][name]
            numbers = [row["restrained"], row["predicted_change"], row["entropy_slope"], row["grad_norm"]]
            cells.append([name, *map(_number, [*numbers, mini_batch["cosine"][i][0]])])
        picky = [i for i, name in enumerate(names) if mini_batch["methods"][name]["restrained"]]
        overlap = [[names[i], *(_number(mini_batch["overlap"][i][j]) for j in picky)] for i in picky]
        title = f"{run.label}: step {run.shadow['step']}, {mini_batch['tokens']} tokens, {policy}"
        header = ["overlap", *(names[i] for i in picky)]
        tables.append({"title": title, "methods": cells, "overlap": [header, *overlap]})
    return tables


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def samples_of(runs: Sequence[LoggedRun]) -> list[dict[str, Any]]:
    """Return the samples of each run that has some, for report.js, which shows them as text, never as markup."""
    return [{"label": run.label, "samples": without_non_finite(list(run.samples))} for run in runs if run.samples]
