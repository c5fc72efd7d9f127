"""What a config allows and its user should know."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_rl.config.megatron_options import megatron_notes

if TYPE_CHECKING:
    from megatron_rl.config.sections import Config

PERCENTAGE = 0.02  # a fraction of that size, where it selects many tokens, was probably meant as a percentage
MANY_TOKENS = 1000


def run_notes(config: Config) -> list[str]:
    """Return the lines that a run says at its start, and `train --check` at its end."""
    notes = [*selection_notes(config), *megatron_notes(config)]
    if config.float32_logits and config.rollout.server.urls and not config.rollout.is_embedded:
        option = {"sglang": "--enable-fp32-lm-head", "vllm": """--hf-overrides '{"head_dtype": "float32"}'"""}
        notes.append(
            "the trainer's output layer gives float32 logits: the servers of rollout.server.urls need "
            f"{option[config.rollout.engine]}, or log-probabilities differ by bfloat16's rounding of theirs"
        )
    return notes


def selection_notes(config: Config) -> list[str]:
    """Return one line for each thing that keeps Clip-Cov or KL-Cov from selecting as intended, with its remedy."""
    loss, longest = config.loss, config.max_sequence_tokens
    if loss.type not in ("clip_cov", "kl_cov"):
        return []
    notes = []
    if loss.type == "kl_cov" and config.minibatches_per_step == 1:
        notes.append(
            "loss.type=kl_cov with one mini-batch per step: the update is on-policy, so |logprobs - old_logprobs| is 0 "
            "and its gradient vanishes; KL-Cov then does nothing. Lower train.prompts_per_minibatch to get several "
            "updates a step"
        )
    sequences = config.train.prompts_per_minibatch * config.rollout.samples_per_prompt
    least = 2 * config.parallel.dp * config.parallel.micro_batch_multiple
    lone = "a micro-batch may hold one sequence, whose tokens share one advantage, so that their covariance is 0"
    if loss.cov_scope == "microbatch" and config.train.micro_batch_tokens < 2 * longest:
        notes.append(
            f"loss.cov_scope=microbatch with train.micro_batch_tokens={config.train.micro_batch_tokens}: {lone}. Use "
            f"cov_scope=minibatch, or raise micro_batch_tokens to {2 * longest} or more, twice the longest sequence"
        )
    if loss.cov_scope == "microbatch" and sequences < least:
        notes.append(
            f"loss.cov_scope=microbatch with {sequences} sequences in a mini-batch (prompts_per_minibatch * "
            f"samples_per_prompt): {lone}. Use cov_scope=minibatch, or at least {least} sequences"
        )
    tokens = sequences * config.rollout.max_response_tokens
    selected = int(loss.select_fraction * tokens)
    if loss.select_fraction >= PERCENTAGE and selected > MANY_TOKENS:
        notes.append(
            f"loss.select_fraction={loss.select_fraction} selects up to {selected} of {tokens} tokens; it is a "
            "fraction, never a percentage: the paper's 0.2% is 0.002"
        )
    return notes
