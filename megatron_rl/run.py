"""The parts of a run, and how they are built from the config."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils.deterministic

from megatron_rl import device, launch
from megatron_rl.algorithms.control import LossController
from megatron_rl.config import Config
from megatron_rl.data.cursor import PromptCursor
from megatron_rl.data.problems import load_prompts
from megatron_rl.data.tokenizer import build_tokenizer, vocab_size
from megatron_rl.eval.benchmarks import Benchmark, load_benchmarks
from megatron_rl.eval.during_training import Beside
from megatron_rl.eval.evaluator import Evaluator
from megatron_rl.metrics import Timers
from megatron_rl.metrics.entropy_law import LawMonitor
from megatron_rl.metrics.spans import OFF, Spans
from megatron_rl.models.facts import read_hf_config, require_model
from megatron_rl.models.hardware import Hardware, with_memory
from megatron_rl.packing import Layout
from megatron_rl.parallel.groups import Groups
from megatron_rl.parallel.reduce import Reducer
from megatron_rl.plan.memory import fuses_output_layer, with_cache_tokens
from megatron_rl.plan.shapes import layout_of, shape_of
from megatron_rl.policy.gradients import EntropyTangent
from megatron_rl.policy.policy import MegatronPolicy
from megatron_rl.reward.shape import build_grader, reads_gold
from megatron_rl.rollout.collect import Collector
from megatron_rl.rollout.engine import Place, RolloutEngine
from megatron_rl.rollout.probe import probe_engine
from megatron_rl.rollout.served import Served
from megatron_rl.types import MiniBatch, Prompt
from megatron_rl.warm_start import warm_start


@dataclass
class Run:
    """Everything that a step needs."""

    config: Config
    groups: Groups
    world: Reducer  # over all ranks
    ranks: Reducer  # over those that hold different tokens
    layout: Layout
    tokenizer: Any
    policy: MegatronPolicy
    served: Served
    collector: Collector
    controller: LossController
    timers: Timers
    train_prompts: list[Prompt]
    eval_prompts: list[Prompt]
    evaluator: Evaluator
    benchmarks: list[Benchmark]
    beside: Beside  # who evaluates the benchmarks in the evaluator's place, with eval.beside
    best_accuracy: float = -math.inf  # of the evaluations so far
    law: LawMonitor = field(default_factory=LawMonitor)

    def entropy_tangent(self, mini_batch: MiniBatch, *, start: bool, way: bool) -> EntropyTangent:
        """Return what tells the entropy's changes along the movement that begins now. A collective."""
        return EntropyTangent(self.policy, mini_batch, start=start, way=way)

    def close(self) -> None:
        """End the evaluation, the rollouts ahead, the grading and the engines."""
        self.beside.close()
        self.collector.close()
        self.served.close()


def set_up(config: Config, groups: Groups, spans: Spans = OFF) -> Run:
    """Build the data, the policy (warm-started when asked) and the engine.

    Raises: UserError for what the config names and this machine lacks, before anything slow.
    """
    require_model(config.model)
    layout = Layout.of(config, groups)
    grader = build_grader(config.reward)
    tokenizer = build_tokenizer(config)
    # rank 0 speaks for all, so it alone looks whether the gold answers can be read
    reads = reads_gold(config.reward) if groups.rank == 0 else lambda answer: True
    problems = load_prompts(config, tokenizer, reads)
    benchmarks = load_benchmarks(config, tokenizer) if config.train.eval_every and config.eval.sets else []
    raw_hf_config = read_hf_config(config.model)
    raw_hf_config.setdefault("vocab_size", vocab_size(tokenizer))
    world, ranks = groups.all_ranks, groups.token_ranks
    updates = config.train.num_steps * config.minibatches_per_step
    policy, with_cache = build_policy(raw_hf_config, config, groups, total_updates=updates)
    cursor = PromptCursor(problems.train, config.seed)

    def prove(engine: RolloutEngine) -> None:
        probe_engine(engine, policy, layout, cursor.prompts)

    place = Place(groups.rank, groups.world_size, launch.local_rank(), world.gather_objects)
    served = Served(with_cache, place, policy, tokenizer, prove=prove, shares_memory=policy)
    served.start_early()
    beside = Beside(config, policy, tokenizer, grader, benchmarks)
    if config.warm_start is not None:
        warm_start(policy, problems.train, layout, tokenizer)
    if config.loss.ref_kl_coef > 0:
        policy.keep_reference()
    return Run(
        config=config,
        groups=groups,
        world=world,
        ranks=ranks,
        layout=layout,
        tokenizer=tokenizer,
        policy=policy,
        served=served,
        collector=Collector(lambda: served.engine, cursor, grader, tokenizer, config, place, served.revive, spans),
        controller=LossController(config.loss, ranks),
        timers=Timers(device.synchronize, spans),
        train_prompts=problems.train,
        eval_prompts=problems.eval,
        evaluator=Evaluator(lambda: served.engine, grader, tokenizer, config, place, revive=served.revive),
        benchmarks=benchmarks,
        beside=beside,
    )


def build_policy(
    raw_hf_config: dict[str, Any], config: Config, groups: Groups, *, total_updates: int
) -> tuple[MegatronPolicy, Config]:
    """Return the policy, and the config for its servers, for the rank with the least memory. A collective."""
    if config.train.deterministic:
        forbid_nondeterminism()
    shape, hardware = shape_of(raw_hf_config), hardware_of(groups.all_ranks)
    fuses = fuses_output_layer(config, shape, layout_of(config), hardware)
    policy = MegatronPolicy(raw_hf_config, config, groups, total_updates=total_updates, fuse_output_layer=fuses)
    return policy, with_cache_tokens(config, shape, hardware)


def forbid_nondeterminism() -> None:
    """Let torch take, on a GPU, no kernel whose sums depend on the order of threads. What CUDA's libraries read from
    their environment is in config/environment.py."""
    if device.ON_GPU:
        torch.use_deterministic_algorithms(True)  # alone it also fills every new buffer
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def hardware_of(world: Reducer) -> Hardware:
    """Return the device of the rank with the least memory, for the planner's answers: the same on every rank."""
    least = -world.max(torch.tensor([-device.memory_bytes()], device=device.device()))
    return with_memory(float(least), on_gpu=device.ON_GPU, has_engine=device.has_transformer_engine())
