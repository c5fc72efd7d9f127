"""What `megatron-rl train --check` prints: processes, batches, updates and model size; then what the policy is asked.

The plan imports neither torch nor Megatron, so that it answers at once; the first prompt takes a few seconds.
"""

import math
from typing import Any

from rich.table import Table
from rich.text import Text

from megatron_rl.algorithms.policy_loss import PolicyLoss
from megatron_rl.config import AlgorithmConfig, Config, ModelConfig
from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.models.facts import model_folder_fault, read_hf_config
from megatron_rl.plan.shapes import count_parameters, layout_of


def check_table(title: str, rows: list[tuple[str, str]]) -> Table:
    """Return the rows as a table for the terminal."""
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(name, Text(text))
    return table


def plan_rows(config: Config) -> list[tuple[str, str]]:
    """Return the rows of the plan, (what, value), in reading order."""
    parallel, train, samples = config.parallel, config.train, config.rollout.samples_per_prompt
    longest, sequences = config.max_sequence_tokens, train.prompts_per_step * samples  # tokens; of a step
    per_rank = math.ceil(train.prompts_per_minibatch * samples / parallel.dp)
    most_micro_batches = math.ceil(per_rank / max(1, train.micro_batch_tokens // longest))
    step = (
        f"{train.prompts_per_step} prompts x {samples} samples = {sequences} sequences, "
        f"at most {sequences * longest:,} tokens"
    )
    update = (
        f"{train.prompts_per_minibatch} prompts = {train.prompts_per_minibatch * samples} sequences; "
        f"at most {per_rank} on a data-parallel rank"
    )
    micro = (
        f"1 to about {most_micro_batches} per update and rank, "
        f"of at most {train.micro_batch_tokens:,} tokens (longest sequence {longest:,})"
    )
    updates = config.minibatches_per_step
    return [
        ("processes", f"{parallel.processes} ({layout_of(config).text()})"),
        ("model", _model_text(config.model)),
        ("data", f"{config.data.type}, reward {config.reward.function}"),
        ("warm start", f"{config.warm_start.steps} supervised updates" if config.warm_start else "none"),
        ("step", step),
        ("update", update),
        ("updates", f"{updates} per step x {train.num_steps} steps = {train.num_steps * updates:,}"),
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


def _loss_text(loss: PolicyLoss) -> str:
    options = loss.model_dump(exclude={"type", "aggregation"}, exclude_none=True)
    shown = [f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in options.items()]
    return f"{loss.type}, {loss.aggregation}; {', '.join(shown)}"


def _short(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return str(count)


def preview_rows(config: Config) -> list[tuple[str, str]]:
    """Read all problems and return the first prompt, token by token as training encodes it, and what ends a response:
    (what, value) in reading order. A recipe can be checked where its model is not: then the one row says so.

    Raises: DataError when the tokenizer, its template or a problem cannot be used.
    """
    from megatron_rl.data.problems import load_prompts  # transformers, and torch with it
    from megatron_rl.data.tokenizer import build_tokenizer, stop_token_ids

    data, path = config.data, config.model.path
    if data.type == "jsonl" and data.tokenizer is None and path is not None and (fault := model_folder_fault(path)):
        return [("prompt", f"not shown, and the data not read: model.path={fault}")]
    tokenizer = build_tokenizer(config)
    problems, stops = load_prompts(config, tokenizer), stop_token_ids(config, tokenizer)
    first = problems.train[0]

    def decode(token_ids: Any) -> str:
        return tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    return [
        ("problems", f"{len(problems.train):,} for training, {len(problems.eval):,} held out"),
        (f"prompt ({len(first.token_ids)} tokens)", decode(first.token_ids)),
        ("answer", first.answer),
        ("a response ends at", ", ".join(f"{decode([stop])} ({stop})" for stop in stops) or "its limit"),
    ]
