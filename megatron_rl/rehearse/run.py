"""The phases of a step, rehearsed as one rank."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_rl import device
from megatron_rl.algorithms.balance import Work
from megatron_rl.algorithms.control import LossController
from megatron_rl.config import Config
from megatron_rl.data.tokenizer import build_tokenizer, vocab_size
from megatron_rl.errors import UserError
from megatron_rl.models.facts import is_moe, read_hf_config
from megatron_rl.models.hardware import with_memory
from megatron_rl.models.mapping import find_row
from megatron_rl.packing import Layout, pack
from megatron_rl.packing.dealing import Deal
from megatron_rl.parallel.groups import Groups
from megatron_rl.plan.memory import fuses_output_layer, micro_batch_tokens, update_micro_batches
from megatron_rl.plan.shapes import layout_of, shape_of
from megatron_rl.policy.adam import begin_torch_adam
from megatron_rl.policy.checkpoint import CheckpointStore
from megatron_rl.policy.policy import MegatronPolicy
from megatron_rl.rehearse.books import Books, Phase
from megatron_rl.rehearse.world import Watch, fake_world
from megatron_rl.rollout.servers.weight_sync import Buffers, expected_weights, pack_buckets
from megatron_rl.rollout.world import join
from megatron_rl.run import build_policy
from megatron_rl.types import Rollout, TrainBatch

SHALLOW = (4, 8)  # layers of each stage's chunk, from which the model's are extrapolated
_UPDATES = 2
_PROMPT = 8  # a prompt is this part of its sequence


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What one rank's rehearsal has shown."""

    rank: int
    layers: int
    vocabulary: int
    depths: tuple[int, ...]  # that were run: one, the model's own, or two
    phases: list[Phase]


def rehearse(config: Config, rank: int, *, full: bool) -> Rehearsal:
    """Return the rehearsal of a rank: of all layers where `full` or few, else extrapolated from two shallow models.

    Raises: UserError for a mixture of experts.
    """
    raw, spread, parallel = dict(read_hf_config(config.model)), layout_of(config), config.parallel
    if is_moe(raw):
        raise UserError("a mixture of experts sends tokens to experts by their values, and a rehearsal has no values")
    raw.setdefault("vocab_size", 0)
    raw["vocab_size"] = raw["vocab_size"] or vocab_size(build_tokenizer(config))
    fuses = fuses_output_layer(
        config, shape_of(raw), spread, with_memory(device.memory_bytes(), on_gpu=True, has_engine=False)
    )
    layers, unit = raw["num_hidden_layers"], parallel.pp * parallel.vpp
    is_shallow = full or spread.stage_layers or layers <= SHALLOW[1] * unit

    def at_depth(depth: int) -> Config:
        model: dict[str, Any] = {"path": None, "hf_config": raw | {"num_hidden_layers": depth}}
        model |= {"fused_linear_stats": "on" if fuses else "off"}  # as the whole model would, not the shallow one
        return config.model_copy(update={"model": config.model.model_copy(update=model)})

    depths = (layers,) if is_shallow else [depth * unit for depth in SHALLOW]
    runs = {depth: rehearsed(at_depth(depth), rank) for depth in depths}
    (least, phases), (most, others) = min(runs.items()), max(runs.items())
    if most > least:
        phases = [a.at((layers - least) / (most - least), b) for a, b in zip(phases, others, strict=True)]
        # a shallow model is built with its peak at its embedding, a deep one where the optimizer copies
        phases[0] = rehearsed(at_depth(layers), rank, only_build=True)[0]
    return Rehearsal(rank, layers, raw["vocab_size"], tuple(runs), phases)


