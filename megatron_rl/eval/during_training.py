"""Evaluation in the course of training, with the weights of the moment."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_rl.config import Config
from megatron_rl.convert.disk import clear
from megatron_rl.eval.benchmarks import Benchmark
from megatron_rl.eval.evaluator import Evaluator, metrics_of
from megatron_rl.eval.table import write_tables


def evaluate_sets(
    evaluator: Evaluator, benchmarks: Sequence[Benchmark], config: Config, num_steps: int, stopped: Callable[[], bool]
) -> dict[str, float]:
    """Evaluate all sets after `num_steps` steps; return their metrics, the same on every rank. Samples and tables go to
    run_dir/eval/step_N.

    A collective of the evaluator's ranks, which get the same from `stopped`. Once that is true, the sets that are left
    are not begun, and nothing is logged of those that are done: a mean over fewer sets would pass for a drop.
    Raises: as `Evaluator.run`.
    """
    folder = config.run_dir / "eval" / f"step_{num_steps:06d}"
    if evaluator.is_first:
        clear(folder)  # of an earlier process, which may have had other weights
    results = []
    for bench in benchmarks:
        if stopped():
            return {}
        results.append(evaluator.run(bench, folder / "sets" / bench.name, {"run": config.name, "num_steps": num_steps}))
    if results and evaluator.is_first:
        write_tables(folder, f"{config.name}, step {num_steps}", results, confidence=config.eval.confidence)
    return metrics_of(results)
