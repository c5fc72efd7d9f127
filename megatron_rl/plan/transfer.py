"""Seconds that bytes are on their way: gradients and weights among trainers, weights to the engines, state to the host.

Data-sheet bandwidths, not fitted: published rows do not tell these apart. They are lower bounds.
"""

from __future__ import annotations

from megatron_rl.config import Config
from megatron_rl.models.hardware import Hardware
from megatron_rl.plan.memory import stages
from megatron_rl.plan.shapes import ModelShape, Spread, parameters, width_of


def data_link(layout: Spread, hardware: Hardware) -> float:
    """Return the bytes/s that each rank has for a data-parallel collective: the ranks of a node that are in one ring
    share their network ports."""
    inner = layout.tp * layout.cp
    if inner * layout.dp <= hardware.gpus_per_node:
        return hardware.node_link
    together = max(1, hardware.gpus_per_node // layout.tp)
    return min(hardware.node_link, hardware.network * together)


def optimizer_seconds(shape: ModelShape, layout: Spread, hardware: Hardware, width: int) -> float:
    """Return the seconds of one update: reduce-scatter of float32 gradients, Adam, all-gather of weights. Nothing
    overlaps them here.

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


def sync_bytes(shape: ModelShape, width: int) -> float:
    """Return the bytes of one weight update: the whole model."""
    return width * parameters(shape)


def sync_seconds(config: Config, shape: ModelShape, layout: Spread, hardware: Hardware) -> float:
    """Return the seconds of one weight update: every rank gathers the whole model, over tensor ranks within a node and
    pipeline stages across nodes, bucket after bucket, then an engine copies it; with shared memory the trainer's state
    moves to the host and back."""
    width = width_of(config.model)
    model = sync_bytes(shape, width)
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
