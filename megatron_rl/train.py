"""One RL step, top to bottom: `run_step`. The loss is three hops away: run_step -> MegatronPolicy.update ->
LOSSES[...].

Every rank runs this file. Decisions that all ranks must share are made on data that all ranks hold; what differs
between ranks is which micro-batches they compute.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_rl import device, launch
from megatron_rl.algorithms.advantages import ADVANTAGES
from megatron_rl.algorithms.control import ControlState, adapt, follows_entropy
from megatron_rl.algorithms.ledger import ledger
from megatron_rl.algorithms.losses import LOSSES
from megatron_rl.algorithms.weighting import mark_tokens
from megatron_rl.config import Config
from megatron_rl.config_checks import read_hf_config, require_model
from megatron_rl.data import PromptCursor, build_tokenizer, load_prompts, vocab_size
from megatron_rl.errors import UserError
from megatron_rl.eval.benchmarks import Benchmark, load_benchmarks
from megatron_rl.eval.during_training import evaluate_sets
from megatron_rl.eval.evaluator import Evaluator
from megatron_rl.law import LawMonitor
from megatron_rl.logs import RunLogger
from megatron_rl.metrics import Metrics, Timers
from megatron_rl.packing import computed, pack, packing_metrics, shares_prompts
from megatron_rl.parallel.groups import Groups, barrier, destroy_groups, init_groups, packing_options
from megatron_rl.parallel.reduce import Reducer
from megatron_rl.policy.checkpoint import CheckpointStore
from megatron_rl.policy.gradients import EntropyTangent
from megatron_rl.policy.policy import MegatronPolicy
from megatron_rl.profiling.spans import OFF, Spans
from megatron_rl.resume import check_drift, checkpoint_to_resume, data_digest
from megatron_rl.reward import build_grader, tell_unread_golds
from megatron_rl.rollout.build import write_model_dir
from megatron_rl.rollout.collect import Collector
from megatron_rl.rollout.engine import EngineError, EngineSetup, Place, RolloutEngine, ServersLost, build_engine
from megatron_rl.rollout.probe import probe_engine
from megatron_rl.save_hf import save_hf
from megatron_rl.step_metrics import (
    add_batch_metrics,
    entropy_change,
    mean_entropy,
    needs_current_stats,
    samples_for_log,
    update_metrics,
)
from megatron_rl.types import Prompt, Rollout, TrainBatch
from megatron_rl.warm_start import warm_start


@dataclass
class Run:
    """Everything that a step needs. `weight_version` counts the steps whose updates the weights contain."""

    config: Config
    groups: Groups
    world: Reducer  # over all ranks
    data_parallel: Reducer  # over the ranks that hold different tokens
    tokenizer: Any
    policy: MegatronPolicy
    engine: RolloutEngine
    collector: Collector
    eval_prompts: list[Prompt]
    evaluator: Evaluator
    benchmarks: list[Benchmark]
    data_digest: str  # of the training problems
    weight_version: int = 0
    engine_version: int = -1
    best_accuracy: float = -math.inf  # of the evaluations so far
    control: ControlState = field(default_factory=dict)  # options of the loss that follow the entropy
    law: LawMonitor = field(default_factory=LawMonitor)


def main(config: Config) -> None:
    """Train on the world that torchrun's environment describes."""
    groups = init_groups(config.parallel, config.seed)
    train(config, groups)
    barrier(groups)
    destroy_groups()


def train(config: Config, groups: Groups, spans: Spans = OFF) -> None:
    """All steps, from the start or from a checkpoint. `spans` sees where their time goes."""
    run = set_up(config, groups, spans)
    store = CheckpointStore(config.run_dir / "checkpoints", run.policy, groups, run.tokenizer)
    start_step, notes = restore(run, store)
    timers = Timers(device.synchronize, spans)
    with RunLogger(config.run_dir, config, rank=groups.rank, start_step=start_step) as logger:
        if config.train.share_prompts == "auto":
            notes.append(f"train.share_prompts=auto: {'on' if shares_prompts(config) else 'off'}")
        for note in notes:
            logger.message(note)
        if start_step >= config.train.num_steps:
            logger.message(
                f"nothing to train: {config.run_dir} has {start_step} steps and train.num_steps="
                f"{config.train.num_steps}; raise it to go on"
            )
        for step in spans.steps(range(start_step, config.train.num_steps)):
            try:
                metrics = run_step(run, step, timers, logger)
                metrics |= run.law.observe(metrics.get("entropy/mean", math.nan), metrics["reward/accuracy"])
                metrics |= evaluate(run, step, timers)
            except EngineError:
                rescue(run, store, step, logger)
                raise
            # before the checkpoint (whose time the next row tells): a process killed between the two then leaves a row
            # too many, which the next process drops, rather than one too few
            with spans("log"):
                logger.log(step, metrics | timers.collect(metrics["batch/sequence_tokens"]))
                stopping = run.world.any(launch.stop_requested(config.run_dir))
            with timers("checkpoint"):
                accuracy = metrics.get("eval/accuracy", metrics.get("eval/average"))
                checkpoint(run, store, step, accuracy, stopping=stopping)
            if stopping and step + 1 < config.train.num_steps:
                logger.message(f"stopped after step {step + 1} of {config.train.num_steps}; the same command continues")
                break
        else:
            if config.train.save_hf:
                save_hf(run.policy, run.tokenizer, config.run_dir / "hf")
                logger.message(f"the final model is in {config.run_dir / 'hf'}")
        store.finish()
    run.collector.close()
    run.engine.close()


