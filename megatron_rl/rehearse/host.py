"""What one step costs the host of a rank at the config's true batch: `rehearse_host`.

`run_step` runs as it is, with its collector, packing, losses, metrics, ledger and logger. Stand-ins are the engine,
which has every answer ready; the policy, which draws its statistics; and the other ranks, which hold copies of this
rank's numbers, and whose messages are really pickled and parsed.
"""

import contextlib
import io
import itertools
import pickle
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from megatron_rl import device
from megatron_rl.algorithms.control import LossController
from megatron_rl.algorithms.terms import LossFunction
from megatron_rl.config import Config
from megatron_rl.data.cursor import PromptCursor
from megatron_rl.data.tokenizer import build_tokenizer, tokenizer_folder, vocab_size
from megatron_rl.errors import UserError
from megatron_rl.grading.verdict import InProcess
from megatron_rl.metrics import Timers
from megatron_rl.metrics.spans import OFF, Recorder, Spans
from megatron_rl.metrics.write import RunLogger
from megatron_rl.models.facts import read_hf_config
from megatron_rl.packing import Layout
from megatron_rl.packing.dealing import deal_step, tokens_of
from megatron_rl.parallel.reduce import Reducer, pickled
from megatron_rl.policy.policy import MegatronPolicy, add_up
from megatron_rl.profiling.analysis import Cost, RankRecord, summarise
from megatron_rl.rollout.answers import facts_of
from megatron_rl.rollout.collect import Collector
from megatron_rl.rollout.engine import Place, Rounds, part_of
from megatron_rl.run import Run
from megatron_rl.train import run_step
from megatron_rl.types import Lengths, MiniBatch, Prompt, Rollout, TokenStats, UpdateResult

STAND_INS, REST = "stand-ins", "between phases"
PROMPT_TOKENS = 256  # as the planner assumes
SPREAD = 0.6  # standard deviation of the logarithm of a response's length
ZIPF = 1.3  # token i is drawn with a probability ~ i^-1.3
LEFT_OUT = (
    "generation, weight sync, the model's passes, Adam, evaluation, checkpoints",
    "train.entropy_tangent and _every, rollout.routing_replay and W&B, which are switched off",
    "grading: a verifier knows that odd samples are right; responses are decoded for it",
    "on a GPU losses, selection and metrics of tokens are its work, and the packed batch is in its memory: here both "
    "are the host's; launching kernels and waiting for them is not counted",
    "the network, late ranks, a collective's own copies; further generation batches of dynamic sampling",
    "numbers of selection, ledger and entropy: statistics are drawn, and other ranks hold the same tokens",
)


@dataclass(frozen=True, slots=True)
class HostBook:
    """The host's part of one step on one rank."""

    facts: dict[str, Any]
    phases: dict[str, Cost]  # device_seconds: of the CPU; peak_bytes: above those before the step
    metrics: dict[str, float]
    left_out: tuple[str, ...] = LEFT_OUT

    def rows(self) -> list[list[str]]:
        """Return a header, and a row a phase."""
        header = ["phase", "wall s", "CPU s", "peak MiB"]
        costs = [(name, c.seconds, c.device_seconds, c.peak_bytes / 2**20) for name, c in self.phases.items()]
        return [header, *([name, f"{a:.3f}", f"{b:.3f}", f"{mib:,.0f}"] for name, a, b, mib in costs)]


class Crowd(Reducer):
    """Rank `rank` of `size` in one process. The others hold copies of its numbers; where it sends a value, the ranks
    send `sent(value)`, of which its own is left aside."""

    def __init__(self, rank: int, size: int, sent: Callable[[Any], Sequence[Any]], spans: Spans = OFF) -> None:
        """`spans`: get one of `sent` and the pickling of the others' messages."""
        super().__init__(None)
        self.size, self._rank, self._sent, self._spans = size, rank, sent, spans

    def _gather(self, values: Tensor, group: Any = None) -> Tensor:
        return values.expand(self.size, *values.shape).clone()

    def gather_objects(self, value: Any) -> list[Any]:
        """Return what all ranks send."""
        return self.exchange_objects([value] * self.size)

    def exchange_objects(self, values: Sequence[Any]) -> list[Any]:
        """Return what all ranks send to this one."""
        for value in {id(value): value for value in values}.values():
            pickled(value)
        with self._spans(STAND_INS):
            sent = self._sent(own := values[self._rank])
            blobs = {id(value): pickled(value) for value in sent}
        return [own if i == self._rank else pickle.loads(blobs[id(value)]) for i, value in enumerate(sent)]


