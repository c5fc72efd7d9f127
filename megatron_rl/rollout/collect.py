"""One step's rollouts: draw prompts, have them answered and graded, and keep the first groups that teach something.

Every rank draws the same prompts and decides on the same facts of all rollouts (rewards, lengths, faults), which are
gathered without their tokens; so all ranks return the same result and leave the cursor at the same place. The tokens
travel when it is known which rank computes them (packing/dealing.py). The collective itself comes in with `place`.

Servers answer without barriers: ranks meet every `_TICK_SECONDS`, tell each other what came, and draw more as soon as
too few groups are likely to be kept. The embedded engine answers in rounds. Either keeps the same groups (window.py).
"""

from __future__ import annotations

import itertools
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
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
from megatron_rl.rollout.answers import facts_of, from_facts
from megatron_rl.rollout.engine import (
    EngineError,
    Place,
    Request,
    RolloutEngine,
    SamplingParams,
    Stream,
    Taken,
    part_of,
)
from megatron_rl.rollout.measures import busy_times, cost_metrics, is_informative, rollout_metrics, staleness_metrics
from megatron_rl.rollout.window import Group, Keeps, num_settled, num_to_draw
from megatron_rl.types import CollectResult, Prompt, Rollout

if TYPE_CHECKING:
    from megatron_rl.config import Config

# separate the seeds of training and evaluation
_TRAIN_STREAM, _EVAL_STREAM = 1, 2
_TICK_SECONDS = 0.25  # between two meetings of the ranks while servers generate


class CollectError(RuntimeError, UserError):
    """A step's rollouts cannot be completed."""


class CollectStopped(EngineError):
    """The run was asked to stop before more prompts of a step are drawn: what the step has is dropped."""