def run_step(run: Run, step: int, timers: Timers, logger: RunLogger) -> dict[str, float]:
    """Generate, grade, pack, select, update. Returns the step's metrics, the same on every rank."""
    config, policy = run.config, run.policy
    metrics = Metrics(device.device())
    with generating(run, timers), timers("rollout"):
        collected = run.collector.collect(step)
        run.collector.go_ahead(step)
    metrics.set(collected.metrics)
    with timers("pack"):
        batch = packed(run, collected.rollouts, step)
    with timers("old_logprobs"):
        # each as its update will compute it: before the weights move, old and current log-probabilities are the same
        # bits, and KL-Cov's |difference| has no gradient then instead of the sign of a rounding error
        if config.loss.ref_kl_coef > 0:
            batch = batch.with_ref_logprobs(policy.ref_logprobs(batch.mini_batches))
        first, *others = batch.minibatches()
        of_others = [policy.stats(mini_batch, with_sum_p2=True) for mini_batch in others]
        old_stats = [policy.stats(first, with_sum_p2=True, before_update=True), *of_others]
        batch = batch.with_old_logprobs(old_stats)
    entropy = mean_entropy(batch, old_stats, run.data_parallel) if follows_entropy(config.loss) else math.nan
    loss, run.control, controls = adapt(config.loss, run.control, entropy)
    metrics.set(controls)
    with timers("probe"):
        tangent = EntropyTangent(policy, batch.mini_batches[0]) if config.train.entropy_tangent else None
    trained_on = []
    for mini_batch, stats in zip(batch.minibatches(), old_stats, strict=True):
        with timers("select"):
            if needs_current_stats(loss, mini_batch.index):
                stats = policy.stats(mini_batch, with_sum_p2=True)
            mini_batch, marked = mark_tokens(
                mini_batch,
                stats,
                loss,
                run.data_parallel,
                seed=config.seed,
                step=step,
                updates_per_step=config.minibatches_per_step,
            )
        metrics.add_means(marked)
        trained_on.append((mini_batch, stats))
        with timers("update"):
            result = policy.update(mini_batch, LOSSES[loss.type], loss, timers.spans)
        metrics.add(result.sums)
        metrics.add_means(
            {"optimizer/grad_norm": result.grad_norm, "optimizer/skipped_fraction": float(result.skipped)}
        )
        metrics.set({"optimizer/lr": result.learning_rate})
    run.weight_version = step + 1
    with timers("probe"):
        after = policy.stats(batch.mini_batches[0]) if config.train.entropy_probe else None
        if tangent is not None:
            metrics.set({"entropy/first_order_change": tangent.change()})
    if after is not None:
        metrics.add(entropy_change(batch.mini_batches[0], old_stats[0], after))
    with timers("metrics"):
        add_batch_metrics(metrics, batch, old_stats, run.data_parallel)
        metrics.set(update_metrics(trained_on, loss, run.data_parallel, policy.context))
        if config.logging.ledger_every and step % config.logging.ledger_every == 0:
            logger.log_ledger(step, ledger(batch, old_stats, after, run.data_parallel), run.tokenizer)
        metrics.set(batch_totals(run, batch, collected.rollouts))
        logger.log_samples(step, samples_for_log(run, collected, [m for m, _ in trained_on], old_stats))
        return metrics.reduce(run.data_parallel.sum, run.data_parallel.max)


