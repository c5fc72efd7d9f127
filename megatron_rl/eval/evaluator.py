"""Samples, grades and counts one benchmark after another: the same for `megatron-rl eval` and during training.

Ranks divide the responses among themselves and keep what they have on disk (store.py), so an evaluation that was
killed goes on where it was. A response's draws depend on the seed, the set, the problem and the sample alone. The
embedded engine's batches are fixed by the set and the number of ranks, never by what is already there, so that it
repeats to the bit.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_rl.data.tokenizer import stop_token_ids
from megatron_rl.errors import UserError
from megatron_rl.eval.answers import answer_of, classes
from megatron_rl.eval.benchmarks import Benchmark, Problem
from megatron_rl.eval.statistics import Estimate, Intervals, Ints, label, summarise
from megatron_rl.eval.store import EvalError, SampleStore
from megatron_rl.grading.math_answer import last_boxes
from megatron_rl.grading.registry import RewardError
from megatron_rl.grading.verdict import Grader, Verdict
from megatron_rl.reward.shape import response_text
from megatron_rl.rollout.engine import EngineError, Place, Request, RolloutEngine, SamplingParams, ServersLost, part_of
from megatron_rl.types import Rollout

if TYPE_CHECKING:
    from megatron_rl.config import Config

SampleRow = dict[str, Any]
MEANS = ("length_mean", "truncated_fraction", "unboxed_fraction", "failed_fraction")  # of a `SetResult`


@dataclass(frozen=True, slots=True)
class SetResult:
    """The results of one set: fractions, and lengths in tokens."""

    name: str
    title: str
    problems: int
    num_in_file: int  # above `problems`: only the first were asked
    samples: int  # per problem
    temperature: float
    estimates: dict[str, Estimate]  # avg@n first, then pass@k and maj@k; correct is a score of at least 1
    length_mean: float  # tokens
    truncated_fraction: float  # cut at rollout.max_response_tokens
    unboxed_fraction: float  # without a closed \\boxed
    failed_fraction: float  # whose grading failed or did not finish; they count as wrong

    @property
    def accuracy(self) -> Estimate:
        """Return avg@n, the mean score over all samples."""
        return next(iter(self.estimates.values()))


class Evaluator:
    """Evaluates sets with the weights that the engine has. All ranks call every method together."""

    def __init__(
        self,
        engine: Callable[[], RolloutEngine],
        grader: Grader,
        tokenizer: Any,
        config: Config,
        place: Place,
        revive: Callable[[], None],
        on_progress: Callable[[Benchmark, int, int], None] = lambda bench, done, total: None,
    ) -> None:
        """Keep the parts.

        engine: called, on all ranks, when something is to be sampled. revive: a collective that restarts dead servers
        and gives them the weights. on_progress(set, done, total): called after each sample of this rank; may raise.
        """
        self._engine, self._grader, self._tokenizer = engine, grader, tokenizer
        self._config, self._place, self._revive, self._on_progress = config, place, revive, on_progress
        self.is_first = place.rank == 0  # it writes the results

    def run(self, bench: Benchmark, folder: Path, model: dict[str, Any]) -> SetResult:
        """Sample and grade the set in `folder`; return its results, the same on every rank.

        `model`: plain data that tells these weights from others.
        Raises, on every rank: EvalError when the folder holds another evaluation or gradings failed too often;
        EngineError.
        """
        store = SampleStore(folder, bench, model | self._protocol(bench))
        rows: list[SampleRow] = []

        def settle(stored: list[SampleRow]) -> set[tuple[str, int]]:
            rows[:] = stored
            return {(row["id"], row["sample"]) for row in stored}

        done, rounds = self._on_first(lambda: settle(store.open())), 0
        while len(done) < len(bench.problems) * bench.samples:
            if rounds:
                self._revive()
            engine = self._engine()
            problems = [problem for problem in self._place.gather(self._sample(engine, bench, store, done)) if problem]
            if problems:
                raise EngineError("\n".join(dict.fromkeys(problems)))
            done, rounds = self._on_first(lambda: settle(store.merge())), rounds + 1
        return self._on_first(lambda: self._conclude(bench, store, rows))

    def _protocol(self, bench: Benchmark) -> dict[str, Any]:
        config = self._config
        # what a remote verifier is told, as a password, is no part of its verdict
        options = {name: value for name, value in config.reward.options.items() if name != "headers"}
        return {
            "set": bench.name,
            "problems": bench.digest,
            "samples": bench.samples,
            "temperature": bench.temperature,
            "seed": bench.seed,
            "max_response_tokens": config.rollout.max_response_tokens,
            "stop_token_ids": list(stop_token_ids(config, self._tokenizer)),
            "engine": config.rollout.engine,
            "dtype": config.model.dtype,
            "reward": {"function": config.reward.function} | options,
        }

    def _on_first(self, action: Callable[[], Any]) -> Any:
        """Return on every rank what the first rank's `action` returns, or raise there what it raises."""
        outcome: Any = None
        if self.is_first:
            try:
                outcome = action()
            except UserError as error:
                outcome = error
        outcome = self._place.gather(outcome)[0]
        if isinstance(outcome, UserError):
            raise outcome
        return outcome

    def _sample(self, engine: RolloutEngine, bench: Benchmark, store: SampleStore, done: set[tuple[str, int]]) -> str:
        """Sample this rank's share of what is missing; return the fault, if any: all ranks must hear of it before one
        raises."""
        ids = {problem.prompt.prompt_id: problem for problem in bench.problems}
        batches = self._share(bench, done)
        total, count, fault = sum(map(len, batches)), 0, ""
        begun: deque[tuple[Problem, Rollout, str, Future[Verdict]]] = deque()  # being graded, in order
        with store.part(self._place.rank) as add:

            def write(wait: bool) -> None:
                while begun and (wait or begun[0][-1].done()):
                    problem, rollout, text, verdict = begun.popleft()
                    add(_row(problem.id, rollout, text, verdict.result(), by_text=bench.by_text))

            try:
                for batch in batches:
                    for _, rollout in engine.stream(batch):
                        problem = ids[rollout.prompt_id]
                        if (problem.id, rollout.sample_index) not in done:  # else only there to fill its batch
                            text = response_text(rollout, self._tokenizer)
                            begun.append((problem, rollout, text, self._grader.submit(text, problem.prompt.answer)))
                        write(wait=False)
                        count += 1
                        self._on_progress(bench, count, total)
            except ServersLost:
                pass  # what is missing is asked for again
            except EngineError as error:
                fault = str(error)
            try:
                write(wait=True)
            except RewardError as error:
                fault = fault or str(error)
        return fault

    def _share(self, bench: Benchmark, done: set[tuple[str, int]]) -> list[list[Request]]:
        config, place = self._config, self._place
        longest, stops = config.rollout.max_response_tokens, stop_token_ids(config, self._tokenizer)
        sampling = SamplingParams(bench.temperature, 1.0, 0, longest, stops, bench.seed)
        embedded = config.rollout.is_embedded
        # like prompts together, for short padding and shared prefills
        problems = sorted(bench.problems, key=lambda problem: (len(problem.prompt.token_ids), problem.id))
        keys = [(problem, sample) for problem in problems for sample in range(bench.samples)]
        size = min(config.rollout.batch_size, math.ceil(len(keys) / place.world_size)) if embedded else 1
        batches = [keys[start : start + size] for start in range(0, len(keys), size)]
        left = [batch for batch in batches if any((problem.id, sample) not in done for problem, sample in batch)]
        share = part_of(left, place.rank, place.world_size)
        requests = [[Request(p.prompt.prompt_id, i, p.prompt.token_ids, sampling) for p, i in batch] for batch in share]
        # servers batch on their own, and want all at once
        return requests if embedded or not requests else [[request for batch in requests for request in batch]]

    def _conclude(self, bench: Benchmark, store: SampleStore, rows: list[SampleRow]) -> SetResult:
        golds = {problem.id: problem.prompt.answer for problem in bench.problems}
        if any(row["error"] for row in rows):  # of an earlier process, perhaps: the grader may have been mended
            for row in rows:
                if row["error"]:
                    row |= _grades(self._grader.submit(row["response"], golds[row["id"]]).result())
            store.replace(rows)
        failed = [row for row in rows if row["error"]]
        if len(failed) > self._config.reward.max_failures * len(rows):
            raise EvalError(
                f"{bench.name}: grading failed on {len(failed)} of {len(rows)} responses, more than "
                f"reward.max_failures={self._config.reward.max_failures} allows; mend the reward function and start "
                f"again: the responses are kept. First, problem {failed[0]['id']}, sample {failed[0]['sample']}:\n"
                f"{failed[0]['error']}"
            )
        shape = (len(bench.problems), bench.samples)
        correct = np.array([row["score"] >= 1 for row in rows]).reshape(shape)
        groups = [rows[start : start + bench.samples] for start in range(0, len(rows), bench.samples)]
        labels = np.array([self._classes(bench, group) for group in groups])
        options = self._config.eval
        seed = bench.seed & 0xFFFFFFFF
        intervals = Intervals(shape[0], confidence=options.confidence, resamples=options.resamples, seed=seed)
        return SetResult(
            name=bench.name,
            title=bench.title,
            problems=shape[0],
            num_in_file=bench.num_in_file,
            samples=bench.samples,
            temperature=bench.temperature,
            estimates=summarise(correct, labels, intervals),
            length_mean=float(np.mean([row["tokens"] for row in rows])),
            truncated_fraction=float(np.mean([row["finish_reason"] == "length" for row in rows])),
            unboxed_fraction=float(np.mean([not row["boxed"] for row in rows])),
            failed_fraction=float(np.mean([bool(row["error"] or row["unfinished"]) for row in rows])),
        )

    def _classes(self, bench: Benchmark, group: list[SampleRow]) -> Ints:
        found = [row["answer"] for row in group]
        if bench.by_text:
            return label(found, lambda a, b: False)
        return classes(found, [row["score"] >= 1 for row in group], self._grader)


