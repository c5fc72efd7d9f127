"""Seconds of one RL step, phase by phase.

Work is counted and divided by data-sheet peaks; a few constants, fitted to published measurements
(scripts/fit_planner.py), say how far from the peaks real programs stay. Nothing here was measured on this project's own
runs. Bytes on their way (gradients and weights among trainers, weights to the engines, state to the host) are divided
by data-sheet bandwidths and not fitted, as published rows do not tell these apart: lower bounds.
"""

import json
import math
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any

from megatron_rl.config import Config
from megatron_rl.models.hardware import Hardware
from megatron_rl.plan import shapes
from megatron_rl.plan.activations import Passes, layer_activations
from megatron_rl.plan.memory import stages
from megatron_rl.plan.shapes import ModelShape, Spread


@dataclass(frozen=True, slots=True)
class Constants:
    """Seconds taken over seconds at the data sheet's peak, per kind of work; `constants.json` holds the fitted ones."""

    matrix: float  # matrix products
    attention: float
    elementwise: float  # norms, activations, rotations, the vocabulary statistics: bound by memory
    tp_link: float  # tensor parallelism's collectives, what computation does not hide
    forward: float  # a forward-only pass against the forward part of an update
    decode: float  # reading weights and cache while generating
    token_seconds: float  # of one decoding step, seconds, whatever it reads: scheduling, launches, sampling


# Latency of one small all-reduce within a node, which no further GPU shortens. Assumed.
ALL_REDUCE_SECONDS = 10e-6


# what scripts/fit_planner.py wrote
_FITTED = json.loads(resources.files("megatron_rl.plan").joinpath("data/constants.json").read_text())
FITTED = Constants(**_FITTED["constants"])
# relative errors (median, worst, fractions) by kind: training, forward, step, memory, cpu_memory
SCORES: dict[str, dict[str, Any]] = _FITTED["scores"]


@dataclass(frozen=True, slots=True)
class PassSeconds:
    """Seconds at the peaks, on the slowest pipeline stage of one rank, before the bubble."""

    matrix: float
    attention: float
    elementwise: float
    tp_link: float

    def seconds(self, constants: Constants) -> float:
        """Return the seconds, weighted by what real programs reach."""
        return sum(getattr(self, field.name) * getattr(constants, field.name) for field in fields(self))


def pass_work(
    shape: ModelShape, layout: Spread, hardware: Hardware, tokens: float, context: float, *, backward: bool
) -> PassSeconds:
    """Return the work of a pass over a data-parallel rank's `tokens`, which attend to `context` tokens on average.

    A backward pass costs twice its forward (flash attention's 2.5 times, as it computes the scores anew), and full
    recomputation one forward of the layers more. Elementwise work reads and writes what a layer keeps. Tensor
    parallelism moves four times the hidden states a layer and pass. Context parallelism moves the other ranks' keys and
    values a layer and pass, twice as much backward; hiding that behind the attention is not counted on.
    Source: arXiv 2104.04473 (operations), 2307.08691 (attention), 2205.05198, section 4.2 (collectives).
    """
    split, again = layout.tp * layout.cp, float(backward and layout.recompute == "full")
    passes = 3.0 if backward else 1.0
    layer_matrix, output_matrix = shapes.matrix_parameters(shape)
    matrix = 2.0 * tokens * (layer_matrix * layout.share() * (passes + again) + output_matrix * passes) / split
    _, flops = shapes.forward_flops(shape, context)
    attention_passes = 1.0 + (2.5 + (layout.recompute != "none") if backward else 0.0)
    attention = tokens * flops * layout.share() / split * attention_passes
    one = Passes(1, 1, 2)
    layers = shape.layers * layout.share()  # of the slowest stage
    kept = layers * layer_activations(shape, layout, one) * layout.cp * (passes + again)
    logits = shape.vocab / layout.tp * one.element_bytes * passes
    moved = 2.0 * tokens / layout.cp * (kept + logits)
    link = 4.0 * tokens / layout.cp * layers * shape.hidden * one.element_bytes * (layout.tp - 1) / layout.tp
    others = tokens * (layout.cp - 1) / layout.cp * layers
    keys = others * 2.0 * shape.groups * shape.head_dim / layout.tp * one.element_bytes
    wire = hardware.node_link if split <= hardware.gpus_per_node else hardware.network
    times = 2.0 + again if backward else 1.0
    return PassSeconds(
        matrix / hardware.flops,
        attention / hardware.flops,
        moved / hardware.bandwidth,
        link * times / hardware.node_link + keys * (times + float(backward)) / wire,
    )


def pass_seconds(
    shape: ModelShape,
    layout: Spread,
    hardware: Hardware,
    constants: Constants,
    *,
    tokens: float,
    context: float,
    micro_batches: float,
    backward: bool,
) -> float:
    """Return the seconds of one pipelined pass over a data-parallel rank's tokens, bubble included."""
    work = pass_work(shape, layout, hardware, tokens, context, backward=backward).seconds(constants)
    return work * (1.0 + shapes.bubble(layout, micro_batches)) * (1.0 if backward else constants.forward)


