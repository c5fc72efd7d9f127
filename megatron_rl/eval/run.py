"""`megatron-rl eval` on one rank: the model of `model.path` in the config's engine, without a trainer.

The weights go from the folder, of either format, to the engine as training sends them. Ranks are those of the config's
layout: with the embedded engine each holds the whole model and generates its share, servers are shared by all.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from megatron_rl import device, launch
from megatron_rl.config import Config
from megatron_rl.convert.weights import Weights, open_weights
from megatron_rl.data import build_tokenizer
from megatron_rl.eval.benchmarks import Benchmark, load_benchmarks
from megatron_rl.eval.browse import write_pages
from megatron_rl.eval.commands import model_name
from megatron_rl.eval.evaluator import Evaluator, SetResult
from megatron_rl.eval.store import EvalError
from megatron_rl.eval.table import write_tables
from megatron_rl.parallel.groups import barrier, destroy_groups, init_groups
from megatron_rl.parallel.reduce import Reducer
from megatron_rl.reward import build_grader, tell_unread_golds
from megatron_rl.rollout.build import write_model_dir
from megatron_rl.rollout.engine import EngineSetup, Place, RolloutEngine, ServersLost, build_engine

_REPORT_SECONDS = 30.0  # between two lines about the progress


def main(config: Config) -> None:
    """Evaluate on the world that torchrun's environment describes; rank 0 prints the table."""
    groups = init_groups(config.parallel, config.seed)
    world = Reducer(groups.world, device.device())
    place = Place(groups.rank, groups.world_size, launch.local_rank(), world.gather_objects)
    results = evaluate_model(config, place)
    if place.rank == 0:
        print(f"{write_results(config, results)}\n{config.run_dir / 'index.html'}", flush=True)
    barrier(groups)
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
            tell_unread_golds([p.prompt.answer for bench in benchmarks for p in bench.problems], config.reward)
        served = _Served(config, place, tokenizer)
        stack.callback(served.close)
        evaluator = Evaluator(served.engine, grader, tokenizer, config, place, served.load, _Progress(place))
        identity = {"model": str(config.model.path), "weights": _fingerprint(served.weights)}
        return [evaluator.run(bench, set_folder(config, bench.name), identity) for bench in benchmarks]


def write_results(config: Config, results: list[SetResult]) -> str:
    """Write the tables and the pages into the run folder; returns the table in Markdown."""
    name = model_name(config.model.path or "")
    table = write_tables(config.run_dir, name, results, confidence=config.eval.confidence)
    write_pages(config.run_dir, table, [(result.title, set_folder(config, result.name)) for result in results])
    return table.markdown()


def set_folder(config: Config, name: str) -> Path:
    """Where the samples of a set are."""
    return config.run_dir / "sets" / name


def _fingerprint(weights: Weights) -> list[tuple[str, int, int]]:
    """(name, bytes, time of change in nanoseconds) of the files with the weights: cheap, and enough to notice that a
    path holds another model than before."""
    suffixes = (".safetensors", ".distcp")
    files = sorted(path for path in weights.path.iterdir() if path.suffix in suffixes)
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]


@dataclass(frozen=True, slots=True)
class _Model:
    """What the engine is told about the model."""

    hf_config: PretrainedConfig
    config: Config


class _Served:
    """The model in an engine that is started when it is first asked for."""

    def __init__(self, config: Config, place: Place, tokenizer: Any) -> None:
        self.weights = open_weights(config.model.path or "")
        self._config, self._place, self._tokenizer = config, place, tokenizer
        self._engine: RolloutEngine | None = None

    def engine(self) -> RolloutEngine:
        """With the weights loaded. A collective, at its first call."""
        if self._engine is None:
            model_dir = self._config.run_dir / "engine_model"
            if self._config.rollout.engine != "transformers":
                if self._place.rank == 0:
                    write_model_dir(model_dir, _Model(self.weights.hf, self._config), self._tokenizer)
                self._place.gather(None)  # no server may start before the folder is whole
            setup = EngineSetup(self.weights.hf, model_dir, device.device(), self._place)
            self._engine = build_engine(self._config, setup)
            self.load()
        return self._engine

    def load(self) -> None:
        """Restart what died, and send the weights. A collective."""
        assert self._engine is not None
        for attempt in range(self._config.rollout.server.max_failures + 2):
            try:
                self._engine.update_weights(self._stream(), 0)
                return
            except ServersLost as error:  # the next update restarts the dead, or ends when too many died
                lost = error
                if self._place.rank == 0:
                    print(f"weights again (attempt {attempt + 2}), because a server was lost: {lost}", flush=True)
        raise lost

    def _stream(self) -> Iterator[tuple[str, Tensor]]:
        dtype = getattr(torch, self._config.model.dtype)
        return ((name, self.weights.read(name).to(dtype)) for name in self.weights.tensors)

    def close(self) -> None:
        """Stop what was started."""
        if self._engine is not None:
            self._engine.close()


class _Progress:
    """Lines on the first rank about its share, and the answer to a request to stop."""

    def __init__(self, place: Place) -> None:
        self._speaks, self._said = place.rank == 0, time.monotonic()

    def __call__(self, bench: Benchmark, done: int, total: int) -> None:
        if launch.stop_requested():
            raise EvalError("stopped; the samples so far are kept, and the same command goes on from them")
        if self._speaks and (done == total or time.monotonic() - self._said > _REPORT_SECONDS):
            self._said = time.monotonic()
            print(f"{bench.title}: {done} of this rank's {total} responses", flush=True)
