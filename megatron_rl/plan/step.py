"""The plan of one RL step: seconds by phase, throughput, utilisation."""

import math
import random
import statistics
from dataclasses import dataclass
from functools import cache, partial

from megatron_rl.algorithms.balance import Work, deal
from megatron_rl.config import Config
from megatron_rl.models.facts import read_hf_config
from megatron_rl.models.hardware import GPU_PROCESS_BYTES, Hardware
from megatron_rl.plan import shapes
from megatron_rl.plan.memory import Memory, cache_tokens, memory_of
from megatron_rl.plan.seconds import (
    FITTED,
    Generation,
    generation_seconds,
    optimizer_seconds,
    pass_seconds,
    sync_seconds,
)
from megatron_rl.plan.shapes import ModelShape, Spread

# One answer's verification on a CPU core; the verifier math takes 0.1 to 5 ms.
REWARD_SECONDS = 0.01
_DEALT = 4  # mini-batches of drawn lengths: their mean number of micro-batches
_SPREAD = 0.6  # standard deviation of the logarithm of a response's length. Assumed.


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
    synced: float  # bytes of one weight update: the whole model
    tokens: float  # of a step, prompts and responses
    overlapped: bool  # generation runs beside training
    seconds: dict[str, float]  # phase -> seconds; empty where no time is predicted
    micro_batches: float = 0.0  # of one update and rank
    bubble: float = 0.0  # idle share of an update's work
    mfu: float = 0.0  # of the updates, fraction of the data sheet's peak

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


def plan_step(config: Config, hardware: Hardware, load: Load) -> StepPlan:
    """Return the plan of a config."""
    shape, layout = shapes.shape_of(read_hf_config(config.model), shapes.COUNTDOWN_VOCAB), shapes.layout_of(config)
    memory, constants = memory_of(config, shape, layout, hardware), FITTED
    width = shapes.width_of(config.model)
    sequences = config.train.prompts_per_step * config.rollout.samples_per_prompt
    updates, tokens = config.minibatches_per_step, sequences * load.length
    model, overlapped = width * shapes.parameters(shape), config.rollout.max_staleness > 0
    whole = partial(StepPlan, layout, memory, model, tokens, overlapped)
    if not hardware.flops:
        return whole({})
    micro_batches = dealt_micro_batches(config, load)

    sizes = {"tokens": tokens / updates / layout.dp, "context": load.length / 2, "micro_batches": micro_batches}
    forward, backward = (
        pass_seconds(shape, layout, hardware, constants, **sizes, backward=back) for back in (False, True)
    )
    algorithm, marks = config.algorithm, config.loss.statistics == "current"
    # of the steps: those that compute the old log-probabilities, which are the first mini-batch's statistics too
    recomputed = 1.0 if algorithm.old_logprobs == "recompute" else 1 / algorithm.old_logprobs_check_every
    chosen = updates - recomputed if marks else 0
    seconds = {
        "weight sync": sync_seconds(config, shape, layout, hardware),
        "rollout": load.batches * rollout_seconds(config, shape, layout, hardware, load),
        "reward": load.batches * sequences * REWARD_SECONDS / layout.gpus,
        "old logprobs": updates * (recomputed + (config.loss.ref_kl_coef > 0)) * forward,
        "selection": chosen * forward,
        "forward and backward": updates * backward,
        "optimizer": updates * optimizer_seconds(shape, layout, hardware, width),
    }
    if config.train.entropy_probe:
        seconds["entropy probe"] = forward * (1.0 if marks else recomputed)
    flops = 3 * sum(shapes.forward_flops(shape, load.length / 2)) * tokens
    mfu = flops / (layout.gpus * hardware.flops * (seconds["forward and backward"] + seconds["optimizer"]))
    return whole(seconds, micro_batches, shapes.bubble(layout, micro_batches), mfu)


def dealt_micro_batches(config: Config, load: Load) -> float:
    """Return the micro-batches of one update on a rank, a mean: lengths are drawn and dealt out as in training."""
    parallel = config.parallel
    sequences = config.train.prompts_per_minibatch * config.rollout.samples_per_prompt
    capacity = config.train.micro_batch_tokens // parallel.token_multiple * parallel.token_multiple
    multiple = 2 * parallel.cp if parallel.cp > 1 else 1  # each context-parallel rank has two chunks of a sequence
    lengths = _drawn_lengths(load, config.rollout.max_response_tokens, _DEALT * sequences, multiple)
    return dealt(lengths, capacity, parallel.dp, parallel.micro_batch_multiple)


@cache
def _drawn_lengths(load: Load, limit: int, count: int, multiple: int) -> tuple[int, ...]:
    """Return the tokens of sequences, the same at each call: the mean prompt, and a log-normal response, cut at the
    limit. (Seconds of generation take exponential ones, whose many short responses would fill every gap.)"""
    draw = random.Random(0)
    drawn = [draw.lognormvariate(0.0, _SPREAD) for _ in range(count)]
    scale = load.response / statistics.fmean(drawn)
    scale *= load.response / statistics.fmean(min(limit, scale * one) for one in drawn)  # the cut takes some
    lengths = (math.ceil(load.prompt + min(limit, scale * one)) for one in drawn)
    return tuple(-(-length // multiple) * multiple for length in lengths)


@cache  # a search asks for few kinds of layout again and again
def dealt(lengths: tuple[int, ...], capacity: int, ranks: int, multiple: int) -> float:
    """Return the micro-batches of a rank, a multiple of `multiple`: the mean over mini-batches of these `lengths`."""
    size = len(lengths) // _DEALT
    parts = (Work(dict(enumerate(lengths[size * part : size * (part + 1)]))) for part in range(_DEALT))
    return sum(len(deal(part, capacity, ranks, count_multiple=multiple)[0]) for part in parts) / _DEALT


def rollout_seconds(config: Config, shape: ModelShape, layout: Spread, hardware: Hardware, load: Load) -> float:
    """Return the seconds of one generation batch. Servers that run already count as as many as the run would start."""
    width = shapes.width_of(config.model)
    sequences = config.train.prompts_per_step * config.rollout.samples_per_prompt
    server = config.rollout.server
    if config.rollout.is_embedded:
        engines, tp, together, share = layout.gpus, 1, config.rollout.batch_size, 1.0
    else:
        nodes = max(1, layout.gpus // hardware.gpus_per_node)
        engines, tp, together, share = nodes * server.count, server.tp, server.max_concurrency, server.memory_fraction
    pool = tp * (share * hardware.memory - GPU_PROCESS_BYTES) - width * shapes.parameters(shape)
    if (tokens := cache_tokens(config, shape, hardware)) is not None:
        pool = tokens * shapes.kv_bytes_per_token(shape, width)
    generation = Generation(
        sequences=sequences / engines,
        tp=tp,
        prompt=load.prompt,
        response=load.response,
        limit=config.rollout.max_response_tokens,
        pool_bytes=max(0.0, pool),
        most_together=together,
        samples_per_prompt=config.rollout.samples_per_prompt,
        element_bytes=width,
    )
    return generation_seconds(shape, hardware, FITTED, generation)