class _Others:
    """What the other ranks send, by the shape of what this one sends at the same place."""

    def __init__(self, config: Config, layout: Layout, rank: int, rollouts: list[Rollout]) -> None:
        self._layout, self._rank, self._rollouts, self._size = layout, rank, rollouts, len(layout.dp_ranks)
        self._samples, self._is_embedded = config.rollout.samples_per_prompt, config.rollout.is_embedded
        self._num_logged, self._computed = config.logging.samples_per_step, set[int]()

    def in_world(self, value: Any) -> list[Any]:
        if isinstance(value, tuple):  # Collector: a rank's answers, none lost or waiting, no fault
            groups = [self._rollouts[i : i + self._samples] for i in range(0, len(self._rollouts), self._samples)]
            parts = [list(itertools.chain(*groups[rank :: self._size])) for rank in range(self._size)]
            if self._is_embedded:
                parts = [part_of(self._rollouts, rank, self._size) for rank in range(self._size)]
            return [(facts_of(part), 0, (0, 0), "") for part in parts]
        if isinstance(value, list):  # hand_out: the tokens that this rank computes; here all come from one rank
            bins = [each.bins[self._layout.dp_rank] for each in deal_step(self._rollouts, self._layout)]
            self._computed = {i for chosen in itertools.chain(*bins) for i in chosen}
            tokens = [(i, tokens_of(self._rollouts[i])) for i in sorted(self._computed - {i for i, _ in value})]
            return [tokens if rank == (self._rank + 1) % self._size else [] for rank in range(self._size)]
        return [value] * self._size

    def of_other_tokens(self, value: Any) -> list[Any]:
        size = self._layout.dp_size * self._layout.cp_size
        if isinstance(value, tuple):  # samples_for_log: the logged samples that this rank does not compute
            logged = [r for i, r in enumerate(self._rollouts[: self._num_logged]) if i not in self._computed]
            held = {(r.prompt_id, r.sample_index): r.response_ids for r in logged}
            rows = {key: [[i, t, -1, 1, 0, 0] for i, t in enumerate(ids.tolist())] for key, ids in held.items()}
            return [({}, {})] * (size - 1) + [(held, rows)]
        if isinstance(value, list) and isinstance(value[0], tuple):  # ledger: the sums of a rank's own keys
            return [[(keys + rank, sums) for keys, sums in value] for rank in range(size)]
        return [value] * size


class _Policy(MegatronPolicy):
    """Draws its statistics, and has no model."""

    def __init__(self, config: Config, context: Reducer | None, spans: Spans) -> None:
        self.config, self.context, self._spans = config, context, spans
        self._reference = [] if config.loss.ref_kl_coef > 0 else None

    def stats(self, mini_batch: MiniBatch, *, with_sum_p2: bool = False, keep: bool = False) -> list[TokenStats]:
        with self._spans(STAND_INS):
            drawn = [torch.rand(4, len(micro_batch.labels)) for micro_batch in mini_batch.micro_batches]
            return [TokenStats(-a * b, a, *((c, -a * d) if with_sum_p2 else ())) for a, b, c, d in drawn]

    def ref_logprobs(self, mini_batches: Sequence[MiniBatch]) -> list[list[Tensor]]:
        return [[stats.logprobs for stats in self.stats(mini_batch)] for mini_batch in mini_batches]

    def update(self, mini_batch: MiniBatch, loss: LossFunction, spans: Spans = OFF) -> UpdateResult:
        sums = []
        for micro_batch in mini_batch.micro_batches:
            stats = micro_batch.computed_stats
            leaves = TokenStats(*(each.clone().requires_grad_() for each in (stats.logprobs, stats.entropy)))
            outputs = loss(micro_batch.loss_inputs(leaves, self.context))
            outputs.loss_sum.backward()
            sums.append(outputs.metrics)
        return UpdateResult(add_up(sums), 1.0, self.config.optimizer.lr, False)


