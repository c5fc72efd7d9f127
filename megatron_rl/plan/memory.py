"""Bytes of one rank, by phase and by part.

Every function takes shapes and counts; only `memory_of` reads a config.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_rl.config import Config
from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.models.hardware import (
    CHUNK_LOGITS,
    CPU_HEAP,
    CPU_PROCESS_BYTES,
    FILL,
    GATHER_BYTES,
    GIB,
    GPU_PROCESS_BYTES,
    SAMPLING_ENTRIES,
    Hardware,
)
from megatron_rl.plan.shapes import (
    ModelShape,
    RankParameters,
    Spread,
    kv_bytes_per_token,
    parameters,
    rank_parameters,
)

Parts = dict[str, float]  # part -> bytes


@dataclass(frozen=True, slots=True)
class Passes:
    """What the trainer runs: `tokens` of one micro-batch, and micro-batches of one update on a rank."""

    tokens: int
    micro_batches: int
    element_bytes: int  # of weights and activations: 2 or 4
    fused: bool = True  # Transformer Engine's layers; False: Megatron's local ones on a CPU


def layer_activations(shape: ModelShape, layout: Spread, passes: Passes) -> float:
    """Return the bytes that one layer keeps of one micro-batch for its backward pass, on a rank.

    Per token, in elements: the inputs of two norms and their outputs (4 h, split by tp under sequence parallelism),
    then, split by tp, queries, keys, values and the attention's output, and the MLP's two projections and their product
    (3 f); flash attention keeps one float32 per head instead of the scores. Norms of queries and keys keep their
    inputs. Without Transformer Engine the norms keep their scaled input as well (6 h), attention works on a padded copy
    and the gate's SiLU is a tensor of its own (4 f).
    Source: the method of Korthikanti et al., arXiv 2205.05198, section 4, counted anew for RMSNorm, grouped queries,
    gated MLPs and attention without stored scores (Dao, arXiv 2307.08691).
    """
    hidden, attention = shape.hidden, shape.heads * shape.head_dim
    norms = 4 * hidden if passes.fused else 6 * hidden
    inner = shape.qkv_width + (1 if passes.fused else 2) * attention
    inner += shape.qk_norm * (shape.heads + shape.groups) * shape.head_dim
    scores = 4.0 * shape.heads if layout.recompute == "none" else 0.0  # selective recomputes the core attention
    mlp: float = (shape.mlp_matrices if passes.fused else shape.mlp_matrices + 1) * shape.ffn
    if shape.moe_layers:
        mlp = shape.experts_per_token * (3 * shape.expert_ffn + 2 * hidden / (layout.tp // layout.expert_tp))
    elements = norms / (layout.tp if layout.sp else 1) + (inner + mlp) / layout.tp
    tokens = passes.tokens / layout.cp
    return tokens * (elements * passes.element_bytes + scores / layout.tp)


def layer_input(shape: ModelShape, layout: Spread, passes: Passes) -> float:
    """Return the bytes of one layer's input, all that full recomputation keeps. Source: arXiv 2205.05198, section 5."""
    return passes.tokens / layout.cp * shape.hidden * passes.element_bytes / (layout.tp if layout.sp else 1)


def working_set(shape: ModelShape, layout: Spread, passes: Passes) -> float:
    """Return the bytes of temporaries inside one layer: a forward's MLP, or the gradients of a backward's."""
    ffn = max(shape.ffn, shape.experts_per_token * shape.expert_ffn)
    return passes.tokens / layout.cp * passes.element_bytes * (shape.mlp_matrices * ffn / layout.tp + 2 * shape.hidden)


def in_flight(layout: Spread, micro_batches: int, stage: int) -> float:
    """Return the number of micro-batches whose activations a stage keeps at the peak of 1F1B, in units of all its
    layers.

    Source: arXiv 2104.04473, section 2.2; the interleaved schedule keeps (1 + (p - 1) / (p v)) times more on the first
    stage (arXiv 2205.05198, section 4.2.3).
    """
    depth = layout.pp - stage
    if layout.vpp > 1:
        return min(depth * (1 + (layout.pp - 1) / (layout.pp * layout.vpp)), micro_batches)
    return min(depth, micro_batches)