class Collector:
    """Draws prompts and turns them into graded rollouts, up to `rollout.max_staleness` steps ahead of the training.

    Rollouts ahead stay with the servers while the policy trains, without a collective: ranks meet again in `collect`.
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
        self._window: deque[Group] = deque()  # drawn for training, in order
        self._numbers = itertools.count()  # of the groups
        self._asked: dict[tuple[int, int], Group] = {}  # by prompt and sample: what is under way on all ranks
        self._asked_again: set[tuple[int, int]] = set()  # in this step, because the first answer was too old
        self._grading: list[tuple[Rollout, Future[Verdict]]] = []  # this rank's
        self._lengths: dict[int, float] = {}  # mean of a prompt's last samples, tokens
        self._stream: Stream | None = None
        # how many groups let one wait for each server: more are drawn later, when it is known better how many it takes
        self._num_due = sys.maxsize
        self._seen: list[bool] = []  # of the last step's groups: whether it was kept
        self._ended = time.time()  # the last step's collection
        self.resume_point = cursor.state()

    def collect(self, step: int) -> CollectResult:
        """`prompts_per_step` groups of graded rollouts with shaped rewards, for RL step `step`.

        With dynamic sampling, groups whose rewards are all equal are dropped and more prompts are drawn until enough
        are kept, at most `max_batches` times `prompts_per_step`. The first informative groups in drawn order are kept.
        What was drawn behind them is ended, and its prompts are drawn again; with `max_staleness` above 0 it goes on as
        rollouts ahead.

        Raises: CollectError when `max_batches` did not suffice; CollectStopped when some rank was asked to stop and
            more prompts would be needed; DataError when the data set is too small; RewardError when gradings failed
            too often; EngineError. All on every rank.
        Source: dynamic sampling, arXiv 2503.14476, section 3.2.
        """
        staleness, config, began = self._config.rollout.max_staleness, self._config, time.time()
        self.resume_point = self.cursor_state()
        self._asked_again.clear()
        num_stale = self._settle(self._window, step - staleness)
        count, more_stale = self._fill(step)
        taken = [self._window.popleft() for _ in range(count)]
        unused = 0 if staleness else self._give_back()
        stream, ended = self._stream, time.time()
        costs = self._place.gather(stream.cost()) if stream is not None and not stream.in_rounds else ()
        began, self._ended = self._ended if staleness else began, ended
        groups = [group.rollouts for group in taken]
        check_failures([rollout for group in groups for rollout in group], config)
        self._seen = [self._keeps(group) for group in groups]
        kept = [group for group in taken if self._keeps(group.rollouts)]
        rollouts = [rollout for group in kept for rollout in group.rollouts]
        metrics = rollout_metrics(groups)
        for i, term in enumerate(config.reward.terms):
            metrics[f"reward/term/{term.name}"] = fmean([rollout.terms[i] for group in groups for rollout in group])
        discarded = unused + sum(cost.discarded_tokens for cost in costs)
        generated = sum(rollout.response_length for group in groups for rollout in group) + discarded
        metrics |= {
            "sampling/num_groups": float(len(groups)),
            "sampling/discarded_token_fraction": discarded / generated,
        }
        metrics |= cost_metrics(costs, taken, began, ended)
        for address, stretches in busy_times(costs).items() if self._place.rank == 0 else ():
            for stretch in stretches:
                self._spans.elsewhere("generating", *stretch, address)
        if staleness:
            metrics |= staleness_metrics(rollouts, step, num_stale + more_stale)
        prompts = {group.prompt.prompt_id: group.prompt for group in kept}
        return CollectResult(filter_overlong(rollouts, config), prompts, metrics)

    def _fill(self, step: int) -> tuple[int, int]:
        """Draw and meet until the window has the groups of the step; returns how many of its first are settled then,
        and how many responses were too old."""
        config, window, oldest = self._config, self._window, step - self._config.rollout.max_staleness
        wanted, dynamic, num_stale = config.train.prompts_per_step, config.algorithm.dynamic_sampling, 0
        most, num_judged = wanted * (dynamic.max_batches if dynamic.enabled else 1), 0
        while (count := num_settled(window, wanted, self._keeps)) is None:
            settled = list(itertools.takewhile(bool, (group.rollouts for group in window)))
            if len(settled) >= most:
                raise CollectError(_shortage(settled, self._keeps, config))
            need = min(num_to_draw(window, wanted, self._keeps, config.rollout.oversample), most - len(window))
            # a server that waits while the last responses of the step come begins what later steps train on
            more = min(need if need > 0 else self._num_ahead(step, step), self._num_due if window else need)
            if more > 0:
                if window and any(self._place.gather(launch.stop_requested(config.run_dir))):
                    more = 0  # what is under way may suffice
                    if need > 0:
                        had = f"{sum(map(self._keeps, settled))} of {len(window)} prompts"
                        raise CollectStopped(f"stopped in step {step + 1}, which had kept {had}")
                self._draw(more, step if need > 0 else step + 1)
            num_stale += self._meet(oldest)
            judged = [group.rollouts for group in window if group.rollouts]
            if len(judged) >= max(wanted, num_judged + 1):
                check_failures(list(itertools.chain(*judged)), config)
                num_judged = len(judged)
        return count, num_stale

    def go_ahead(self, step: int) -> None:
        """Start generating for the steps after `step`, as far as `max_staleness` and the run's length allow; with the
        weights of `step`. Call it once the step's own rollouts are there."""
        if more := self._num_ahead(step, step + 1):
            self._draw(more, step + 1)

    def _num_ahead(self, step: int, first: int) -> int:
        """Return the number of prompts that the window lacks for the steps from `first` to the last that may train on
        weights of `step`."""
        config = self._config
        last = min(step + config.rollout.max_staleness, config.train.num_steps - 1)
        if last == step or len(self._window) >= len(self.cursor.prompts):
            return 0
        # no margin: what would be left over may be too old for the step after
        return num_to_draw(
            self._window, (last + 1 - first) * config.train.prompts_per_step, self._keeps, seen=self._seen
        )

    def cursor_state(self) -> dict[str, int]:
        """The cursor for a checkpoint between steps: rollouts ahead are not saved, their prompts are drawn again."""
        return (self._window[0].cursor_before if self._window else None) or self.cursor.state()

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
        groups = [self._group(prompt, train.eval_samples, sampling) for prompt in prompts]
        self._ask(request for group in groups for request in group.requests)
        while not all(group.rollouts for group in groups):
            self._meet(oldest=0)
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        check_failures(rollouts, config)
        return {
            "eval/accuracy": fmean([rollout.score for rollout in rollouts]),
            "eval/pass_at_n": fmean([max(rollout.score for rollout in group.rollouts) for group in groups]),
            "eval/length_mean": fmean([rollout.response_length for rollout in rollouts]),
            "eval/truncated_fraction": fmean([rollout.finish_reason == "length" for rollout in rollouts]),
            "eval/failed_fraction": fmean([bool(rollout.error or rollout.unfinished) for rollout in rollouts]),
        }

    def close(self) -> None:
        """End what is ahead, and the grading."""
        if self._stream is not None:
            self._stream.drop()
        self._grader.close()

    def _keeps(self, group: Sequence[Rollout]) -> bool:
        return not self._config.algorithm.dynamic_sampling.enabled or is_informative(group)

    def _draw(self, count: int, step: int) -> None:
        """Draw prompts, fewer where the data set has no others, and have them answered behind those of the window.

        Raises: DataError when the window has all of them.
        """
        config, sampling = self._config, sampling_params(self._config, self._tokenizer, step)
        if self._window:
            count = min(count, max(1, len(self.cursor.prompts) - len(self._window)))
        # a prompt that came twice in one step would form one group of equal samples: an epoch's end skips it
        found = self.cursor.draw(count, exclude={group.prompt.prompt_id for group in self._window})
        samples = config.rollout.samples_per_prompt
        drawn = [self._group(prompt, samples, sampling, before) for prompt, before in found]
        self._window += drawn
        self._ask(request for group in drawn for request in group.requests)

    def _group(
        self, prompt: Prompt, samples: int, sampling: SamplingParams, cursor_before: dict[str, int] | None = None
    ) -> Group:
        """Return a group, of which every sample counts as asked for. With servers one rank asks for all of it."""
        is_training, replays = cursor_before is not None, self._config.rollout.routing_replay
        expected = round(self._lengths.get(prompt.prompt_id, 0))
        wanted = (prompt.prompt_id, prompt.token_ids, sampling, replays and is_training, expected)
        requests = [Request(wanted[0], i, *wanted[1:]) for i in range(samples)]
        rank = None if self._config.rollout.is_embedded else next(self._numbers) % self._place.world_size
        group = Group(prompt, requests, rank, cursor_before)
        self._asked |= {(prompt.prompt_id, i): group for i in range(samples)}
        return group

    def _ask(self, requests: Iterable[Request]) -> None:
        """Have this rank's part of the requests answered: those of its own groups, and of the others an equal,
        contiguous part, so that most groups stay whole and share one prefill."""
        owners = [(request, self._asked[request.prompt_id, request.sample_index].rank) for request in requests]
        shared, rank = [request for request, owner in owners if owner is None], self._place.rank
        mine = part_of(shared, rank, self._place.world_size)
        if self._stream is None:
            self._stream = self._engine().open(self._begin_grading)
        self._stream.add(mine + [request for request, owner in owners if owner == rank])

    def _begin_grading(self, request: Request, rollout: Rollout) -> tuple[Rollout, Future[Verdict]]:
        answer = self._asked[request.prompt_id, request.sample_index].prompt.answer
        return rollout, self._grader.submit(response_text(rollout, self._tokenizer), answer)

    def _meet(self, oldest: int) -> int:
        """Wait a moment for this rank's answers, and tell all ranks what came. What weights before version `oldest`
        began, or dead servers lost, is asked for again; returns the number of the former."""
        assert self._stream is not None
        taken, own, problem = Taken(), list[Rollout](), ""
        try:
            taken = self._stream.take(_TICK_SECONDS)
            self._grading += taken.finished
            own = self._graded(self._stream)
        except (EngineError, RewardError) as error:
            problem = str(error)
        parts = self._place.gather((facts_of(own), len(taken.lost), self._stream.backlog(), problem))
        problems = [problem for *_, problem in parts if problem]
        if problems:
            raise EngineError("\n".join(dict.fromkeys(problems)))
        touched, now = dict[int, Group](), time.time()
        for i, (facts, *_) in enumerate(parts):
            for rollout in own if i == self._place.rank else from_facts(facts):
                group = self._asked.pop((rollout.prompt_id, rollout.sample_index), None)
                if group is None:
                    raise CollectError(
                        f"prompt {rollout.prompt_id}, sample {rollout.sample_index} was answered twice: ranks drew "
                        "other prompts"
                    )
                group.answers[rollout.sample_index] = rollout
                group.arrived.append(now)
                touched[rollout.prompt_id] = group
        num_old = self._settle(touched.values(), oldest)
        waiting, servers = sum(part[2][0] for part in parts), max(part[2][1] for part in parts)
        groups = waiting // self._config.rollout.samples_per_prompt
        self._num_due = max(0, servers - groups) if servers else sys.maxsize
        if any(lost for _, lost, *_ in parts):
            self._revive()
            self._stream.add(taken.lost)
        return num_old

    def _graded(self, stream: Stream) -> list[Rollout]:
        """Return this rank's answers whose verdicts are there: of an engine in rounds all of them."""
        with self._spans.light("reward"):  # what grading takes beyond the generation that it ran beside
            verdicts = [verdict for _, verdict in self._grading]
            wait(verdicts, None if stream.in_rounds else _TICK_SECONDS if stream.is_idle() else 0)
            there = [(rollout, verdict) for rollout, verdict in self._grading if verdict.done()]
            self._grading = [(rollout, verdict) for rollout, verdict in self._grading if not verdict.done()]
            return [
                graded(rollout, verdict.result()).replace(known_lengths=rollout.lengths) for rollout, verdict in there
            ]

    def _settle(self, groups: Iterable[Group], oldest: int) -> int:
        """Judge the groups that are whole, and ask again for answers that weights before version `oldest` began;
        returns their number.

        Raises: EngineError when one is too old for the second time.
        """
        again: list[Request] = []
        for group in groups:
            old = [i for i, rollout in group.answers.items() if rollout.weight_version < oldest]
            for i in old:
                key = group.prompt.prompt_id, i
                if key in self._asked_again:
                    raise EngineError(f"responses that were asked for again still come from weights before {oldest}")
                self._asked_again.add(key)
                self._asked[key], group.rollouts = group, []
                del group.answers[i]
            again += [group.requests[i] for i in old]
            if len(group.answers) == len(group.requests) and not group.rollouts:
                answers = [group.answers[i] for i in range(len(group.requests))]
                group.rollouts = shape_rewards(answers, self._config) if group.cursor_before is not None else answers
                self._lengths[group.prompt.prompt_id] = fmean([rollout.response_length for rollout in answers])
        if again:
            self._ask(again)
        return len(again)

    def _give_back(self) -> int:
        """End what was drawn behind the groups of the step: its prompts are the next to be drawn. Returns the tokens
        of its responses that had come."""
        if not self._window or self._stream is None:
            return 0
        self._stream.drop()
        waiting = sum(self._place.gather(sum(rollout.response_length for rollout, _ in self._grading)))
        self.cursor.restore(self.cursor_state())
        there = [rollout for group in self._window for rollout in group.answers.values()]
        self._window.clear()
        self._asked.clear()
        self._grading.clear()
        return waiting + sum(rollout.response_length for rollout in there)