def rehearse_host(config: Config, rank: int = 0, *, mean_response: float | None = None, seed: int = 0) -> HostBook:
    """Return what one step costs the host of rank `rank`, measured here, in one thread unless OMP_NUM_THREADS says
    more. Of two equal steps the second gives the seconds, because the first imports and fills caches, and the first the
    peaks, because the process keeps memory that it has freed.

    `mean_response`: of a log-normal distribution in tokens, cut at the config's limit; null: half of that.
    Raises: UserError for a rank that the config has not, or on a GPU; as build_tokenizer.
    """
    if not 0 <= rank < config.parallel.processes:
        raise UserError(f"rank {rank}: the config's processes are 0 to {config.parallel.processes - 1}")
    if device.ON_GPU:
        raise UserError("the host is rehearsed on the CPU; set MEGATRON_RL_DEVICE=cpu")
    device.set_local_device(0)
    stated, folder = read_hf_config(config.model).get("vocab_size", 0), tokenizer_folder(config)
    is_absent = stated and config.data.type != "countdown" and (folder is None or not folder.is_dir())
    tokenizer = _tokenizer(stated) if is_absent else build_tokenizer(config)
    mean = mean_response or config.rollout.max_response_tokens / 2
    rollouts = _answers(config, stated or vocab_size(tokenizer), mean, seed)
    recorder = Recorder({0, 1}, lambda report: contextlib.nullcontext())
    with tempfile.TemporaryDirectory() as run_dir:
        config = _alone(config, run_dir)
        with RunLogger(config.run_dir, config, rank=rank, console=Console(file=io.StringIO())) as logger:
            device.reset_peak()
            before = device.peak_since_reset()
            for _ in recorder.steps(range(2)):
                run = _run(config, rank, tokenizer, rollouts, recorder)
                with recorder(REST):
                    metrics = run_step(run, 0, logger)
                    with recorder("log"):
                        metrics |= run.law.observe(metrics["entropy/mean"], metrics["reward/accuracy"])
                        metrics |= run.timers.collect(metrics["batch/sequence_tokens"])
                        logger.log(0, metrics)
                run.collector.close()
    place = {"tp": 0, "dp": 0}
    ranks = [RankRecord(rank, place, "", 0.0, None, [record]) for record in recorder.records]
    first, phases = (summarise([each], on_gpu=False).phases for each in ranks)
    for name, cost in phases.items():
        cost.peak_bytes = max(0, first[name].peak_bytes - before)
    spelled = f"{stated} made-up words" if is_absent else "the config's"
    facts = {"rank": rank, "responses": len(rollouts), "mean_response": mean, "seed": seed, "tokenizer": spelled}
    return HostBook(facts | {"processes": config.parallel.processes}, phases, metrics)


def _alone(config: Config, run_dir: str) -> Config:
    """Return the config of one step without what needs a model or a network, packed as on a GPU."""
    changes: dict[str, dict[str, Any]] = {
        "algorithm": {"max_mismatch": float("inf")},  # statistics are drawn
        "rollout": {"routing_replay": False},
        "train": {"share_prompts": False, "entropy_tangent": False, "entropy_tangent_every": 0, "num_steps": 1},
        "logging": {"run_dir": run_dir, "wandb_project": None},
    }
    sections = {name: getattr(config, name).model_copy(update=new) for name, new in changes.items()}
    return config.model_copy(update=sections)