def training_activations(shape: ModelShape, layout: Spread, passes: Passes, stage: int) -> float:
    """Return the peak bytes of saved activations and temporaries on a stage, without the logits."""
    layers = shape.layers / layout.pp * in_flight(layout, passes.micro_batches, stage)
    whole = layer_activations(shape, layout, passes)
    if layout.recompute == "full":
        kept = layers * layer_input(shape, layout, passes) + whole
    else:
        kept = layers * whole
    return kept + working_set(shape, layout, passes)


def logits_bytes(shape: ModelShape, layout: Spread, passes: Passes) -> float:
    """Return the bytes of one `[T, V / tp]` in the model's dtype: statistics and gradient are computed in place
    (parallel/vocab.py)."""
    return passes.tokens / layout.cp * shape.vocab / layout.tp * passes.element_bytes


def _logits(shape: ModelShape, layout: Spread, passes: Passes) -> Parts:
    return {"logits": logits_bytes(shape, layout, passes)}


def _fused_logits(shape: ModelShape, layout: Spread, passes: Passes) -> Parts:
    """Return the bytes of a chunk of logits, and of the weight's gradient, which is summed over chunks in float32."""
    chunk = min(logits_bytes(shape, layout, passes), CHUNK_LOGITS * passes.element_bytes)
    return {"fused logits": chunk + 4.0 * shape.vocab / layout.tp * shape.hidden}


def state_parts(held: RankParameters, layout: Spread, element_bytes: int) -> Parts:
    """Return the bytes of weights, float32 gradients, and Adam's state spread over the data-parallel ranks.

    In bfloat16 Adam keeps float32 weights and two moments, 12 bytes a parameter; in float32 its weights are the
    model's.
    Source: Megatron-Core's distributed optimizer; Rajbhandari et al., arXiv 1910.02054, section 3.
    """
    adam = 8.0 if element_bytes == 4 else 12.0
    return {
        "weights": element_bytes * held.total,
        "gradients": 4.0 * held.total,
        "optimizer": adam * (held.dense / layout.shards + held.experts / layout.expert_shards),
    }


def stages(shape: ModelShape, layout: Spread, vocab_multiple: int) -> dict[int, RankParameters]:
    """Return the stages that can be the fullest: the first, which keeps most activations, and the last, with the
    logits."""
    last = layout.pp - 1
    return {
        stage: rank_parameters(shape, layout, first=stage == 0, last=stage == last, vocab_multiple=vocab_multiple)
        for stage in {0, last}
    }


