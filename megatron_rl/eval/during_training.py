"""Evaluation in the course of training: within a step, or beside the next ones.

Beside training, servers of their own sample. All ranks write the step's weights to a folder, which those servers load.
From there on rank 0 alone works, on a thread that makes no collective; all ranks look at each later step's end whether
it is done. As the folder stays until the next evaluation, a server that died gets the same weights again, and a killed
run begins its evaluation anew.
"""

import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from megatron_rl import device, launch
from megatron_rl.config import Config
from megatron_rl.config.engine_checks import beside_config
from megatron_rl.convert.disk import clear
from megatron_rl.convert.save_hf import Exported, save_hf
from megatron_rl.convert.weights import open_weights
from megatron_rl.errors import UserError
from megatron_rl.eval.benchmarks import Benchmark
from megatron_rl.eval.evaluator import Evaluator, metrics_of
from megatron_rl.eval.table import write_tables
from megatron_rl.grading.verdict import Grader
from megatron_rl.metrics.write import RunLogger
from megatron_rl.parallel.reduce import Reducer
from megatron_rl.rollout.engine import EngineError, Place
from megatron_rl.rollout.served import Served

_LOOK_SECONDS = 0.5  # between two looks while training waits
_END_SECONDS = 5.0  # for the thread to end once its requests are aborted


def evaluate_sets(
    evaluator: Evaluator, benchmarks: Sequence[Benchmark], config: Config, num_steps: int, world: Reducer | None
) -> dict[str, float]:
    """Evaluate all sets after `num_steps` steps; return their metrics, the same on every rank. Samples and tables go to
    run_dir/eval/step_N.

    A collective over `world`; None: of one rank. When the world is asked to stop, the sets that are left are not begun,
    and nothing is logged of those that are done: a mean over fewer sets would pass for a drop.
    Raises: as `Evaluator.run`.
    """
    folder = config.run_dir / "eval" / f"step_{num_steps:06d}"
    if evaluator.is_first:
        clear(folder)  # of an earlier process, which may have had other weights
    results = []
    for bench in benchmarks:
        if world is not None and world.any(launch.stop_requested(config.run_dir)):
            return {}
        results.append(evaluator.run(bench, folder / "sets" / bench.name, {"run": config.name, "num_steps": num_steps}))
    if results and evaluator.is_first:
        write_tables(folder, f"{config.name}, step {num_steps}", results, confidence=config.eval.confidence)
    return metrics_of(results)


class Beside:
    """The evaluation beside training, one at a time. Every method but `close` is a collective."""

    def __init__(
        self, config: Config, policy: Exported, tokenizer: Any, grader: Grader, benchmarks: Sequence[Benchmark]
    ) -> None:
        """With eval.beside and benchmarks, have rank 0 start the servers, without waiting for them. Raises: EngineError
        when they cannot be started."""
        self._config, self._policy, self._tokenizer = config, policy, tokenizer
        self._benchmarks = benchmarks if config.eval.beside else []
        self._world, self._is_first = policy.groups.all_ranks, policy.groups.rank == 0
        folder, rollout = config.run_dir / "eval" / "servers", config.rollout
        self._weights, self._mark = folder / "weights", folder / "num_steps"
        self._running: int | None = None  # steps that the weights have had
        self._outcome: dict[str, float] | BaseException | None = None
        self._thread = threading.Thread()
        own = beside_config(config, folder)
        taken = 0 if rollout.shares_devices or rollout.server.urls else rollout.server.count * rollout.server.tp
        place = Place(0, 1, launch.local_rank(), lambda value: [value], taken, has_weights=True)
        saved: Any = SimpleNamespace(config=own, hf_config=policy.hf_config)
        saved.hf_weights = lambda: ((name, w.read(name)) for w in [open_weights(self._weights)] for name in w.tensors)
        self._served = served = Served(own, place, saved, tokenizer)
        self._evaluator = Evaluator(lambda: served.engine, grader, tokenizer, config, place, served.revive)
        if self._is_first and self._benchmarks:
            served.start_early()

    def restore(self, start_step: int) -> list[str]:
        """Begin anew what an earlier process had not ended, unless the run goes on from before that step; return what
        the user should know."""
        steps = int(self._world.gather_objects(self._mark.read_text() if self._mark.is_file() else "")[0] or 0)
        if not 0 < steps <= start_step:
            self._mark.unlink(missing_ok=True)  # that step is made again
            return []
        if not self._benchmarks:
            return [f"the evaluation after step {steps} had not ended; with eval.beside=true it begins anew"]
        self._start(steps)
        return [f"the evaluation after step {steps} had not ended, and begins anew"]

    def begin(self, num_steps: int, logger: RunLogger) -> None:
        """Evaluate the weights of this moment, which have had `num_steps` steps, once the evaluation before is done."""
        self.wait(logger)
        if self._running is not None:
            logger.message(f"stopping: there will be no evaluation after step {num_steps}")
            return
        save_hf(self._policy, self._tokenizer, self._weights)
        if self._is_first:
            self._mark.write_text(str(num_steps))
        self._start(num_steps)

    def look(self, logger: RunLogger) -> None:
        """Log the evaluation to the row of its step, if it is done. Raises: EngineError when it failed."""
        outcome = None if self._running is None else self._world.gather_objects(self._outcome)[0]
        if isinstance(outcome, UserError):
            text = str(outcome).replace("rollout.server.", "eval.server.")  # a server knows its options by that name
            raise EngineError(f"the evaluation after step {self._running} beside training failed: {text}")
        if isinstance(outcome, BaseException):
            raise outcome
        if self._running is not None and outcome is not None:
            logger.log(self._running - 1, outcome, late=True)
            logger.message(f"evaluated step {self._running}: average accuracy {outcome['eval/average']:.3f}")
            self._mark.unlink(missing_ok=True)
            self._running = None

    def wait(self, logger: RunLogger) -> None:
        """Log the evaluation once it is done, unless the run is asked to stop. Raises: as `look`."""
        self.look(logger)
        began, steps = time.monotonic(), self._running
        while self._running is not None and not self._world.any(launch.stop_requested(self._config.run_dir)):
            time.sleep(_LOOK_SECONDS)
            self.look(logger)
        if self._running is not None:
            logger.message(f"stopping: the evaluation after step {steps} begins anew when the run goes on")
        elif steps is not None:
            logger.message(f"training waited {time.monotonic() - began:.1f} s for the evaluation after step {steps}")

    def close(self) -> None:
        """Stop the servers, and what still runs."""
        if self._thread.is_alive():
            self._served.engine.abort()
            self._thread.join(_END_SECONDS)
        self._served.close()

    def _start(self, num_steps: int) -> None:
        self._running, self._outcome = num_steps, None
        if self._is_first:
            # no thread of a pool, for whose end Python would wait
            self._thread = threading.Thread(target=self._evaluate, args=[num_steps], daemon=True)
            self._thread.start()

    def _evaluate(self, num_steps: int) -> None:
        try:
            device.use_local_device()
            self._served.weight_version = num_steps
            self._served.sync()
            self._outcome = evaluate_sets(self._evaluator, self._benchmarks, self._config, num_steps, None)
        except BaseException as error:
            self._outcome = error