def packed(run: Run, rollouts: list[Rollout], step: int) -> TrainBatch:
    """Advantages over the whole step, and this data-parallel rank's share of the step on the device."""
    config, groups = run.config, run.groups
    rewards = torch.tensor([rollout.reward for rollout in rollouts], dtype=torch.float64)
    prompt_ids = torch.tensor([rollout.prompt_id for rollout in rollouts])
    advantages = ADVANTAGES[config.algorithm.advantage](rewards, prompt_ids, config.algorithm)
    return pack(
        rollouts,
        advantages,
        config,
        step=step,
        **packing_options(groups, config.parallel),
    ).to(device.device())


def set_up(config: Config, groups: Groups, spans: Spans = OFF) -> Run:
    """Build the data, the policy (warm-started when asked) and the engine."""
    require_model(config)  # before anything slow
    shares_prompts(config)  # raises where this machine cannot, which a check on another one did not know
    grader = build_grader(config.reward)
    tokenizer = build_tokenizer(config)
    problems = load_prompts(config, tokenizer)
    benchmarks = load_benchmarks(config, tokenizer) if config.train.eval_every and config.eval.sets else []
    if groups.rank == 0:
        tell_unread_golds([prompt.answer for prompt in (*problems.train, *problems.eval)], config.reward)
    raw_hf_config = read_hf_config(config)
    raw_hf_config.setdefault("vocab_size", vocab_size(tokenizer))
    total_updates = config.train.num_steps * config.minibatches_per_step
    policy = MegatronPolicy(raw_hf_config, config, groups, total_updates=total_updates)
    world = Reducer(groups.world, device.device())
    place = Place(groups.rank, groups.world_size, launch.local_rank(), world.gather_objects)
    model_dir = config.run_dir / "engine_model"
    if config.rollout.engine != "transformers":
        if groups.rank == 0:
            write_model_dir(model_dir, policy, tokenizer)
        barrier(groups)
    engine = build_engine(config, EngineSetup(policy.hf_config, model_dir, device.device(), place))
    if config.warm_start is not None:
        warm_start(policy, problems.train, tokenizer)
    if config.loss.ref_kl_coef > 0:
        policy.keep_reference()
    cursor = PromptCursor(problems.train, config.seed)
    run: Run
    collector = Collector(engine, cursor, grader, tokenizer, config, place, lambda: revive(run), spans)
    run = Run(
        config=config,
        groups=groups,
        world=world,
        data_parallel=Reducer(groups.dp, device.device()),
        tokenizer=tokenizer,
        policy=policy,
        engine=engine,
        collector=collector,
        eval_prompts=problems.eval,
        evaluator=Evaluator(lambda: engine, grader, tokenizer, config, place, revive=lambda: revive(run)),
        benchmarks=benchmarks,
        data_digest=data_digest(problems.train),
    )
    return run


@contextlib.contextmanager
def generating(run: Run, timers: Timers) -> Iterator[None]:
    """Around generation: the engine has its memory and the current weights; with `rollout.server.share_memory` the
    trainer's gradients and optimizer state are on the host meanwhile."""
    share_memory = run.config.rollout.server.share_memory
    with timers("sync"):
        if share_memory:
            run.policy.offload()
            with contextlib.suppress(ServersLost):  # the update restarts what died asleep
                run.engine.wake()
        sync_weights(run)
    yield
    with timers("sync"):
        if share_memory:
            run.engine.sleep()
            run.engine_version = -1
            run.policy.reload()


def sync_weights(run: Run) -> None:
    """Give the engine the current weights, unless it has them, and prove that it serves them.

    Raises: EngineError when more servers died than the config allows, or one serves other weights than it was sent.
    """
    tries = 0
    while run.engine_version != run.weight_version:
        try:
            run.engine.update_weights(run.policy.hf_weights(), run.weight_version)
            if run.config.rollout.engine != "transformers":
                probe_engine(run.engine, run.policy, run.world, run.collector.cursor.prompts)
            run.engine_version = run.weight_version
        except ServersLost as error:  # the next update restarts the dead, or ends the run when too many died
            tries += 1
            if tries > run.config.rollout.server.max_failures + 1:  # they live, and yet the connection breaks
                raise
            if run.groups.rank == 0:
                print(f"weights again, because a server was lost: {error}", flush=True)


def revive(run: Run) -> None:
    """After servers died in generation: restart them, and send the weights again."""
    run.engine_version = -1
    sync_weights(run)


