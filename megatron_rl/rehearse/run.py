"""The phases of a step, rehearsed as one rank."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_rl import device
from megatron_rl.algorithms.balance import Work
from megatron_rl.algorithms.control import LossController
from megatron_rl.algorithms.losses import policy_loss
from megatron_rl.algorithms.weighting import mark_tokens
from megatron_rl.config import Config
from megatron_rl.data import build_tokenizer, vocab_size
from megatron_rl.errors import UserError
from megatron_rl.models.facts import is_moe, read_hf_config
from megatron_rl.models.mapping import find_row
from megatron_rl.packing import Layout, pack
from megatron_rl.packing.dealing import Deal
from megatron_rl.parallel.groups import Groups
from megatron_rl.plan.memory import micro_batch_tokens, update_micro_batches
from megatron_rl.plan.shapes import layout_of
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

    Raises: UserError for a model that cannot be rehearsed.
    """
    parallel = config.parallel
    raw = dict(read_hf_config(config.model))
    if is_moe(raw):
        raise UserError(
            "a mixture of experts routes tokens by their values, which a rehearsal has not; use a dense model"
        )
    if "vocab_size" not in raw:
        raw["vocab_size"] = vocab_size(build_tokenizer(config))
    layers, unit = raw["num_hidden_layers"], parallel.pp * parallel.vpp
    is_uneven = bool(layout_of(config).stage_layers)
    depths = (layers,) if full or is_uneven or layers <= SHALLOW[1] * unit else tuple(d * unit for d in SHALLOW)
    runs = [rehearsed(_of_depth(config, raw, depth), rank) for depth in depths]
    phases = runs[0]
    if len(runs) > 1:
        share = (layers - depths[0]) / (depths[-1] - depths[0])
        phases = [one.at(share, other) for one, other in zip(*runs, strict=True)]
    return Rehearsal(rank, layers, raw["vocab_size"], depths, phases)


