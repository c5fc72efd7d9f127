"""One step's rollouts: draw prompts, generate and grade each rank's share, gather, and drop groups that teach nothing.

Every rank draws the same prompts and decides on the same facts of all rollouts (rewards, lengths, faults), which are
gathered without their tokens; so all ranks return the same result and leave the cursor at the same place. The tokens
travel when it is known which rank computes them (packing/dealing.py). The collective itself comes in with `place`.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from megatron_rl import launch
from megatron_rl.algorithms.hashing import hash64
from megatron_rl.data.cursor import PromptCursor
from megatron_rl.data.tokenizer import stop_token_ids
from megatron_rl.errors import UserError
from megatron_rl.grading.registry import RewardError
from megatron_rl.grading.verdict import Grader, Verdict
from megatron_rl.metrics.spans import OFF, Spans
from megatron_rl.reward.shape import check_failures, filter_overlong, graded, response_text, shape_rewards
from megatron_rl.rollout.answers import Answers, facts_of, from_facts
from megatron_rl.rollout.engine import EngineError, Place, Request, RolloutEngine, SamplingParams, ServersLost
from megatron_rl.types import CollectResult, Prompt, Rollout

if TYPE_CHECKING:
    from megatron_rl.config import Config

# separate the seeds of training and evaluation
_TRAIN_STREAM, _EVAL_STREAM = 1, 2


class CollectError(RuntimeError, UserError):
    """A step's rollouts cannot be completed."""


class CollectStopped(EngineError):
    """The run was asked to stop between two generation batches of a step: what the step has is dropped."""


@dataclass(slots=True)
class _Pending:
    """Prompts that were drawn, and this rank's part of the work on them."""

    prompts: list[Prompt]
    requests: list[Request]  # all ranks'
    share: list[Request]  # this rank's
    cursor_before: dict[str, int] = dataclasses.field(default_factory=dict)
    answers: Future[Answers] | None = None  # when begun ahead of time


