"""Bytes of one rank, by phase and by part.

Every function takes shapes and counts; only `memory_of` reads a config.
"""

import math
from dataclasses import dataclass, field, replace

from megatron_rl.config import Config
from megatron_rl.config.rollout import RolloutConfig
from megatron_rl.errors import ConfigError
from megatron_rl.models import hardware as machine
from megatron_rl.models.hardware import Hardware
from megatron_rl.plan import shapes
from megatron_rl.plan.activations import Parts, Passes, gather_buffer, pass_parts
from megatron_rl.plan.shapes import ModelShape, RankParameters, Spread


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


def host_parts(config: Config, shape: ModelShape, layout: Spread, width: int, ranks: int) -> Parts:
    """Return the most bytes that a node's `ranks` with GPUs and their engines hold in the host's memory: the
    optimizer's state, where it is moved or kept there, and in a save what each rank writes of weights and state, 14 or
    16 bytes a parameter, dealt out over the ranks that share a weight."""
    dealt = replace(layout, distributed_optimizer=True)
    held = max(stages(shape, layout, 128).values(), key=lambda candidate: candidate.total)
    optimizer, server = state_parts(held, layout, width)["optimizer"], config.rollout.server
    if config.optimizer.cpu_offload:
        moved = optimizer * 16 / 12
    else:
        moved = optimizer if server.share_memory and width == 2 else 0.0
    written = (14.0 if width == 2 else 16.0) * (held.dense / dealt.shards + held.experts / dealt.expert_shards)
    programs = 1 if config.rollout.is_embedded else 2
    parts = {"processes": programs * machine.HOST_PROCESS_BYTES, "optimizer": moved, "checkpoint": written}
    return {name: ranks * size for name, size in parts.items()}


def stages(shape: ModelShape, layout: Spread, vocab_multiple: int) -> dict[int, RankParameters]:
    """Return the stages that can be the fullest: the first (activations), the last (logits); of unequal ones any."""
    numbers = range(layout.pp) if layout.stage_layers else {0, layout.pp - 1}
    return {stage: shapes.rank_parameters(shape, layout, stage, vocab_multiple=vocab_multiple) for stage in numbers}