def sampling_params(config: Config, tokenizer: Any, step: int) -> SamplingParams:
    """Return how training rollouts of RL step `step` are sampled. Raises: DataError without a stop token."""
    rollout = config.rollout
    stops, seed = stop_token_ids(config, tokenizer), _seed(config, _TRAIN_STREAM, step)
    return SamplingParams(rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_response_tokens, stops, seed)


def _seed(config: Config, stream: int, step: int) -> int:
    # 63 bits, because engines behind HTTP take no negative seed
    return int(hash64(config.seed, stream, step)) & (2**63 - 1)


def _shortage(groups: Sequence[Sequence[Rollout]], keeps: Keeps, config: Config) -> str:
    metrics = rollout_metrics(groups)
    return (
        f"dynamic sampling kept {sum(map(keeps, groups))} of {len(groups)} groups, "
        f"train.prompts_per_step={config.train.prompts_per_step} are needed: all correct "
        f"{metrics['sampling/all_correct_fraction']:.3f}, all wrong {metrics['sampling/all_wrong_fraction']:.3f} of "
        f"the groups. Raise algorithm.dynamic_sampling.max_batches ({config.algorithm.dynamic_sampling.max_batches}) "
        "or rollout.samples_per_prompt, use problems of fitting difficulty, or turn dynamic sampling off"
    )