def _run(config: Config, rank: int, tokenizer: Any, rollouts: list[Rollout], spans: Spans) -> Run:
    p = config.parallel
    dp_ranks = tuple(each // (p.tp * p.cp) % p.dp for each in range(p.processes))
    groups: Any = SimpleNamespace(dp_rank=dp_ranks[rank], dp_size=p.dp, dp_ranks=dp_ranks, pp_size=p.pp)
    groups.cp_rank, groups.cp_size = rank // p.tp % p.cp, p.cp
    layout = Layout.of(config, groups)
    others = _Others(config, layout, rank, rollouts)
    world = Crowd(rank, p.processes, others.in_world, spans)
    ranks = Crowd(layout.dp_rank * p.cp + layout.cp_rank, p.dp * p.cp, others.of_other_tokens, spans)
    ready = {(r.prompt_id, r.sample_index): r.replace(known_lengths=None) for r in rollouts}
    last: list[Rollout] = []  # that the engine gave out

    def stream(requests: Sequence[Any]) -> Iterator[tuple[int, Rollout]]:
        for i, request in enumerate(requests):
            last[:] = [ready[request.prompt_id, request.sample_index]]
            yield i, last[0]

    engine: Any = SimpleNamespace(open=lambda then: Rounds(SimpleNamespace(stream=stream), then))
    grader = InProcess([lambda response, answer: last[0].score] * (1 + len(config.reward.terms)))
    cursor, place = _cursor(config), Place(rank, p.processes, 0, world.gather_objects)
    served: Any = SimpleNamespace(session=lambda timers: contextlib.nullcontext())
    policy = _Policy(config, Crowd(layout.cp_rank, p.cp, lambda value: [value] * p.cp) if p.cp > 1 else None, spans)
    collector = Collector(lambda: engine, cursor, grader, tokenizer, config, place, lambda: None, spans)
    controller, timers = LossController(config.loss, ranks), Timers(device.synchronize, spans)
    data: list[Any] = [None] * 5  # a step asks for none
    return Run(config, groups, world, ranks, layout, tokenizer, policy, served, collector, controller, timers, *data)


def _cursor(config: Config) -> PromptCursor:
    """Return the prompts of one step, in the run's order."""
    prompt = (0,) * min(PROMPT_TOKENS, config.data.max_prompt_tokens)
    return PromptCursor([Prompt(i, prompt, "", "") for i in range(config.train.prompts_per_step)], config.seed)


def _answers(config: Config, vocabulary: int, mean: float, seed: int) -> list[Rollout]:
    """Return all ranks' answers of a step, in its order."""
    rng, limit = np.random.default_rng(seed), config.rollout.max_response_tokens
    samples = range(config.rollout.samples_per_prompt)
    zipf = np.cumsum(1 / np.arange(1, vocabulary + 1) ** ZIPF)
    drawn = [(prompt, i) for prompt in _cursor(config).take(config.train.prompts_per_step) for i in samples]
    lengths = rng.lognormal(np.log(mean) - SPREAD**2 / 2, SPREAD, len(drawn)).clip(1, limit).astype(int)
    rollouts = []
    for (prompt, sample), count in zip(drawn, lengths.tolist(), strict=True):
        start, score = len(prompt.token_ids), float(sample % 2)
        tokens = np.searchsorted(zipf, rng.random(count) * zipf[-1])
        token_ids = torch.from_numpy(np.concatenate([prompt.token_ids, tokens]))
        logprobs = torch.from_numpy(np.concatenate([np.zeros(start), -rng.random(count)])).float()
        sampled, reason = torch.arange(start + count) >= start, "stop" if count < limit else "length"
        facts: dict[str, Any] = {"score": score, "reward": score, "terms": (score,) * len(config.reward.terms)}
        facts |= {"spans": ((0, count),), "known_lengths": Lengths(start + count, start, count)}
        rollouts.append(Rollout(prompt.prompt_id, sample, token_ids, logprobs, sampled, reason, 0, **facts))
    return rollouts


def _tokenizer(size: int) -> Any:
    """Return one of made-up words, which decodes as fast as another of its size."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"\u0120w{i}": i for i in range(size)}))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="\u0120w0", clean_up_tokenization_spaces=False)