@dataclass(frozen=True, slots=True)
class Generation:
    """One engine's share of a generation batch; lengths in tokens."""

    sequences: float
    tp: int
    prompt: float
    response: float  # mean
    limit: int
    pool_bytes: float  # of all its GPUs, for the key-value cache
    most_together: float  # requests in flight
    samples_per_prompt: int  # whose prompt is read once
    element_bytes: int = 2


def generation_seconds(shape: ModelShape, hardware: Hardware, constants: Constants, load: Generation) -> float:
    """Return the seconds from the first prompt to the end of the longest response.

    A token's step reads the weights once and the cache of all sequences in flight, or multiplies, whichever lasts
    longer. While more sequences wait than fit, the engine is full; then it drains, and its last steps serve few
    sequences. Lengths are exponential, cut at the limit, with the given mean. Source: the roofline of Pope et al.,
    arXiv 2211.05102, section 2.
    """
    cache = shapes.kv_bytes_per_token(shape, load.element_bytes) * max(1.0, load.tp / shape.groups)
    reach = load.prompt + load.response
    together = max(1.0, min(load.sequences, load.most_together, load.pool_bytes / (cache * reach)))

    def step(active: float, context: float) -> float:
        dense, attention = shapes.forward_flops(shape, context)
        read = load.element_bytes * shapes.parameters(shape) + active * context * cache
        multiply = active * (dense * constants.matrix + attention * constants.attention) / hardware.flops
        split = max(read / hardware.bandwidth * constants.decode, multiply) / load.tp
        return split + constants.token_seconds + (2 * shape.layers * ALL_REDUCE_SECONDS if load.tp > 1 else 0.0)

    dense, attention = shapes.forward_flops(shape, load.prompt / 2)
    prompts = load.sequences / load.samples_per_prompt * load.prompt
    prefill = prompts * (dense * constants.matrix + attention * constants.attention) / hardware.flops / load.tp
    full = (load.sequences - together) / together * load.response * step(together, load.prompt + load.response / 2)
    scale, parts = _cut_exponential(load.response, load.limit), 50
    width = load.limit / parts
    drain = 0.0
    for part in range(parts):
        position = (part + 0.5) * width
        alive = together * math.exp(-position / scale)
        if alive >= 0.5:  # else the longest response has probably ended
            drain += width * step(alive, load.prompt + position)
    return prefill + full + drain


def _cut_exponential(mean: float, limit: float) -> float:
    """Return the scale m of an exponential that, cut at `limit`, averages `mean`: m (1 - e^(-limit / m)) = mean."""
    low, high = mean / 2, 1e4 * limit
    for _ in range(100):
        middle = math.sqrt(low * high)
        if middle * -math.expm1(-limit / middle) < mean:
            low = middle
        else:
            high = middle
    return low


def data_link(layout: Spread, hardware: Hardware) -> float:
    """Return a rank's bytes/s in a data-parallel collective: a node's ranks in one ring share its network ports."""
    inner = layout.tp * layout.cp
    if inner * layout.dp <= hardware.gpus_per_node:
        return hardware.node_link
    together = max(1, hardware.gpus_per_node // layout.tp)
    return min(hardware.node_link, hardware.network * together)


def optimizer_seconds(shape: ModelShape, layout: Spread, hardware: Hardware, width: int) -> float:
    """Return the seconds of one update: reduce-scatter of float32 gradients, Adam, all-gather of weights; no overlap.

    Adam reads a gradient and reads and writes weight and two moments, all float32, and writes the model's weight.
    Source: ring collectives move (n - 1) / n of the bytes; arXiv 1910.02054, section 7.
    """
    slowest = 0.0
    for held in stages(shape, layout, 128).values():
        parts = ((held.dense, layout.shards), (held.experts, layout.expert_shards))
        moved = sum((4.0 + width) * count * (ranks - 1) / ranks for count, ranks in parts)
        adam = sum((4.0 + 24.0 + width) * count / ranks for count, ranks in parts)
        slowest = max(slowest, moved / data_link(layout, hardware) + adam / hardware.bandwidth)
    return slowest


def sync_seconds(config: Config, shape: ModelShape, layout: Spread, hardware: Hardware) -> float:
    """Return the seconds of one weight update: every rank gathers the whole model, over tensor ranks within a node and
    pipeline stages across nodes, bucket after bucket, then an engine copies it; with shared memory the trainer's state
    moves to the host and back."""
    width = shapes.width_of(config.model)
    model = width * shapes.parameters(shape)
    spread = layout.gpus > hardware.gpus_per_node
    seconds = model * (layout.tp - 1) / layout.tp / hardware.node_link
    if layout.pp > 1:
        seconds += model * (layout.pp - 1) / layout.pp / (hardware.network if spread else hardware.node_link)
    server = config.rollout.server
    if config.rollout.is_embedded:
        return seconds + 2 * model / hardware.bandwidth
    if config.rollout.weight_sync.mode == "colocated":
        seconds += 2 * model / server.tp / hardware.bandwidth
    elif config.rollout.weight_sync.mode == "disaggregated":
        seconds += model / hardware.network
    if server.share_memory and width == 2:
        held = max(stages(shape, layout, 128).values(), key=lambda held: held.total)
        state = 12.0 * (held.dense / layout.shards + held.experts / layout.expert_shards)
        seconds += 2 * state / hardware.host_link
    return seconds
