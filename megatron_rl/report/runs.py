"""Read run folders: config.yaml and metrics.jsonl; where present ledger.jsonl, samples.jsonl, shadow/*.json and
eval/*/table.json."""

import itertools
import json
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from megatron_rl.errors import UserError
from megatron_rl.metrics.entropy_law import fit_law
from megatron_rl.metrics.jsonl import iter_rows, parse_row

ENDS = 10  # steps averaged at the start and the end of a run
MAX_STEPS = 12  # whose samples are shown, spread over the run
MAX_SAMPLES = 8  # of each such step


class NotYet(UserError):
    """A run has no complete step so far."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """An evaluation of one model on several sets."""

    name: str
    accuracy: dict[str, tuple[float, float, float]]  # by the set's title: value and ends of its interval, fractions


@dataclass(frozen=True, slots=True)
class LoggedRun:
    """A run as its folder tells it."""

    path: Path
    name: str
    loss: str  # the config's loss.type; "unknown" without a config
    label: str  # unique in the report
    config_text: str
    steps: NDArray[np.int64]  # [S], ascending
    columns: dict[str, NDArray[np.float64]]  # by metric, [S]; NaN where it was not logged or is not finite
    notes: tuple[str, ...]
    config: dict[str, Any] = field(default_factory=dict)
    samples: tuple[dict[str, Any], ...] = ()  # rows of samples.jsonl, of few steps spread over the run
    shadow: dict[str, Any] = field(default_factory=dict)  # the newest replay of shadow/
    evaluations: tuple[Evaluation, ...] = ()  # by `megatron-rl eval`, oldest first; those in training are metrics

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Return steps and values of a metric where it was logged and finite; two empty lists when it never was."""
        if name not in self.columns:
            return [], []
        there = ~np.isnan(self.columns[name])
        return self.steps[there].tolist(), self.columns[name][there].tolist()

    def ledger(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of ledger.jsonl, read anew, but for those with a spending that is not finite."""
        path = self.path / "ledger.jsonl"
        if path.is_file():
            yield from (row for _, row in iter_rows(path, []) if None not in _spendings(row))

    def pairs(self, first: str, second: str) -> tuple[list[float], list[float]]:
        """Return the values of two metrics at the steps that have both."""
        xs, ys = dict(zip(*self.series(first), strict=True)), dict(zip(*self.series(second), strict=True))
        both = [step for step in xs if step in ys]
        return [xs[step] for step in both], [ys[step] for step in both]

    def reward_metric(self) -> str:
        """Return the metric that is R in the law: accuracy where it is logged, else the mean reward (penalties too)."""
        return "reward/accuracy" if self.series("reward/accuracy")[0] else "reward/mean"


def load_runs(run_dirs: Sequence[Path]) -> list[LoggedRun]:
    """Read every folder, in the order given. Raises: UserError when one is not a run, NotYet when it may become one."""
    if not run_dirs:
        raise UserError("no run folders were given; name at least one folder that `megatron-rl train` wrote")
    runs = [_load_run(Path(path)) for path in run_dirs]
    labels = [run.label for run in runs]
    return [run if labels.count(run.label) == 1 else replace(run, label=f"{run.label} {run.path}") for run in runs]


def summarise(run_dirs: Sequence[Path]) -> list[dict[str, Any]]:
    """Return one row per run; a number is None where its metric is missing.

    `entropy_first`, `entropy_last` (nats), `accuracy_first`, `accuracy_last` (fraction): means over the first and last
    10 steps; `eval_first`, `eval_last`: single evaluations; `wall_seconds`, `tokens_per_second`; `law_a`, `law_b`,
    `law_r2`; also `run`, `loss`, `label`, `steps`.

    Raises: UserError as `load_runs`.
    """
    return [summary_of(run) for run in load_runs(run_dirs)]


def summary_of(run: LoggedRun) -> dict[str, Any]:
    """Return the row of `summarise` for a loaded run."""
    entropy, accuracy = run.series("entropy/mean")[1], run.series("reward/accuracy")[1]
    evaluations, seconds = run.series("eval/accuracy")[1], run.series("time/total")[1]
    law = fit_law(*run.pairs("entropy/mean", run.reward_metric()))
    return {
        "run": run.name,
        "loss": run.loss,
        "label": run.label,
        "steps": len(run.steps),
        "entropy_first": _mean(entropy[:ENDS]),
        "entropy_last": _mean(entropy[-ENDS:]),
        "accuracy_first": _mean(accuracy[:ENDS]),
        "accuracy_last": _mean(accuracy[-ENDS:]),
        "eval_first": evaluations[0] if evaluations else None,
        "eval_last": evaluations[-1] if evaluations else None,
        "wall_seconds": sum(seconds) if seconds else None,
        "tokens_per_second": _mean(run.series("throughput/tokens_per_second")[1]),
        "law_a": law.a,
        "law_b": law.b,
        "law_r2": law.r2,
    }


def _load_run(path: Path) -> LoggedRun:
    metrics = path / "metrics.jsonl"
    if not metrics.is_file():
        what = "no such folder" if not path.is_dir() else "no metrics.jsonl in it"
        raise NotYet(f"{path}: {what}; expected a run folder that `megatron-rl train` wrote (logging.run_dir)")
    notes: list[str] = []
    steps, columns = _read_metrics(metrics, notes)
    if not len(steps):
        raise NotYet(f"{metrics}: no complete line yet; wait for the run's first step to end")
    config_text, config = _load_config(path / "config.yaml", notes)
    name = str(config.get("name", path.name))
    loss = config.get("loss")
    kind = str(loss["type"]) if isinstance(loss, dict) and "type" in loss else "unknown"
    label = f"{name} ({kind})" if config else name
    samples = _some_samples(path / "samples.jsonl", notes)
    _check_ledger(path / "ledger.jsonl", notes)
    shadow = _newest_shadow(path / "shadow", notes)
    evaluations = _evaluations(path, notes)
    texts = (name, kind, label, config_text)
    return LoggedRun(path, *texts, steps, columns, tuple(notes), config, samples, shadow, evaluations)


def _read_metrics(path: Path, notes: list[str]) -> tuple[NDArray[np.int64], dict[str, NDArray[np.float64]]]:
    """Return the steps, ascending, and a column for each metric with a finite value: 8 bytes a number."""
    place_of: dict[int, int] = {}  # step -> place in the columns
    columns: dict[str, array[float]] = {}
    lost: set[str] = set()
    repeated = 0
    for _, row in iter_rows(path, notes, with_step=True):
        step, names = row.pop("step"), row.pop("non_finite", None)
        lost.update(map(str, names if isinstance(names, list) else ()))
        is_known = step in place_of
        place = place_of.setdefault(step, len(place_of))
        if is_known:
            repeated += 1
            for column in columns.values():
                column[place : place + 1] = array("d", [math.nan] * len(column[place : place + 1]))
        for name, value in row.items():
            number = _finite(value)
            if number is not None:
                column = columns.setdefault(name, array("d"))
                column.extend([math.nan] * (place - len(column) + 1))
                column[place] = number
            elif isinstance(value, int | float):
                lost.add(name)
    if repeated:
        notes.append(f"{path.name}: {repeated} steps occur twice; the later line counts")
    if lost:
        notes.append(f"non-finite values left out of: {', '.join(sorted(lost))}")
    for column in columns.values():
        column.extend([math.nan] * (len(place_of) - len(column)))
    steps = np.array(list(place_of), dtype=np.int64)
    order = np.argsort(steps)
    return steps[order], {name: np.array(column)[order] for name, column in columns.items()}


def _finite(value: Any) -> float | None:
    try:
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
    except OverflowError:  # an integer beyond every float
        return None


def _some_samples(path: Path, notes: list[str]) -> tuple[dict[str, Any], ...]:
    """Return the samples of up to MAX_STEPS steps spread over the run, MAX_SAMPLES of each at most."""
    if not path.is_file():
        return ()
    offsets: dict[int, int] = {}  # step -> where its rows begin; of a step that comes twice, where the later ones do
    offset, last = 0, None
    for line, row in iter_rows(path, notes, with_step=True):
        if row["step"] != last:
            last = row["step"]
            offsets[last] = offset
        offset += len(line)
    steps = sorted(offsets)
    chosen = {steps[round(i * (len(steps) - 1) / (MAX_STEPS - 1))] for i in range(MAX_STEPS)} if steps else set()
    samples: list[dict[str, Any]] = []
    with path.open("rb") as file:
        for step in sorted(chosen):
            file.seek(offsets[step])
            for line in itertools.islice(file, MAX_SAMPLES):
                sample = parse_row(line)
                if sample is None or sample["step"] != step:
                    break
                samples.append(sample)
    return tuple(samples)


def _spendings(row: dict[str, Any]) -> list[float | None]:
    """Return the first-order spending of each group of a row of the ledger. Raises: as a row of another file does."""
    spent = row["columns"].index("spent")
    edges = {"tokens": 2, "positions": 2, "covariance": 1}  # entries of a group before its columns
    return [group[skipped + spent] for name, skipped in edges.items() for group in row[name]]


def _check_ledger(path: Path, notes: list[str]) -> None:
    if not path.is_file():
        return
    unfinished = 0
    for line, row in iter_rows(path, notes, with_step=True):
        try:
            unfinished += None in _spendings(row)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise UserError(
                f"{path}: expected rows of who spent the entropy, got {line.decode(errors='replace')[:80]!r}; "
                "repair or remove the line"
            ) from None
    if unfinished:
        notes.append(f"{path.name}: {unfinished} steps with non-finite values are left out of its figures")


def _newest_shadow(folder: Path, notes: list[str]) -> dict[str, Any]:
    files = sorted(folder.glob("step_*.json"))
    if not files:
        return {}
    try:
        replay: dict[str, Any] = json.loads(files[-1].read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        notes.append(f"shadow/{files[-1].name} is not JSON and was skipped: {error}")
        return {}
    return replay


def evaluation_tables(run: Path) -> list[Path]:
    """Return the tables that `megatron-rl eval` wrote into a run's folder, oldest first; not the run's own step_N."""
    tables = [path for path in (run / "eval").glob("*/table.json") if not path.parent.name.startswith("step_")]
    return sorted(tables, key=lambda path: (path.stat().st_mtime, path))


def _evaluations(run: Path, notes: list[str]) -> tuple[Evaluation, ...]:
    evaluations = []
    for path in evaluation_tables(run):
        try:
            sets = json.loads(path.read_text(encoding="utf-8"))["sets"].values()
            triples = {one["title"]: one["estimates"][f"avg@{one['samples']}"] for one in sets}
            accuracy = {title: (at["value"], at["low"], at["high"]) for title, at in triples.items()}
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            notes.append(f"eval/{path.parent.name}/table.json is no table of an evaluation and was skipped: {error!r}")
            continue
        evaluations.append(Evaluation(path.parent.name, accuracy))
    return tuple(evaluations)


def _load_config(path: Path, notes: list[str]) -> tuple[str, dict[str, Any]]:
    if not path.is_file():
        notes.append("no config.yaml: the run is named after its folder and its loss is unknown")
        return "", {}
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        config = None
    if not isinstance(config, dict):
        notes.append("config.yaml is not a YAML mapping: the run is named after its folder and its loss is unknown")
        return text, {}
    return text, config


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
