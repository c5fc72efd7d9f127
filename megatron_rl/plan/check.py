"""The plan that `megatron-rl train --check` prints: processes, batches, updates, model size.

Imports neither torch nor Megatron, so that it answers at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rich.table import Table

from megatron_rl.config import Config
from megatron_rl.models.facts import head_width, is_moe, num_experts, read_hf_config


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
    """The batch arithmetic of one step."""
    train, samples = config.train, config.rollout.samples_per_prompt
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
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


def count_parameters(config: Config) -> tuple[int, int]:
    """(in the decoder layers and the final norm, in the embedding and the output layer).

    By arithmetic on the Hugging Face config; the second is 0 when the vocabulary size is the tokenizer's to say.
    """
    hf = read_hf_config(config.model)
    kind, hidden, layers = hf["model_type"], hf["hidden_size"], hf["num_hidden_layers"]
    heads = hf["num_attention_heads"]
    groups = hf.get("num_key_value_heads") or heads
    head_dim = head_width(hf)
    qkv_width = (heads + 2 * groups) * head_dim
    attention = hidden * qkv_width + heads * head_dim * hidden
    if kind == "qwen2":
        attention += qkv_width
    elif hf.get("attention_bias", False):
        attention += qkv_width + hidden
    if kind in ("qwen3", "qwen3_moe"):
        attention += 2 * head_dim
    mlp = 3 * hidden * hf["intermediate_size"]
    if kind == "llama" and hf.get("mlp_bias", False):
        mlp += 2 * hf["intermediate_size"] + hidden
    mlps = layers * mlp
    if is_moe(hf):
        skipped, sparse_step = hf.get("mlp_only_layers") or [], hf.get("decoder_sparse_step", 1)
        num_moe = sum(layer not in skipped and (layer + 1) % sparse_step == 0 for layer in range(layers))
        expert_layer = (num_experts(hf) or 0) * (3 * hidden * hf["moe_intermediate_size"] + hidden)  # and its router
        mlps += num_moe * (expert_layer - mlp)
    decoder = layers * (attention + 2 * hidden) + mlps + hidden
    embeddings = hf.get("vocab_size", 0) * hidden * (1 if hf.get("tie_word_embeddings", False) else 2)
    return decoder, embeddings


def plan_table(config: Config) -> Table:
    """The plan as a table for the terminal."""
    table = Table(title=f"plan of {config.name}", show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in plan_rows(config):
        table.add_row(name, text)
    return table


def plan_rows(config: Config) -> list[tuple[str, str]]:
    """(what, value) in reading order."""
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
        ("model", _model_text(config)),
        ("data", f"{config.data.type}, reward {config.reward.function}"),
        ("warm start", f"{config.warm_start.steps} supervised updates" if config.warm_start else "none"),
        ("step", step),
        ("update", update),
        ("updates", f"{batch.updates_per_step} per step x {train.num_steps} steps = {total:,}"),
        ("micro-batches", micro),
        ("rollout", _rollout_text(config)),
        ("advantage", _advantage_text(config)),
        ("loss", _loss_text(config)),
        (
            "optimizer",
            f"lr {config.optimizer.lr:g} {config.optimizer.schedule}, gradient clip {config.optimizer.clip_grad:g}",
        ),
        ("run folder", str(config.run_dir)),
    ]


def _model_text(config: Config) -> str:
    hf = read_hf_config(config.model)
    decoder, embeddings = count_parameters(config)
    if embeddings:
        size = f"{_short(decoder + embeddings)} parameters, {_short(embeddings)} of them in embeddings"
    else:
        size = f"{_short(decoder)} parameters and the embeddings of the task's tokenizer"
    source = config.model.path or "random weights"
    return f"{hf['model_type']}, {hf['num_hidden_layers']} layers, {size}, {config.model.dtype}, from {source}"


def _rollout_text(config: Config) -> str:
    rollout = config.rollout
    cuts = [f"top_p {rollout.top_p:g}"] * (rollout.top_p < 1) + [f"top_k {rollout.top_k}"] * (rollout.top_k > 0)
    parts = [
        rollout.engine,
        f"temperature {rollout.temperature:g}",
        *cuts,
        f"at most {rollout.max_response_tokens} tokens",
    ]
    return ", ".join(parts)


def _advantage_text(config: Config) -> str:
    sampling = config.algorithm.dynamic_sampling
    text = config.algorithm.advantage
    return f"{text}, dynamic sampling (at most {sampling.max_batches} batches)" if sampling.enabled else text


def _loss_text(config: Config) -> str:
    loss = config.loss
    options = loss.model_dump(exclude={"type", "aggregation"}, exclude_none=True)
    shown = [f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in options.items()]
    return f"{loss.type}, {loss.aggregation}; {', '.join(shown)}"


def _short(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return str(count)
