"""One RL step, top to bottom: `run_step`. The loss is three hops away: run_step -> MegatronPolicy.update -> its file in
algorithms/methods/.

Every rank runs this file. Decisions that all ranks must share are made on data that all ranks hold; what differs
between ranks is which micro-batches they compute.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_rl import device, launch
from megatron_rl.algorithms.advantages import ADVANTAGES
from megatron_rl.config import Config
from megatron_rl.config.checks import run_notes
from megatron_rl.convert.save_hf import save_hf
from megatron_rl.eval.during_training import evaluate_sets
from megatron_rl.metrics.spans import OFF, Spans
from megatron_rl.metrics.step import StepReport
from megatron_rl.metrics.write import RunLogger
from megatron_rl.packing import pack
from megatron_rl.packing.dealing import deal_step, hand_out
from megatron_rl.parallel.groups import Groups, destroy_groups
from megatron_rl.resume import Checkpoints
from megatron_rl.rollout.collect import CollectStopped
from megatron_rl.rollout.engine import EngineError
from megatron_rl.rollout.probe import check_mismatch
from megatron_rl.rollout.world import join
from megatron_rl.run import Run, set_up
from megatron_rl.types import CollectResult, Rollout, TrainBatch


def run_step(run: Run, step: int, logger: RunLogger) -> dict[str, float]:
    """Generate, grade, pack, select, update. Returns the step's metrics, the same on every rank."""
    config, policy, timers = run.config, run.policy, run.timers
    with run.served.session(timers), timers("rollout"):  # the engine is awake, and proven to have the current weights
        collected = run.collector.collect(step)
        run.collector.go_ahead(step)
    with timers("pack"):
        collected, batch = packed(run, collected, step)
    with timers("old_logprobs"):
        batch = policy.with_old_logprobs(batch)
        check_mismatch(batch, config, run.ranks)
    loss = run.controller.next_loss(batch)
    report = StepReport(run, step, collected, batch, loss)
    for mini_batch in batch.mini_batches:
        with timers("select"):
            mini_batch = policy.with_selection_stats(mini_batch, loss)
            mini_batch = loss.mark(mini_batch, run.ranks, seed=config.seed, step=step)
        with timers("update"):
            result = policy.update(mini_batch, loss, timers.spans)
        report.updated(mini_batch, result)
    run.served.weight_version = step + 1
    return report.finish(logger)


def packed(run: Run, collected: CollectResult, step: int) -> tuple[CollectResult, TrainBatch]:
    """Return the rollouts with the tokens of those that this rank computes, and these packed, on its device.

    Every rank deals them all out by their lengths; their tokens travel to the ranks that compute them. A collective.
    """
    deals = deal_step(collected.rollouts, run.layout)
    rollouts = hand_out(collected.rollouts, deals, run.layout, run.world)
    batch = pack(rollouts, advantages(rollouts, run.config), run.layout, step=step, deals=deals)
    return dataclasses.replace(collected, rollouts=rollouts), batch.to(device.device())


def advantages(rollouts: Sequence[Rollout], config: Config) -> Tensor:
    """Return `[B]` float64, one per rollout, estimated over the whole step."""
    rewards = torch.tensor([rollout.reward for rollout in rollouts], dtype=torch.float64)
    prompt_ids = torch.tensor([rollout.prompt_id for rollout in rollouts])
    return ADVANTAGES[config.algorithm.advantage](rewards, prompt_ids, config.algorithm)


def main(config: Config) -> None:
    """Train on the world that torchrun's environment describes."""
    groups = join(config)
    train(config, groups)
    groups.all_ranks.barrier()
    destroy_groups()


def train(config: Config, groups: Groups, spans: Spans = OFF) -> None:
    """Make all steps, from the start or from a checkpoint. `spans` sees where their time goes."""
    run = set_up(config, groups, spans)
    checkpoints = Checkpoints(run)
    start_step, notes = checkpoints.restore()
    if config.train.share_prompts == "auto":
        notes.insert(0, f"train.share_prompts=auto: {'on' if run.layout.share_prompts else 'off'}")
    if config.model.layers == "auto" and device.ON_GPU:
        notes.insert(0, f"model.layers=auto: {device.layers('auto')}")
    notes += run_notes(config) + run.beside.restore(start_step)
    with RunLogger(config.run_dir, config, rank=groups.rank, start_step=start_step) as logger:
        for note in notes:
            logger.message(note)
        if start_step >= config.train.num_steps:
            logger.message(
                f"nothing to train: {config.run_dir} has {start_step} steps and train.num_steps="
                f"{config.train.num_steps}; raise it to go on"
            )
        run.timers.restart()
        for step in spans.steps(range(start_step, config.train.num_steps)):
            try:
                metrics = run_step(run, step, logger)
                metrics |= run.law.observe(metrics.get("entropy/mean", math.nan), metrics["reward/accuracy"])
                metrics |= evaluate(run, step, logger)
            except EngineError as error:
                saved = checkpoints.rescue(step)
                if isinstance(error, CollectStopped):
                    logger.message(f"{error}, which is begun anew; the same command continues")
                    break
                if saved:
                    logger.message(f"an engine failed in step {step + 1}; saved after {saved} steps")
                    run.world.barrier()  # a rank that leaves ends the others: not before rank 0 has said it
                raise
            # before the checkpoint (whose time the next row tells): a process killed between the two then leaves a row
            # too many, which the next process drops, rather than one too few
            with spans("log"):
                logger.log(step, metrics | run.timers.collect(metrics["batch/sequence_tokens"]))
                stopping = run.world.any(launch.stop_requested(config.run_dir))
            with run.timers("checkpoint"):
                accuracy = metrics.get("eval/accuracy", metrics.get("eval/average"))
                checkpoints.save_when_due(step, accuracy, stopping=stopping)
            if stopping and step + 1 < config.train.num_steps:
                logger.message(f"stopped after step {step + 1} of {config.train.num_steps}; the same command continues")
                break
        else:
            if config.train.save_hf:
                save_hf(run.policy, run.tokenizer, config.run_dir / "hf")
                logger.message(f"the final model is in {config.run_dir / 'hf'}")
        checkpoints.finish()
        run.beside.wait(logger)
    run.close()


def evaluate(run: Run, step: int, logger: RunLogger) -> dict[str, float]:
    """Return held-out accuracy, and that on benchmarks, after this step's updates, when due (and after the last step).
    With eval.beside the benchmarks are only begun, and logged when they are done."""
    run.beside.look(logger)
    every, last = run.config.train.eval_every, run.config.train.num_steps - 1
    if not every or ((step + 1) % every and step != last):
        return {}
    beside = run.config.eval.beside
    if beside:
        with run.timers("eval"):
            run.beside.begin(step + 1, logger)
    if beside and not run.eval_prompts:
        return {}
    with run.served.session(run.timers), run.timers("eval"):
        # without either, the collector says what to set
        held_out = run.collector.evaluate(run.eval_prompts) if run.eval_prompts or not run.benchmarks else {}
        if beside:
            return held_out
        return held_out | evaluate_sets(run.evaluator, run.benchmarks, run.config, step + 1, run.world)