def kinds_of_ranks(config: Config) -> list[int]:
    """Return a rank of each kind: of the first, a middle and the last pipeline stage, or of all where they differ."""
    parallel = config.parallel
    stages = range(parallel.pp) if layout_of(config).stage_layers else {0, parallel.pp // 2, parallel.pp - 1}
    return [stage * (parallel.processes // parallel.pp) for stage in sorted(stages)]


def rehearsed(config: Config, rank: int, *, only_build: bool = False) -> list[Phase]:
    """Return the phases of a step of `rank`, without values; the first alone where `only_build`."""
    watch = Watch(FakeTensorMode(allow_non_fake_inputs=True))
    with fake_world(rank, config.parallel.processes, watch):
        policy = build(config, watch.books)
        if not only_build:
            perform_step(config, policy, watch)
            perform_turn(config, policy, watch.books)
    return watch.books.phases


def build(config: Config, books: Books) -> MegatronPolicy:
    """Return the policy, built in the world that this process is in."""
    with books.during("build", "other"):
        groups, raw = join(config), dict(config.model.hf_config or {})
        policy, _ = build_policy(raw, config, groups, total_updates=config.train.num_steps)
        if config.loss.ref_kl_coef > 0:
            policy.keep_reference()
    return policy


def perform_step(config: Config, policy: MegatronPolicy, watch: Watch) -> None:
    """Go through train.run_step's phases from the packed batch on. Adam has its state from the beginning, as after a
    first update."""
    books, groups = watch.books, policy.groups
    begin_torch_adam(policy.optimizer)
    _name_state(policy, books)
    books.part, ranks = "batch", groups.token_ranks
    batch = full_batch(config, groups).to(device.device())
    with watch.naming(policy.model.chunks):
        with books.during("old logprobs", "activations"):
            batch = policy.with_old_logprobs(batch)
        loss = LossController(config.loss, ranks).next_loss(batch)
        for i, mini_batch in enumerate(batch.mini_batches, 1):
            with books.during(f"select {i}", "activations"):
                mini_batch = policy.with_selection_stats(mini_batch, loss)
                mini_batch = loss.mark(mini_batch, ranks, seed=config.seed, step=0)
            with books.during(f"update {i}", "activations"):
                policy.update(mini_batch, loss)


def perform_turn(config: Config, policy: MegatronPolicy, books: Books) -> None:
    """Go through the phases between two steps: the engine's turn as rollout/served.py gives it, and a checkpoint."""
    shares = config.rollout.server.share_memory and not config.rollout.is_embedded
    if shares:
        with books.during("offload", "optimizer"):
            policy.offload()
    with books.during("weight sync", "buckets"):
        _send(config, policy)
    with books.during("generation", "other"):
        pass
    if shares:
        with books.during("reload", "optimizer"):
            policy.reload()
    store = CheckpointStore(config.run_dir, policy, policy.groups)
    with policy.without_gradients(), books.during("checkpoint", "checkpoint"):
        store.copies()


def _send(config: Config, policy: MegatronPolicy) -> None:
    """Let the weights stream, into buckets where servers get them. The other stages send what this one does: their
    weights are left out."""
    stream, hf = policy.hf_weights(), policy.hf_config
    if config.rollout.is_embedded:
        for _ in stream:
            pass
        return
    rows, every = (find_row(name, hf.tie_word_embeddings) for name, _ in policy.parameters), expected_weights(hf)
    shapes = {name: every[name] for row in rows for name in row.hf}
    widest = max(parameter.itemsize for _, parameter in policy.parameters)
    buffers = Buffers(shapes, config.rollout.weight_sync.bucket_mib * 2**20, widest)
    for _ in pack_buckets(stream, shapes, buffers):  # the server loads one while the next is filled
        pass


def _name_state(policy: MegatronPolicy, books: Books) -> None:
    for adam in (chained.optimizer for chained in policy.optimizer.chained_optimizers):
        values = [value for state in adam.state.values() for value in state.values()]
        for tensor in [*(p.data for group in adam.param_groups for p in group["params"]), *values]:
            books.name(tensor, "optimizer")
    for ddp in policy.model.ddp:  # after the optimizer, whose float32 parameters may be the model's
        for buffer in ddp.buffers:
            books.name(buffer.grad_data, "gradients")
        for parameter in ddp.parameters():
            books.name(parameter.data, "weights")


def full_batch(config: Config, groups: Groups) -> TrainBatch:
    """Return the first updates of a step on this rank, with no more micro-batches than show the peaks: each as full as
    the budget allows, with one sequence of the longest length and equal ones of about 5/8 of it."""
    spread, layout, pp = layout_of(config), Layout.of(config, groups), groups.pp_size
    count = min(update_micro_batches(config, spread), 2 if pp == 1 else 2 * pp)
    count = math.ceil(count / layout.count_multiple) * layout.count_multiple
    updates = min(_UPDATES, config.minibatches_per_step)
    tokens, unit = min(layout.capacity, micro_batch_tokens(config, spread)), layout.sequence_multiple
    longest = min(config.max_sequence_tokens, tokens) // unit * unit
    others = math.ceil((tokens - longest) / (longest * 5 / 8))
    lengths = [longest] + [n for n in [(tokens - longest) // max(1, others) // unit * unit] * others if n > 1]
    rollouts = [_rollout(i, n, config.data.max_prompt_tokens) for i, n in enumerate(lengths * count * updates)]
    work = Work({i: layout.padded(len(rollout.token_ids)) for i, rollout in enumerate(rollouts)})
    numbers = torch.arange(len(rollouts)).view(updates, count, len(lengths)).tolist()
    deals = [Deal(work, [chosen] * layout.dp_size) for chosen in numbers]
    advantages = torch.randn(len(rollouts), generator=torch.Generator().manual_seed(config.seed))
    return pack(rollouts, advantages, layout, step=0, deals=deals)


def _rollout(index: int, length: int, longest_prompt: int) -> Rollout:
    places = torch.arange(length)
    sampled = places >= max(1, min(longest_prompt, length // _PROMPT))
    return Rollout(index, 0, places % 2, torch.zeros(length), sampled, "stop", 0)
