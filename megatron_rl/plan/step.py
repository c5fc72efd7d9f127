"""The plan of one RL step: seconds by phase, throughput, utilisation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_rl.config import Config
from megatron_rl.models.hardware import GPU_PROCESS_BYTES, Hardware
from megatron_rl.plan.memory import Memory, cache_tokens, memory_of
from megatron_rl.plan.seconds import Constants, Generation, generation_seconds, pass_seconds
from megatron_rl.plan.shapes import ModelShape, Spread, bubble, forward_flops, kv_bytes_per_token, parameters, width_of
from megatron_rl.plan.transfer import optimizer_seconds, sync_seconds

# One answer's verification on a CPU core; the verifier math takes 0.1 to 5 ms.
REWARD_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class Load:
    """What a config does not say about its data: mean lengths in tokens, generation batches a step."""

    prompt: float
    response: float
    batches: float = 1.0  # dynamic sampling asks for more than one

    @property
    def length(self) -> float:
        """Return the tokens of a sequence."""
        return self.prompt + self.response


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of a run. Seconds are predictions of formulas fitted to other stacks' measurements."""

    layout: Spread
    memory: Memory
    seconds: dict[str, float]  # phase -> seconds; empty where no time is predicted
    tokens: float  # of a step, prompts and responses
    micro_batches: int  # of one update and rank
    bubble: float  # idle share of an update's work
    mfu: float  # of the updates, fraction of the data sheet's peak
    overlapped: bool  # generation runs beside training

    @property
    def total(self) -> float:
        """Return the seconds of a step."""
        if self.overlapped:
            generation = self.seconds["rollout"] + self.seconds["reward"]
            return max(generation, sum(self.seconds.values()) - generation)
        return sum(self.seconds.values())

    @property
    def tokens_per_gpu(self) -> float:
        """Return the tokens per second and GPU over the whole step."""
        return self.tokens / self.total / self.layout.gpus


def plan_step(
    config: Config, shape: ModelShape, layout: Spread, hardware: Hardware, constants: Constants, load: Load
) -> StepPlan:
    """Return the plan of a config, whose own layout `layout` may replace."""
    memory = memory_of(config, shape, layout, hardware)
    sequences = config.train.prompts_per_step * config.rollout.samples_per_prompt
    updates = config.minibatches_per_step
    tokens = sequences / updates / layout.dp * load.length  # of one update and data-parallel rank
    micro_batches = max(1, math.ceil(tokens / config.train.micro_batch_tokens))
    overlapped = config.rollout.max_staleness > 0
    if not hardware.flops:
        return StepPlan(layout, memory, {}, sequences * load.length, micro_batches, 0.0, 0.0, overlapped)
    context = load.length / 2

    def a_pass(backward: bool) -> float:
        return pass_seconds(
            shape,
            layout,
            hardware,
            constants,
            tokens=tokens,
            context=context,
            micro_batches=micro_batches,
            backward=backward,
        )

    forward, backward = a_pass(False), a_pass(True)
    chosen = updates - 1 if config.loss.needs_current_statistics else 0
    references = 2 if config.loss.ref_kl_coef > 0 else 1
    seconds = {
        "weight sync": sync_seconds(config, shape, layout, hardware),
        "rollout": load.batches * rollout_seconds(config, shape, layout, hardware, constants, load),
        "reward": load.batches * sequences * REWARD_SECONDS / layout.gpus,
        "old logprobs": updates * references * forward,
        "selection": chosen * forward,
        "forward and backward": updates * backward,
        "optimizer": updates * optimizer_seconds(shape, layout, hardware, width_of(config.model)),
    }
    if config.train.entropy_probe:
        seconds["entropy probe"] = forward
    flops = 3 * sum(forward_flops(shape, context)) * sequences * load.length
    mfu = flops / (layout.gpus * hardware.flops * (seconds["forward and backward"] + seconds["optimizer"]))
    total = sequences * load.length
    return StepPlan(layout, memory, seconds, total, micro_batches, bubble(layout, micro_batches), mfu, overlapped)


def rollout_seconds(
    config: Config, shape: ModelShape, layout: Spread, hardware: Hardware, constants: Constants, load: Load
) -> float:
    """Return the seconds of one generation batch. Servers that the run does not start count as as many as it would
    start."""
    width = width_of(config.model)
    sequences = config.train.prompts_per_step * config.rollout.samples_per_prompt
    server = config.rollout.server
    if config.rollout.is_embedded:
        engines, tp, together, share = layout.gpus, 1, config.rollout.batch_size, 1.0
    else:
        nodes = max(1, layout.gpus // hardware.gpus_per_node)
        engines, tp, together, share = nodes * server.count, server.tp, server.max_concurrency, server.memory_fraction
    pool = tp * (share * hardware.memory - GPU_PROCESS_BYTES) - width * parameters(shape)
    if (tokens := cache_tokens(config, shape, hardware)) is not None:
        pool = tokens * kv_bytes_per_token(shape, width)
    return generation_seconds(
        shape,
        hardware,
        constants,
        Generation(
            sequences=sequences / engines,
            tp=tp,
            prompt=load.prompt,
            response=load.response,
            limit=config.rollout.max_response_tokens,
            pool_bytes=max(0.0, pool),
            most_together=together,
            samples_per_prompt=config.rollout.samples_per_prompt,
            element_bytes=width,
        ),
    )
