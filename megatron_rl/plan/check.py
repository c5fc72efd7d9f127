"""The plan that `megatron-rl train --check` prints: processes, batches, updates, model size.

Imports neither torch nor Megatron, so that it answers at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rich.table import Table

from megatron_rl.config import AlgorithmConfig, Config, ModelConfig
from megatron_rl.config.loss import LossBase
from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.models.facts import read_hf_config
from megatron_rl.plan.shapes import count_parameters


@dataclass(frozen=True)
class BatchPlan:
    """Counts of one RL step; per-rank numbers are of one data-parallel rank."""

    sequences_per_step: int
    sequences_per_update: int
    updates_per_step: int
    longest_sequence: int  # tokens, prompt and response
    max_tokens_per_step: int  # when every sequence is of the longest length
    sequences_per_rank: int  # of one update; the largest share of any rank
    min_micro_batches: int  # of one update and rank, when all its sequences fit one micro-batch
    max_micro_batches: int  # when every sequence is of the longest length


def batch_plan(config: Config) -> BatchPlan:
    """Return the batch arithmetic of one step."""
    train, samples = config.train, config.rollout.samples_per_prompt
    longest = config.max_sequence_tokens
    per_update = train.prompts_per_minibatch * samples
    per_rank = math.ceil(per_update / config.parallel.dp)
    fit_longest = max(1, train.micro_batch_tokens // longest)
    return BatchPlan(
        sequences_per_step=train.prompts_per_step * samples,
        sequences_per_update=per_update,
        updates_per_step=config.minibatches_per_step,
        longest_sequence=longest,
        max_tokens_per_step=train.prompts_per_step * samples * longest,
        sequences_per_rank=per_rank,
        min_micro_batches=1,
        max_micro_batches=math.ceil(per_rank / fit_longest),
    )


def plan_table(config: Config) -> Table:
    """Return the plan as a table for the terminal."""
    table = Table(title=f"plan of {config.name}", show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in plan_rows(config):
        table.add_row(name, text)
    return table


def plan_rows(config: Config) -> list[tuple[str, str]]:
    """Return the rows of the plan, (what, value), in reading order."""
    parallel, train, batch = config.parallel, config.train, batch_plan(config)
    layout = f"tp {parallel.tp} x pp {parallel.pp} x dp {parallel.dp}"
    if parallel.vpp > 1:
        layout += f", {parallel.vpp} model chunks a stage"
    if parallel.cp > 1:
        layout += f", sequences over {parallel.cp}"
    if parallel.ep > 1:
        layout += f", experts over {parallel.ep}"
    if parallel.sp:
        layout += ", sequence parallel"
    if parallel.distributed_optimizer:
        layout += ", distributed optimizer"
    step = (
        f"{train.prompts_per_step} prompts x {config.rollout.samples_per_prompt} samples = "
        f"{batch.sequences_per_step} sequences, at most {batch.max_tokens_per_step:,} tokens"
    )
    update = (
        f"{train.prompts_per_minibatch} prompts = {batch.sequences_per_update} sequences; "
        f"at most {batch.sequences_per_rank} on a data-parallel rank"
    )
    micro = (
        f"{batch.min_micro_batches} to about {batch.max_micro_batches} per update and rank, "
        f"of at most {train.micro_batch_tokens:,} tokens (longest sequence {batch.longest_sequence:,})"
    )
    total = train.num_steps * batch.updates_per_step
    return [
        ("processes", f"{parallel.processes} ({layout})"),
        ("model", _model_text(config.model)),
        ("data", f"{config.data.type}, reward {config.reward.function}"),
        ("warm start", f"{config.warm_start.steps} supervised updates" if config.warm_start else "none"),
        ("step", step),
        ("update", update),
        ("updates", f"{batch.updates_per_step} per step x {train.num_steps} steps = {total:,}"),
        ("micro-batches", micro),
        ("rollout", _rollout_text(config.rollout)),
        ("advantage", _advantage_text(config.algorithm)),
        ("loss", _loss_text(config.loss)),
        (
            "optimizer",
            f"lr {config.optimizer.lr:g} {config.optimizer.schedule}, gradient clip {config.optimizer.clip_grad:g}",
        ),
        ("run folder", str(config.run_dir)),
    ]


def _model_text(model: ModelConfig) -> str:
    hf = read_hf_config(model)
    decoder, embeddings = count_parameters(hf)
    if embeddings:
        size = f"{_short(decoder + embeddings)} parameters, {_short(embeddings)} of them in embeddings"
    else:
        size = f"{_short(decoder)} parameters and the embeddings of the task's tokenizer"
    source = model.path or "random weights"
    return f"{hf['model_type']}, {hf['num_hidden_layers']} layers, {size}, {model.dtype}, from {source}"


def _rollout_text(rollout: RolloutConfig) -> str:
    cuts = [f"top_p {rollout.top_p:g}"] * (rollout.top_p < 1) + [f"top_k {rollout.top_k}"] * (rollout.top_k > 0)
    parts = [
        rollout.engine,
        f"temperature {rollout.temperature:g}",
        *cuts,
        f"at most {rollout.max_response_tokens} tokens",
    ]
    return ", ".join(parts)


def _advantage_text(algorithm: AlgorithmConfig) -> str:
    text, sampling = algorithm.advantage, algorithm.dynamic_sampling
    return f"{text}, dynamic sampling (at most {sampling.max_batches} batches)" if sampling.enabled else text


def _loss_text(loss: LossBase) -> str:
    options = loss.model_dump(exclude={"type", "aggregation"}, exclude_none=True)
    shown = [f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in options.items()]
    return f"{loss.type}, {loss.aggregation}; {', '.join(shown)}"


def _short(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return str(count)