def evaluate(run: Run, step: int, timers: Timers) -> dict[str, float]:
    """Held-out accuracy, and that on benchmarks, after this step's updates, when due (and after the last step)."""
    every, last = run.config.train.eval_every, run.config.train.num_steps - 1
    if not every or ((step + 1) % every and step != last):
        return {}
    with generating(run, timers), timers("eval"):
        # without either, the collector says what to set
        held_out = run.collector.evaluate(run.eval_prompts) if run.eval_prompts or not run.benchmarks else {}
        return held_out | evaluate_sets(run.evaluator, run.benchmarks, run.config, step + 1, run.world)


def rescue(run: Run, store: CheckpointStore, step: int, logger: RunLogger) -> None:
    """The engine failed for good in this step: save what the steps before it reached, unless it is saved already.

    Engines fail before a step's first update, or in the evaluation after its last, so that the weights are whole.
    """
    newest = run.world.gather_objects(store.newest())[0]
    if run.weight_version > 0 and newest != store.path(run.weight_version):
        cursor = run.collector.resume_point if run.weight_version == step else run.collector.cursor_state()
        store.save(run.weight_version, saved_state(run, cursor), is_best=False)
        store.finish()
        logger.message(f"the rollout engine failed in step {step + 1}; saved after {run.weight_version} steps")
        run.world.any(False)  # a rank that leaves ends the others: not before rank 0 has said it


def checkpoint(run: Run, store: CheckpointStore, step: int, accuracy: float | None, *, stopping: bool) -> None:
    """Save after this step when it is due: every save_every steps, when stopping, at the end, and with keep_best when
    this step's evaluation has a higher `accuracy` than all before it."""
    train = run.config.train
    store.finish(wait=False)
    is_best = accuracy is not None and accuracy > run.best_accuracy
    if accuracy is not None and is_best:
        run.best_accuracy = accuracy
    due = train.save_every and (step + 1) % train.save_every == 0
    last = step + 1 == train.num_steps
    if due or stopping or (last and train.save_final) or (is_best and train.keep_best):
        state = saved_state(run, run.collector.cursor_state())
        store.save(step + 1, state, is_best=is_best and train.keep_best)


def saved_state(run: Run, cursor: dict[str, int]) -> dict[str, Any]:
    """What a checkpoint keeps besides the policy."""
    return {
        "cursor": cursor,
        "weight_version": run.weight_version,
        "best_accuracy": run.best_accuracy,
        "data_digest": run.data_digest,
        "control": run.control,
        "law": run.law.state(),
    }


def restore(run: Run, store: CheckpointStore) -> tuple[int, list[str]]:
    """Continue from the checkpoint that train.resume asks for: (the first step, what the user should know).

    The reference policy is not restored: `set_up` built it, from the same initial weights as ever.
    Raises: UserError when the run in the folder, or the checkpoint's config, is not one to go on from.
    """
    config = run.config
    path = checkpoint_to_resume(config, run.world.gather_objects(store.newest())[0])
    if path is None:
        return 0, []
    own = path.parent == store.folder
    notes = check_drift(path, config, run.policy.hf_config, own=own)
    step, state = store.load(path)
    same_data = state["data_digest"] == run.data_digest and state["cursor"]["seed"] == config.seed
    if same_data:
        run.collector.cursor.restore(state["cursor"])
    elif own:
        raise UserError(
            f"cannot go on from {path}: the training problems are not those of its run, though data and seed read the "
            f"same; restore them, or choose another name with train.resume={path}"
        )
    else:
        notes.append(f"other problems or another seed than {path}: they are drawn from the start")
    if own:
        run.best_accuracy = state["best_accuracy"]
        run.law = LawMonitor(**state["law"])
    run.control = state["control"]
    run.weight_version = state["weight_version"]
    return step, [*notes, f"continuing from {path}, {step} steps"]


def batch_totals(run: Run, batch: TrainBatch, rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Tokens of the step over all ranks, and this rank's packing. `batch/tokens` are the positions computed: padding
    counts, a shared prompt once; `batch/sequence_tokens` are those of the samples, prompt and response each."""
    tokens, pairs, positions, response_tokens = run.data_parallel.sum(computed(batch)).tolist()
    return {
        "batch/tokens": float(positions),
        "batch/response_tokens": float(response_tokens),
        "batch/sequence_tokens": float(sum(len(rollout.token_ids) for rollout in rollouts)),
        "packing/computed_tokens": float(tokens),
        "packing/attention_pairs": float(pairs),
        "memory/peak_bytes": float(device.peak_memory_bytes()),
        **packing_metrics(batch),
    }