def trainer_phases(
    shape: ModelShape, layout: Spread, passes: Passes, vocab_multiple: int, *, fuses: bool = False
) -> dict[str, Parts]:
    """Return the trainer's parts in each phase, on the stage that is fullest in training. Generation lists what stays.
    `fuses`: logits exist in chunks alone."""
    candidates = []
    for stage, held in stages(shape, layout, vocab_multiple).items():
        state = state_parts(held, layout, passes.element_bytes)
        logits = (_fused_logits if fuses else _logits)(shape, layout, passes) if stage == layout.pp - 1 else {}
        train = state | {"activations": training_activations(shape, layout, passes, stage)} | logits
        forward = layer_input(shape, layout, passes) + working_set(shape, layout, passes)
        phases = {
            "generation": dict(state),
            "weight sync": dict(state),
            "old logprobs": state | {"activations": forward} | logits,
            "training": train,
        }
        candidates.append((sum(train.values()), phases))
    return max(candidates, key=lambda candidate: candidate[0])[1]


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes by phase and part on the fullest rank, the room there is, and what is wrong without any phase being
    full."""

    phases: dict[str, Parts]
    room: float  # bytes that may be filled; infinite where nothing bounds them
    faults: tuple[str, ...] = ()

    def total(self, phase: str) -> float:
        """Return the bytes of a phase."""
        return sum(self.phases[phase].values())

    @property
    def peak(self) -> float:
        """Return the bytes of the fullest phase."""
        return max(map(self.total, self.phases))

    @property
    def fits(self) -> bool:
        """Return whether every phase fits and nothing else is wrong."""
        return self.peak <= self.room and not self.faults


def fuses_output_layer(config: Config, shape: ModelShape, layout: Spread, hardware: Hardware) -> bool:
    """Return whether the statistics compute the logits themselves, in chunks (model.fused_linear_stats): with `auto`,
    where a phase that holds the logits would not fit. They cost a product more, so not where all fits."""
    mode = config.model.fused_linear_stats
    apart = _memory_of(config, shape, layout, hardware, fuses=False)
    crowded = any("logits" in parts and apart.total(phase) > apart.room for phase, parts in apart.phases.items())
    return mode == "on" or (mode == "auto" and crowded)


def memory_of(config: Config, shape: ModelShape, layout: Spread, hardware: Hardware) -> Memory:
    """Return the memory of a run with this layout in place of the config's.

    Micro-batches count as full and responses as long as they may be. On a CPU the peak resident memory is predicted:
    the heap keeps what one phase freed while the next one fills other memory, so that there the phases add up.
    """
    return _memory_of(config, shape, layout, hardware, fuses=fuses_output_layer(config, shape, layout, hardware))


def _memory_of(config: Config, shape: ModelShape, layout: Spread, hardware: Hardware, *, fuses: bool) -> Memory:
    on_gpu = hardware.flops > 0
    width = 2 if config.model.dtype == "bfloat16" else 4
    passes = Passes(
        tokens=micro_batch_tokens(config, layout),
        micro_batches=update_micro_batches(config, layout),
        element_bytes=width,
        fused=on_gpu,
    )
    phases = trainer_phases(shape, layout, passes, 128 if on_gpu else 1, fuses=fuses)
    if config.optimizer.cpu_offload:
        for parts in phases.values():  # a GPU keeps the float32 weights; the host adds copies of them and the gradients
            parts["optimizer"] *= 4 / 12 if on_gpu else 20 / 12
    if config.loss.ref_kl_coef > 0:
        for parts in phases.values():
            parts["reference weights"] = 2 * parts["weights"]  # the copy, and the current ones while it is in use
    faults: tuple[str, ...] = ()
    if config.rollout.is_embedded:
        _add_replica(config, shape, layout, phases, width)
    elif on_gpu and not config.rollout.server.urls and config.rollout.weight_sync.mode == "colocated":
        faults = _add_servers(config, shape, phases, width, hardware)
    phases["weight sync"]["buckets"] = _gathered(config.rollout, shape, layout, width, on_gpu)
    if not on_gpu:
        parts = {part: max(p.get(part, 0.0) for p in phases.values()) for parts in phases.values() for part in parts}
        parts["activations"] *= CPU_HEAP
        room = FILL * hardware.memory if hardware.memory else math.inf
        return Memory({"whole run": parts | {"process": CPU_PROCESS_BYTES}}, room)
    for parts in phases.values():
        parts["process"] = GPU_PROCESS_BYTES
    return Memory(phases, FILL * hardware.memory, faults)


def micro_batch_tokens(config: Config, layout: Spread) -> int:
    """Return the tokens of the fullest micro-batch: the budget, or all that a rank has of an update or of a warm-start
    batch."""
    sequences = math.ceil(config.train.prompts_per_minibatch * config.rollout.samples_per_prompt / layout.dp)
    if config.warm_start is not None:
        sequences = max(sequences, math.ceil(config.warm_start.batch_size / layout.dp))
    return min(config.train.micro_batch_tokens, sequences * config.max_sequence_tokens)


def update_micro_batches(config: Config, layout: Spread) -> int:
    """Return the micro-batches of one update on a rank when every sequence is of the longest length."""
    sequences = math.ceil(config.train.prompts_per_minibatch * config.rollout.samples_per_prompt / layout.dp)
    return math.ceil(sequences / max(1, config.train.micro_batch_tokens // config.max_sequence_tokens))


def _gathered(rollout: RolloutConfig, shape: ModelShape, layout: Spread, width: int, on_gpu: bool) -> float:
    """Return the bytes of a weight update's buffers: a bucket over all tensor ranks, this rank's part of it as one
    piece, the largest weight joined from it; gloo gathers into a copy of its own. An embedding above the bound travels
    alone and needs no joining. Then the servers' buckets: one is loaded while the next is filled, and each holds a
    weight at least."""
    stage = width * parameters(shape) / layout.pp
    own_copy = not on_gpu and layout.tp > 1
    bucket = min(GATHER_BYTES, stage)
    embedding = min(stage, width * shape.vocab * shape.hidden)
    largest = embedding if embedding <= GATHER_BYTES else min(bucket, 2 * width * shape.ffn * shape.hidden)
    gathered = max(bucket * (1 + 1 / layout.tp + own_copy) + largest, embedding * (1 + own_copy))
    if rollout.is_embedded:
        return gathered
    bucket = min(rollout.weight_sync.bucket_mib * 2**20, width * parameters(shape))
    # on a CPU two buffers of one size take turns
    return gathered + max(bucket, embedding) + (bucket if on_gpu else max(bucket, embedding))


def _add_replica(config: Config, shape: ModelShape, layout: Spread, phases: dict[str, Parts], width: int) -> None:
    """Add the embedded engine: a whole model on every rank at all times; a cache and the sampler's float32 logits and
    four float64 copies while it generates."""
    sequences = math.ceil(config.train.prompts_per_step * config.rollout.samples_per_prompt / layout.gpus)
    together = min(sequences, config.rollout.batch_size)
    for parts in phases.values():
        parts["engine weights"] = width * parameters(shape)
    entries = together * shape.vocab
    phases["generation"]["KV cache"] = together * config.max_sequence_tokens * kv_bytes_per_token(shape, width)
    phases["generation"]["sampling"] = 4.0 * entries + 32.0 * min(entries, SAMPLING_ENTRIES)


def _add_servers(
    config: Config, shape: ModelShape, phases: dict[str, Parts], width: int, hardware: Hardware
) -> tuple[str, ...]:
    """Add servers on the trainer's GPUs, and return what is wrong with them: `memory_fraction` of each for weights and
    cache, released in training when they share the memory, and a process of their own. Then gradients are freed, and in
    bfloat16 the optimizer's state is on the host, during generation (MegatronPolicy.offload)."""
    server = config.rollout.server
    weights = width * parameters(shape) / server.tp
    pool = server.memory_fraction * hardware.memory
    awake = {"engine weights": weights, "KV cache": max(0.0, pool - weights), "engine process": GPU_PROCESS_BYTES}
    asleep = {"engine process": GPU_PROCESS_BYTES} if server.share_memory else awake
    for name, parts in phases.items():
        generating = name in ("generation", "weight sync")
        parts |= awake if generating else asleep
        if generating and server.share_memory:
            parts["gradients"] = 0.0
            parts["optimizer"] = 0.0 if width == 2 else parts["optimizer"]
    needed = weights + config.max_sequence_tokens * kv_bytes_per_token(shape, width) / min(server.tp, shape.groups)
    if pool >= needed:
        return ()
    return (
        f"a server's pool (rollout.server.memory_fraction {server.memory_fraction:g}) is {pool / GIB:.1f} GiB, its "
        f"weights and one sequence need {needed / GIB:.1f}; raise memory_fraction or rollout.server.tp",
    )