def trainer_phases(shape: ModelShape, layout: Spread, passes: Passes, vocab_multiple: int) -> dict[str, Parts]:
    """Return the trainer's parts in each phase, on the stage that is fullest in it. Generation lists what stays."""
    by_stage: list[dict[str, Parts]] = []
    largest = shape.hidden * max(shape.vocab, (shape.mlp_matrices - 1) * shape.ffn) / layout.tp  # weight of a rank
    for stage, held in stages(shape, layout, vocab_multiple).items():
        state = state_parts(held, layout, passes.element_bytes)
        if buffer := gather_buffer(shape, layout, passes, stage):
            state["gather buffer"] = buffer
        save = state | {"gradients": 0.0, "border weight": 4.0 * largest}
        passing = {name: state | parts for name, parts in pass_parts(shape, layout, passes, stage).items()}
        by_stage.append({"generation": state, "weight sync": state, **passing, "checkpoint": save})
    return {
        name: max((phases[name] for phases in by_stage), key=lambda parts: sum(parts.values())).copy()
        for name in by_stage[0]
    }


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes by phase and part on the fullest rank, the room there is, and what is wrong without a full phase."""

    phases: dict[str, Parts]
    room: float  # bytes that may be filled; infinite where nothing bounds them
    faults: tuple[str, ...] = ()
    cache_tokens: int | None = None  # of a server's key-value cache, where it shares the trainer's GPUs
    host: Parts = field(default_factory=dict)  # of a node's memory, at most at once; empty without GPUs

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
    apart = _memory_of(config, shape, layout, hardware, chunked=False)
    crowded = any("logits" in parts and apart.total(phase) > apart.room for phase, parts in apart.phases.items())
    return mode == "on" or (mode == "auto" and crowded)


def memory_of(config: Config, shape: ModelShape, layout: Spread, hardware: Hardware) -> Memory:
    """Return the memory of a run with this layout in place of the config's.

    Micro-batches count as full and responses as long as they may be. On a CPU the peak resident memory is predicted:
    the heap keeps what one phase freed while the next one fills other memory, so that there the phases add up.
    """
    return _memory_of(config, shape, layout, hardware, chunked=fuses_output_layer(config, shape, layout, hardware))


def _memory_of(config: Config, shape: ModelShape, layout: Spread, hardware: Hardware, *, chunked: bool) -> Memory:
    on_gpu = hardware.flops > 0
    width = shapes.width_of(config.model)
    passes = Passes(
        tokens=micro_batch_tokens(config, layout),
        micro_batches=update_micro_batches(config, layout),
        element_bytes=width,
        float32_logits=config.float32_logits,
        chunked=chunked,
        on_gpu=on_gpu,
        engine=on_gpu and hardware.has_engine and config.model.layers != "torch",
    )
    phases = trainer_phases(shape, layout, passes, 128 if on_gpu else 1)
    if config.optimizer.cpu_offload:
        for parts in phases.values():  # a GPU keeps the float32 weights; the host adds copies of them and the gradients
            parts["optimizer"] *= 4 / 12 if on_gpu else 20 / 12
    if config.loss.ref_kl_coef > 0:
        for parts in phases.values():
            parts["reference weights"] = 2 * parts["weights"]  # the copy, and the current ones while it is in use
    faults: tuple[str, ...] = ()
    if config.rollout.is_embedded:
        _add_replica(config, shape, layout, phases, width)
    elif (tokens := cache_tokens(config, shape, hardware)) is not None:
        _add_servers(config, shape, phases, width, tokens)
        faults = () if tokens >= config.max_sequence_tokens else (_small_cache(config, tokens),)
    phases["weight sync"]["buckets"] = _gathered(config.rollout, shape, layout, width, on_gpu)
    if not on_gpu:
        del phases["checkpoint"]  # a copy of a rank's share, when activations are gone
        parts = {part: max(p.get(part, 0.0) for p in phases.values()) for parts in phases.values() for part in parts}
        parts["activations"] *= machine.CPU_HEAP
        room = machine.FILL * hardware.memory if hardware.memory else math.inf
        return Memory({"whole run": parts | {"process": machine.CPU_PROCESS_BYTES}}, room)
    for parts in phases.values():
        parts["process"] = machine.GPU_PROCESS_BYTES
    host = host_parts(config, shape, layout, width, min(hardware.gpus_per_node, layout.gpus))
    return Memory(phases, machine.FILL * hardware.memory, faults, cache_tokens(config, shape, hardware), host)


def micro_batch_tokens(config: Config, layout: Spread) -> int:
    """Return the tokens of the fullest micro-batch: the budget, or all that a rank has of an update or a warm start."""
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
    stage = width * shapes.parameters(shape) * layout.share()
    own_copy = not on_gpu and layout.tp > 1
    bucket = min(machine.GATHER_BYTES, stage)
    embedding = min(stage, width * shape.vocab * shape.hidden)
    largest = embedding if embedding <= machine.GATHER_BYTES else min(bucket, 2 * width * shape.ffn * shape.hidden)
    gathered = max(bucket * (1 + 1 / layout.tp + own_copy), bucket + largest, embedding * (1 + own_copy))
    if rollout.is_embedded:
        return gathered
    bucket = min(rollout.weight_sync.bucket_mib * 2**20, width * shapes.parameters(shape))
    # on a CPU two buffers of one size take turns
    return gathered + max(bucket, embedding) + (bucket if on_gpu else max(bucket, embedding))


def _add_replica(config: Config, shape: ModelShape, layout: Spread, phases: dict[str, Parts], width: int) -> None:
    """Add the embedded engine: a whole model on every rank at all times; a cache and the sampler's float32 logits and
    four float64 copies while it generates."""
    sequences = math.ceil(config.train.prompts_per_step * config.rollout.samples_per_prompt / layout.gpus)
    together = min(sequences, config.rollout.batch_size)
    for parts in phases.values():
        parts["engine weights"] = width * shapes.parameters(shape)
    entries = together * shape.vocab
    phases["generation"]["KV cache"] = together * config.max_sequence_tokens * shapes.kv_bytes_per_token(shape, width)
    phases["generation"]["sampling"] = 4.0 * entries + 32.0 * min(entries, machine.SAMPLING_ENTRIES)


def cache_tokens(config: Config, shape: ModelShape, hardware: Hardware) -> int | None:
    """Return the tokens that the key-value cache of a server on the trainer's GPUs holds: rollout.server.kv_tokens, or
    what `memory_fraction` leaves beside the weights. None: no server is there, or on CPUs."""
    server = config.rollout.server
    if not hardware.flops or not config.rollout.shares_devices:
        return None
    weights, token = _server_bytes(config, shape)
    return server.kv_tokens or max(1, int((server.memory_fraction * hardware.memory - weights) / token))


def with_cache_tokens(config: Config, shape: ModelShape, hardware: Hardware) -> Config:
    """Return the config for its servers: with rollout.server.kv_tokens as planned.

    Raises: ConfigError when that is less than one sequence.
    """
    planned = cache_tokens(config, shape, hardware)
    if planned is not None and planned < config.max_sequence_tokens:
        raise ConfigError(_small_cache(config, planned))
    tokens = planned or config.rollout.server.kv_tokens
    server = config.rollout.server.model_copy(update={"kv_tokens": tokens})
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"server": server})})


def _server_bytes(config: Config, shape: ModelShape) -> tuple[float, float]:
    """Return the bytes on one GPU of a server: of its weights, and of a token's keys and values."""
    width, tp = shapes.width_of(config.model), config.rollout.server.tp
    return width * shapes.parameters(shape) / tp, shapes.kv_bytes_per_token(shape, width) / min(tp, shape.groups)


def _add_servers(config: Config, shape: ModelShape, phases: dict[str, Parts], width: int, tokens: int) -> None:
    """Add servers on the trainer's GPUs, with a cache of `tokens`: weights and cache, released in training when they
    share the memory, and a process of their own. Then gradients are freed, and in bfloat16 the optimizer's state is on
    the host, during generation (MegatronPolicy.offload)."""
    server = config.rollout.server
    weights, token = _server_bytes(config, shape)
    awake = {"engine weights": weights, "KV cache": tokens * token, "engine process": machine.GPU_PROCESS_BYTES}
    asleep = {"engine process": machine.GPU_PROCESS_BYTES} if server.share_memory else awake
    for name, parts in phases.items():
        generating = name in ("generation", "weight sync")
        parts |= awake if generating else asleep
        if generating and server.share_memory:
            parts["gradients"] = 0.0
            parts["optimizer"] = 0.0 if width == 2 else parts["optimizer"]


def _small_cache(config: Config, tokens: int) -> str:
    server = config.rollout.server
    return (
        f"rollout.server.memory_fraction {server.memory_fraction:g} leaves a server a key-value cache of {tokens:,} "
        f"tokens, one sequence has {config.max_sequence_tokens:,}; raise memory_fraction or rollout.server.tp"
    )
