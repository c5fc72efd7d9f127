"""`megatron-rl eval` on one rank: the model of `model.path` in the config's engine, without a trainer.

The weights go from the folder, of either format, to the engine as training sends them. Ranks are those of the config's
layout: with the embedded engine each holds the whole model and generates its share, servers are shared by all.
"""

import contextlib
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from megatron_rl import launch
from megatron_rl.config import Config
from megatron_rl.convert.weights import Weights, open_weights
from megatron_rl.data.tokenizer import build_tokenizer
from megatron_rl.eval.benchmarks import Benchmark, load_benchmarks
from megatron_rl.eval.browse import write_pages
from megatron_rl.eval.evaluator import Evaluator, SetResult
from megatron_rl.eval.store import EvalError, model_name
from megatron_rl.eval.table import write_tables
from megatron_rl.parallel.groups import destroy_groups
from megatron_rl.reward.shape import build_grader, say_text_only
from megatron_rl.rollout.engine import Place, RolloutEngine
from megatron_rl.rollout.served import Served
from megatron_rl.rollout.world import join

_REPORT_SECONDS = 30.0  # between two lines about the progress


def main(config: Config) -> None:
    """Evaluate on the world that torchrun's environment describes; rank 0 prints the table."""
    groups = join(config)
    world = groups.all_ranks
    place = Place(groups.rank, groups.world_size, launch.local_rank(), world.gather_objects)
    results = evaluate_model(config, place)
    if place.rank == 0:
        print(f"{write_results(config, results)}\n{config.run_dir / 'index.html'}", flush=True)
    groups.all_ranks.barrier()
    destroy_groups()


def evaluate_model(config: Config, place: Place) -> list[SetResult]:
    """All sets of the config, with their samples in its run folder. The same on every rank.

    Raises: UserError for what the user can mend; the samples so far are kept.
    """
    grader = build_grader(config.reward.model_copy(update={"terms": ()}))  # before anything slow
    with contextlib.ExitStack() as stack:
        stack.callback(grader.close)
        tokenizer = build_tokenizer(config)
        benchmarks = load_benchmarks(config, tokenizer)
        if place.rank == 0:
            for bench in benchmarks:
                say_text_only(bench.title, [problem.prompt.answer for problem in bench.problems], config.reward)
        weights, dtype = open_weights(config.model.path or ""), getattr(torch, config.model.dtype)
        source: Any = SimpleNamespace(config=config, hf_config=weights.hf)
        source.hf_weights = lambda: ((name, weights.read(name).to(dtype)) for name in weights.tensors)
        served = Served(config, place, source, tokenizer)
        stack.callback(served.close)

        def engine() -> RolloutEngine:
            served.sync()  # starts it at the first call
            return served.engine

        evaluator = Evaluator(engine, grader, tokenizer, config, place, served.revive, _Progress(place))
        identity = {"model": str(config.model.path), "weights": _fingerprint(weights)}
        return [evaluator.run(bench, set_folder(config, bench.name), identity) for bench in benchmarks]


def write_results(config: Config, results: list[SetResult]) -> str:
    """Write the tables and the pages into the run folder; returns the table in Markdown."""
    name = model_name(config.model.path or "")
    table = write_tables(config.run_dir, name, results, confidence=config.eval.confidence)
    write_pages(config.run_dir, table, [(result.title, set_folder(config, result.name)) for result in results])
    return table.markdown()


def set_folder(config: Config, name: str) -> Path:
    """Return where the samples of a set are."""
    return config.run_dir / "sets" / name


def _fingerprint(weights: Weights) -> list[tuple[str, int, int]]:
    """(name, bytes, time of change in nanoseconds) of the files with the weights: cheap, and enough to notice that a
    path holds another model than before."""
    suffixes = (".safetensors", ".distcp")
    files = sorted(path for path in weights.path.iterdir() if path.suffix in suffixes)
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]


class _Progress:
    """Lines on the first rank about its share, and the answer to a request to stop."""

    def __init__(self, place: Place) -> None:
        self._speaks, self._said = place.rank == 0, time.monotonic()

    def __call__(self, bench: Benchmark, done: int, total: int) -> None:
        if launch.stop_requested():
            raise EvalError("stopped; the samples so far are kept, and the same command goes on from them")
        if self._speaks and (done == total or time.monotonic() - self._said > _REPORT_SECONDS):
            self._said = time.monotonic()
            launch.say(f"{bench.title}: {done} of this rank's {total} responses")