class Collector:
    """Draws prompts and turns them into graded rollouts, up to `rollout.max_staleness` steps ahead of the training.

    What is ahead runs on a thread of its own and makes no collective: ranks meet where a batch is taken.
    """

    def __init__(
        self,
        engine: Callable[[], RolloutEngine],
        cursor: PromptCursor,
        grader: Grader,
        tokenizer: Any,
        config: Config,
        place: Place,
        revive: Callable[[], None],
        spans: Spans = OFF,
    ) -> None:
        """`engine`: called when something is to be sampled. `revive`: a collective that restarts dead servers and gives
        them the current weights."""
        self._spans = spans
        self._engine, self.cursor, self._grader, self._tokenizer = engine, cursor, grader, tokenizer
        self._config, self._place, self._revive = config, place, revive
        self._ahead: deque[_Pending] = deque()
        self._threads = ThreadPoolExecutor(max(1, config.rollout.max_staleness), "rollouts-ahead")
        self.resume_point = cursor.state()

    def collect(self, step: int) -> CollectResult:
        """`prompts_per_step` groups of graded rollouts with shaped rewards, for RL step `step`.

        With dynamic sampling, groups whose rewards are all equal are dropped and another generation batch of
        `prompts_per_step` prompts is drawn until enough are kept, at most `max_batches` times. Groups kept beyond
        `prompts_per_step` are discarded, the last drawn first, and counted in `sampling/surplus_groups`: their prompts
        come again in the next epoch.

        Raises: CollectError when `max_batches` did not suffice; CollectStopped when some rank was asked to stop and
            another batch would be needed; DataError when the data set is too small; RewardError when gradings failed
            too often; EngineError. All on every rank.
        Source: dynamic sampling, arXiv 2503.14476, section 3.2.
        """
        config = self._config
        wanted, dynamic = config.train.prompts_per_step, config.algorithm.dynamic_sampling
        self.resume_point = self.cursor_state()
        drawn: dict[int, Prompt] = {}
        groups: list[list[Rollout]] = []
        kept: list[list[Rollout]] = []
        num_batches = num_stale = 0
        while len(kept) < wanted:
            if num_batches == (dynamic.max_batches if dynamic.enabled else 1):
                raise CollectError(_shortage(groups, len(kept), num_batches, config))
            if num_batches and any(self._place.gather(launch.stop_requested(config.run_dir))):
                raise CollectStopped(f"stopped after {num_batches} generation batches of step {step + 1}")
            # a prompt that came twice in one step would form one group of equal samples: an epoch's end skips it
            pending = self._ahead.popleft() if self._ahead else self._draw(step, exclude=drawn)
            drawn.update((prompt.prompt_id, prompt) for prompt in pending.prompts)
            batch, stale = self._take(pending, oldest=step - config.rollout.max_staleness)
            num_stale += stale
            groups += [shape_rewards(group, config) for group in batch]
            num_batches += 1
            check_failures([rollout for group in groups for rollout in group], config)
            kept = [group for group in groups if _informative(group)] if dynamic.enabled else groups
        metrics = rollout_metrics(groups)
        for i, term in enumerate(config.reward.terms):
            metrics[f"reward/term/{term.name}"] = fmean([rollout.terms[i] for group in groups for rollout in group])
        metrics |= {"sampling/num_batches": float(num_batches), "sampling/surplus_groups": float(len(kept) - wanted)}
        if config.rollout.max_staleness:
            metrics |= staleness_metrics([r for group in kept[:wanted] for r in group], step, num_stale)
        rollouts = filter_overlong([rollout for group in kept[:wanted] for rollout in group], config)
        return CollectResult(rollouts, {r.prompt_id: drawn[r.prompt_id] for r in rollouts}, metrics)

    def go_ahead(self, step: int) -> None:
        """Start generating for the steps after `step`, as far as `max_staleness` and the run's length allow; with the
        weights of `step`. Call it once the step's own rollouts are there."""
        last = min(step + self._config.rollout.max_staleness, self._config.train.num_steps - 1)
        for later in range(step + 1 + len(self._ahead), last + 1):
            pending = self._draw(later)
            pending.answers = self._threads.submit(self._generate, pending.share, pending.prompts)
            self._ahead.append(pending)

    def cursor_state(self) -> dict[str, int]:
        """The cursor for a checkpoint between steps: rollouts ahead are not saved, their prompts are drawn again."""
        return self._ahead[0].cursor_before if self._ahead else self.cursor.state()

    def evaluate(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        """Held-out accuracy with the weights that the engine has: the same on every rank, the same draws at every call.

        Raises: CollectError without prompts; EngineError; RewardError when gradings failed too often.
        """
        if not prompts:
            raise CollectError(
                "evaluation has no held-out problems; set data.num_eval or data.eval_path, or train.eval_every=0"
            )
        config, train = self._config, self._config.train
        stops, seed = stop_token_ids(config, self._tokenizer), _seed(config, _EVAL_STREAM, 0)
        sampling = SamplingParams(train.eval_temperature, 1.0, 0, config.rollout.max_response_tokens, stops, seed)
        groups, _ = self._take(self._request(prompts, train.eval_samples, sampling))
        rollouts = [rollout for group in groups for rollout in group]
        check_failures(rollouts, config)
        return {
            "eval/accuracy": fmean([rollout.score for rollout in rollouts]),
            "eval/pass_at_n": fmean([max(rollout.score for rollout in group) for group in groups]),
            "eval/length_mean": fmean([rollout.response_length for rollout in rollouts]),
            "eval/truncated_fraction": fmean([rollout.finish_reason == "length" for rollout in rollouts]),
            "eval/failed_fraction": fmean([bool(rollout.error or rollout.unfinished) for rollout in rollouts]),
        }

    def close(self) -> None:
        """End what is ahead, and the grading."""
        if self._ahead:
            self._engine().abort()
        self._threads.shutdown(wait=True)
        self._grader.close()

    def _draw(self, step: int, exclude: Collection[int] = ()) -> _Pending:
        before = self.cursor.state()
        prompts = self.cursor.take(self._config.train.prompts_per_step, exclude=exclude)
        sampling = sampling_params(self._config, self._tokenizer, step)
        rollout = self._config.rollout
        pending = self._request(prompts, rollout.samples_per_prompt, sampling, with_routes=rollout.routing_replay)
        return dataclasses.replace(pending, cursor_before=before)

    def _request(
        self, prompts: Sequence[Prompt], samples: int, sampling: SamplingParams, *, with_routes: bool = False
    ) -> _Pending:
        """This rank asks for an equal, contiguous part of the (prompt, sample) pairs, so most groups stay whole and
        share one prefill."""
        pairs = [(prompt, i) for prompt in prompts for i in range(samples)]
        requests = [Request(p.prompt_id, i, p.token_ids, sampling, with_routes) for p, i in pairs]
        return _Pending(list(prompts), requests, self._part(requests))

    def _part(self, requests: list[Request]) -> list[Request]:
        rank, size = self._place.rank, self._place.world_size
        return requests[len(requests) * rank // size : len(requests) * (rank + 1) // size]

    def _generate(self, requests: Sequence[Request], prompts: Sequence[Prompt]) -> Answers:
        """Generate, and grade each response beside the generation of the rest. Faults are returned: all ranks must hear
        of them before one raises."""
        answers, problem = {prompt.prompt_id: prompt.answer for prompt in prompts}, ""
        begun: list[tuple[Rollout, Future[Verdict]]] = []
        try:
            for _, rollout in self._engine().stream(requests):
                text = response_text(rollout, self._tokenizer)
                begun.append((rollout, self._grader.submit(text, answers[rollout.prompt_id])))
        except ServersLost:
            pass  # what is missing is asked for again
        except EngineError as error:
            problem = str(error)
        try:
            with self._spans.light("reward"):  # what grading takes beyond the generation that it ran beside
                return Answers([graded(rollout, verdict.result()) for rollout, verdict in begun], problem)
        except RewardError as error:
            return Answers([], problem or str(error))

    def _take(self, pending: _Pending, oldest: int = 0) -> tuple[list[list[Rollout]], int]:
        """One group of scored rollouts per prompt, in the prompts' order, the same on every rank but for the tokens;
        and how many were thrown away because weights before version `oldest` began them. Lost and stale ones are asked
        for again."""
        answers = pending.answers.result() if pending.answers else self._generate(pending.share, pending.prompts)
        found: dict[tuple[int, int], Rollout] = {}
        num_stale = 0
        while True:
            own = [rollout.replace(known_lengths=rollout.lengths) for rollout in answers.rollouts]
            parts = self._place.gather((facts_of(own), answers.problem))
            problems = [problem for _, problem in parts if problem]
            if problems:
                raise EngineError("\n".join(dict.fromkeys(problems)))
            by_rank = [own if i == self._place.rank else from_facts(facts) for i, (facts, _) in enumerate(parts)]
            fresh = [r for part in by_rank for r in part if r.weight_version >= oldest]
            stale = sum(map(len, by_rank)) - len(fresh)
            if stale and num_stale:
                raise EngineError(f"responses that were asked for again still come from weights before {oldest}")
            num_stale += stale
            for rollout in fresh:
                if found.setdefault((rollout.prompt_id, rollout.sample_index), rollout) is not rollout:
                    raise CollectError(
                        f"prompt {rollout.prompt_id}, sample {rollout.sample_index} was answered twice: ranks drew "
                        "other prompts"
                    )
            missing = [r for r in pending.requests if (r.prompt_id, r.sample_index) not in found]
            if not missing:
                break
            if len(missing) > stale:
                self._revive()
            answers = self._generate(self._part(missing), pending.prompts)
        samples = len(pending.requests) // len(pending.prompts)
        return [[found[p.prompt_id, i] for i in range(samples)] for p in pending.prompts], num_stale


def sampling_params(config: Config, tokenizer: Any, step: int) -> SamplingParams:
    """Return how training rollouts of RL step `step` are sampled. Raises: DataError without a stop token."""
    rollout = config.rollout
    stops, seed = stop_token_ids(config, tokenizer), _seed(config, _TRAIN_STREAM, step)
    return SamplingParams(rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_response_tokens, stops, seed)


def rollout_metrics(groups: Sequence[Sequence[Rollout]]) -> dict[str, float]:
    """Plain means over the rollouts, and fractions of the groups; lengths in tokens, fractions in [0, 1].

    `all_correct` groups score at least 1 throughout, `all_wrong` at most 0; the kept fraction is of groups whose
    rewards differ.
    """
    rollouts = [rollout for group in groups for rollout in group]
    rewards, lengths = [r.reward for r in rollouts], [r.response_length for r in rollouts]
    mean = fmean(rewards)
    return {
        "reward/mean": mean,
        "reward/std": math.sqrt(fmean([(reward - mean) ** 2 for reward in rewards])),
        "reward/accuracy": fmean([r.score for r in rollouts]),
        "reward/failed_fraction": fmean([bool(r.error) for r in rollouts]),
        "reward/unfinished_fraction": fmean([bool(r.unfinished) for r in rollouts]),
        "response/length_mean": fmean(lengths),
        "response/length_max": float(max(lengths)),
        "response/length_min": float(min(lengths)),
        "response/truncated_fraction": fmean([r.finish_reason == "length" for r in rollouts]),
        "sampling/kept_group_fraction": fmean([_informative(group) for group in groups]),
        "sampling/all_correct_fraction": fmean([all(r.score >= 1 for r in group) for group in groups]),
        "sampling/all_wrong_fraction": fmean([all(r.score <= 0 for r in group) for group in groups]),
    }


def staleness_metrics(rollouts: Sequence[Rollout], step: int, num_stale: int) -> dict[str, float]:
    """Age of the weights that sampled the step's tokens, in steps; means over tokens or rollouts.

    `interrupted_fraction`: rollouts that a weight update met half-way; `discarded`: rollouts asked for again because
    they began too long ago.
    """
    ages = [(step - version, count) for rollout in rollouts for version, count in rollout.spans]
    return {
        "staleness/mean": sum(age * count for age, count in ages) / sum(count for _, count in ages),
        "staleness/max": float(max(age for age, _ in ages)),
        "staleness/interrupted_fraction": fmean([len(rollout.spans) > 1 for rollout in rollouts]),
        "staleness/discarded": float(num_stale),
    }


def _informative(group: Sequence[Rollout]) -> bool:
    return any(rollout.reward != group[0].reward for rollout in group)


def _seed(config: Config, stream: int, step: int) -> int:
    # 63 bits, because engines behind HTTP take no negative seed
    return int(hash64(config.seed, stream, step)) & (2**63 - 1)


def _shortage(groups: Sequence[Sequence[Rollout]], kept: int, num_batches: int, config: Config) -> str:
    metrics = rollout_metrics(groups)
    return (
        f"dynamic sampling kept {kept} of {len(groups)} groups after {num_batches} generation batches, "
        f"train.prompts_per_step={config.train.prompts_per_step} are needed: all correct "
        f"{metrics['sampling/all_correct_fraction']:.3f}, all wrong {metrics['sampling/all_wrong_fraction']:.3f} of "
        f"the groups. Raise algorithm.dynamic_sampling.max_batches ({config.algorithm.dynamic_sampling.max_batches}) "
        "or rollout.samples_per_prompt, use problems of fitting difficulty, or turn dynamic sampling off"
    )