def _row(identifier: str, rollout: Rollout, text: str, verdict: Verdict, *, by_text: bool) -> SampleRow:
    return {
        "id": identifier,
        "sample": rollout.sample_index,
        **_grades(verdict),
        "answer": answer_of(text, by_text=by_text),
        "boxed": bool(last_boxes(text)),
        "tokens": rollout.response_length,
        "finish_reason": rollout.finish_reason,
        "response": text,
    }


def _grades(verdict: Verdict) -> SampleRow:
    return {"score": verdict.values[0], "error": verdict.error, "unfinished": verdict.unfinished}


def metrics_of(results: Sequence[SetResult]) -> dict[str, float]:
    """Return the metrics that a training run logs: `eval/<set>/accuracy` with its interval, and the mean over the
    sets."""
    metrics: dict[str, float] = {}
    for result in results:
        accuracy = result.accuracy
        numbers = {
            "accuracy": accuracy.value,
            "accuracy_low": accuracy.low,
            "accuracy_high": accuracy.high,
            **{name: e.value for name, e in result.estimates.items() if name.endswith(f"@{result.samples}")},
            **{name: getattr(result, name) for name in MEANS},
        }
        numbers.pop(f"avg@{result.samples}")
        metrics |= {f"eval/{result.name}/{name.replace('@', '_at_')}": value for name, value in numbers.items()}
    if results:
        metrics["eval/average"] = sum(result.accuracy.value for result in results) / len(results)
    return metrics