def kinds_of_ranks(config: Config) -> list[int]:
    """Return a rank of each kind: of the first, a middle and the last pipeline stage, or of every one where they
    differ."""
    parallel = config.parallel
    stages = range(parallel.pp) if layout_of(config).stage_layers else {0, parallel.pp // 2, parallel.pp - 1}
    return [stage * (parallel.processes // parallel.pp) for stage in sorted(stages)]


def _of_depth(config: Config, raw: dict[str, Any], layers: int) -> Config:
    model = {"path": None, "hf_config": raw | {"num_hidden_layers": layers}}
    return config.model_copy(update={"model": config.model.model_copy(update=model)})


def rehearsed(config: Config, rank: int) -> list[Phase]:
    """Return the phases of a step of `rank`, without values."""
    watch = Watch(FakeTensorMode(allow_non_fake_inputs=True))
    with fake_world(rank, config.parallel.processes, watch):
        policy, phases = performed(config, watch)
        return phases + around(config, policy, watch.books)


def performed(config: Config, watch: Watch) -> tuple[MegatronPolicy, list[Phase]]:
    """Return the policy, built in the world that this process is in, and its phases up to the last update. Adam has its
    state from the beginning, as after a first update."""
    books = watch.books
    books.begin("build", "other")
    groups, raw = join(config), dict(config.model.hf_config or {})
    policy, _ = build_policy(raw, config, groups, total_updates=config.train.num_steps)
    begin_torch_adam(policy.optimizer)
    if config.loss.ref_kl_coef > 0:
        policy.keep_reference()
    build = books.end()
    _name_state(policy, books)
    books.begin("", "batch")
    with watch.naming(policy.model.chunks):
        return policy, [build, *step(config, policy, full_batch(config, groups).to(device.device()), books)]


def step(config: Config, policy: MegatronPolicy, batch: TrainBatch, books: Books) -> list[Phase]:
    """Return the phases of train.run_step from the packed batch on."""
    phases: list[Phase] = []
    ranks = policy.groups.token_ranks
    with _phase(books, phases, "old logprobs", "activations"):
        batch = policy.with_old_logprobs(batch)
    loss = LossController(config.loss, ranks).next_loss(batch)
    for i, mini_batch in enumerate(batch.mini_batches, 1):
        with _phase(books, phases, f"select {i}", "activations"):
            mini_batch = policy.with_selection_stats(mini_batch, loss)
            mini_batch = mark_tokens(mini_batch, loss, ranks, seed=config.seed, step=0)
        with _phase(books, phases, f"update {i}", "activations"):
            policy.update(mini_batch, policy_loss(loss))
    return phases


def around(config: Config, policy: MegatronPolicy, books: Books) -> list[Phase]:
    """Return the phases between two steps: the engine's turn as rollout/served.py gives it, and a checkpoint."""
    phases: list[Phase] = []
    shares = config.rollout.server.share_memory and not config.rollout.is_embedded
    if shares:
        with _phase(books, phases, "offload", "optimizer"):
            policy.offload()
    with _phase(books, phases, "weight sync", "buckets"):
        _send(config, policy)
    with _phase(books, phases, "generation", "other"):
        pass
    if shares:
        with _phase(books, phases, "reload", "optimizer"):
            policy.reload()
    store = CheckpointStore(config.run_dir, policy, policy.groups)
    with policy.without_gradients(), _phase(books, phases, "checkpoint", "checkpoint"):
        store.copies()
    return phases


@contextmanager
def _phase(books: Books, phases: list[Phase], name: str, part: str) -> Iterator[None]:
    books.begin(name, part)
    yield
    phases.append(books.end())


def _send(config: Config, policy: MegatronPolicy) -> None:
    """Let the weights stream, into buckets where servers get them. The other stages send what this one does: their
    weights are left out."""
    stream, hf = policy.hf_weights(), policy.hf_config
    if config.rollout.is_embedded:
        for _ in stream:
            pass
        return
    own = {name for parameter, _ in policy.parameters for name in find_row(parameter, hf.tie_word_embeddings).hf}
    shapes = {name: shape for name, shape in expected_weights(hf).items() if name in own}
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
    the budget allows, the first sequence of the longest length."""
    spread, layout = layout_of(config), Layout.of(config, groups)
    pp = groups.pp_size
    count = min(update_micro_batches(config, spread), 2 if pp == 1 else 2 * pp)
    count = math.ceil(count / layout.count_multiple) * layout.count_multiple
    lengths = _lengths(min(layout.capacity, micro_batch_tokens(config, spread)), config, layout)
    updates = min(_UPDATES, config.minibatches_per_step)
    numbers = iter(range(updates * count * len(lengths)))
    bins = [[[next(numbers) for _ in lengths] for _ in range(count)] for _ in range(updates)]
    rollouts = [
        _rollout(i, length, config.data.max_prompt_tokens, groups.rank)
        for i, length in enumerate(lengths * (updates * count))
    ]
    work = Work({i: layout.padded(len(rollout.token_ids)) for i, rollout in enumerate(rollouts)})
    deals = [Deal(work, [chosen] * layout.dp_size) for chosen in bins]
    generator = torch.Generator().manual_seed(config.seed)
    advantages = torch.randn(len(rollouts), generator=generator, dtype=torch.float64)
    return pack(rollouts, advantages, layout, step=0, deals=deals)


def _lengths(tokens: int, config: Config, layout: Layout) -> list[int]:
    """Return lengths that fill `tokens`: the longest that a sequence may have, and equal ones of about 5/8 of it."""
    longest, multiple = config.max_sequence_tokens, layout.sequence_multiple
    first = min(longest, tokens) // multiple * multiple
    rest = tokens - first
    others = math.ceil(rest / (longest * 5 / 8)) if rest >= 2 * multiple else 0
    return [first, *[rest // others // multiple * multiple] * others] if others else [first]


def _rollout(index: int, length: int, longest_prompt: int, seed: int) -> Rollout:
    prompt = max(1, min(longest_prompt, length // _PROMPT))
    generator = torch.Generator().manual_seed(seed + index)
    return Rollout(
        prompt_id=index,
        sample_index=0,
        token_ids=torch.randint(2, (length,), generator=generator),
        rollout_logprobs=torch.zeros(length),
        sampled=torch.arange(length) >= prompt,
        finish_reason="stop",
        weight_version=0,
        reward=float(index % 2),
    )
