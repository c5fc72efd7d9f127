"""What one layout makes of the frozen mini-batch, kept in a folder so that another layout can be compared with it.

The folder holds weights and gradients under their Hugging Face names (`start/`, `gradients/`, `after/` one update,
`second/` after two, `resumed/` after a checkpoint and the second), `checkpoint/`, all tokens by their ids (`tokens.pt`)
and `numbers.json`.
"""

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl import device, launch
from megatron_rl.algorithms.control import LossController
from megatron_rl.algorithms.hashing import hash_uniform
from megatron_rl.config import Config
from megatron_rl.conform.frozen import frozen_rollouts, with_old_policies
from megatron_rl.convert.safetensors_io import stored_tensors
from megatron_rl.convert.save_hf import SHARD_BYTES, write_shards
from megatron_rl.data.cursor import PromptCursor
from megatron_rl.data.problems import load_prompts
from megatron_rl.data.tokenizer import build_tokenizer
from megatron_rl.metrics import Timers
from megatron_rl.packing import Layout, pack
from megatron_rl.parallel.groups import Groups
from megatron_rl.parallel.reduce import Reducer
from megatron_rl.parallel.weights import weight_stream
from megatron_rl.policy.checkpoint import CheckpointStore
from megatron_rl.policy.gradients import full_gradients
from megatron_rl.policy.policy import MegatronPolicy
from megatron_rl.policy.schedule import run_schedule
from megatron_rl.rollout.engine import Place
from megatron_rl.rollout.probe import probe_distance
from megatron_rl.rollout.served import Served
from megatron_rl.run import build_policy
from megatron_rl.train import advantages
from megatron_rl.types import MicroBatch, MiniBatch, TrainBatch

LOGITS_OF = 16  # tokens whose logits are kept


def measure(
    config: Config,
    raw_hf_config: dict[str, Any],
    groups: Groups,
    folder: Path,
    *,
    asks_engine: bool = False,
    resumes: Path | None = None,
) -> None:
    """Fill `folder` (rank 0 writes). Collective.

    `raw_hf_config`: the architecture, perhaps with fewer layers. `asks_engine`: whether the config's engine is started.
    `resumes`: the folder from whose checkpoint the second update is made anew; if `folder`, saved after the first.
    """
    ranks = groups.token_ranks
    tokenizer = build_tokenizer(config)
    prompts = load_prompts(config, tokenizer, lambda answer: True).train
    layout = Layout.of(config, groups)
    policy, served_config = build_policy(raw_hf_config, config, groups, total_updates=2)
    keep = partial(_keep, rank=groups.rank)
    keep(folder / "start", policy.hf_weights())
    rollouts = frozen_rollouts(config, PromptCursor(prompts, config.seed).take(config.train.prompts_per_minibatch))
    batch = pack(rollouts, advantages(rollouts, config), layout, step=0).to(device.device())
    mini_batch = batch.mini_batches[0]
    mini_batch = mini_batch.with_stats(policy.stats(mini_batch, with_sum_p2=True))
    mini_batch = with_old_policies(mini_batch, config.seed, has_reference=config.loss.ref_kl_coef > 0)
    loss = LossController(config.loss, ranks).next_loss(TrainBatch(0, (mini_batch,)))
    mini_batch = loss.mark(mini_batch, ranks, seed=config.seed, step=0)
    tokens, differing = _tokens(mini_batch, groups.all_ranks)
    tokens |= _logits(policy, mini_batch)
    numbers: dict[str, Any] = {"replicated tokens": differing, "selection": dict(mini_batch.selection)}
    sums = policy.backward(mini_batch, loss)
    totals = {name: ranks.sum(pair.to(device.device())).tolist() for name, pair in sorted(sums.items())}
    numbers["loss"] = {name: total / count if count else 0.0 for name, (total, count) in totals.items()}
    keep(folder / "gradients", weight_stream(full_gradients(policy), policy.hf_config, groups))
    norm = policy.update(mini_batch, loss).grad_norm
    numbers["clip norm"] = groups.all_ranks.gather_objects(norm)
    numbers["replicated weights"] = _differing_replicas(policy)
    keep(folder / "after", policy.hf_weights())
    if asks_engine:
        numbers["engine"] = _engine_distance(served_config, policy, tokenizer, layout, prompts)
    store = CheckpointStore(folder / "checkpoint", policy, groups, tokenizer)
    if resumes == folder:
        store.save(1, {})
    policy.update(mini_batch, loss)
    keep(folder / "second", policy.hf_weights())
    if resumes is not None:
        store.load(resumes / "checkpoint" / store.path(1).name)
        saved = stored_tensors(resumes / "after") if groups.rank == 0 else {}
        loaded = policy.hf_weights()
        unlike = [name for name, tensor in loaded if saved and not torch.equal(saved[name].read(), tensor.cpu())]
        numbers["checkpoint"] = unlike + _differing_replicas(policy)
        policy.update(mini_batch, loss)
        keep(folder / "resumed", policy.hf_weights())
    if groups.rank == 0:
        torch.save(tokens, folder / "tokens.pt")
        (folder / "numbers.json").write_text(json.dumps(numbers))


def _keep(folder: Path, stream: Iterable[tuple[str, Tensor]], rank: int) -> None:
    """Write a stream, which every rank exhausts, to files of rank 0."""
    if rank == 0:
        folder.mkdir(parents=True)
        write_shards(folder, stream, SHARD_BYTES)
    for _ in stream:
        pass


def _tokens(mini_batch: MiniBatch, world: Reducer) -> tuple[dict[str, Tensor], list[str]]:
    """Return columns of all counted tokens by rising id, and which differ in a bit on ranks with the same token."""
    mine = {"ids": mini_batch.cat("token_ids_global"), "advantages": mini_batch.cat("advantages")}
    mine |= {name: mini_batch.cat_stats(name) for name in ("logprobs", "entropy", "sum_p2", "sum_p2_logp")}
    for name in ("selected", "surrogate_weights", "token_weights"):
        if all(getattr(m, name) is not None for m in mini_batch.micro_batches):
            mine[name] = mini_batch.cat(name)
    parts = world.gather_objects({name: column.cpu() for name, column in mine.items()})
    whole = {name: torch.cat([part[name] for part in parts]) for name in mine}
    order = whole["ids"].argsort(stable=True)
    whole = {name: column[order] for name, column in whole.items()}
    same = whole["ids"][1:] == whole["ids"][:-1]
    differing = [name for name, column in whole.items() if (column[1:] != column[:-1])[same].any()]
    first = torch.cat([torch.ones(1, dtype=torch.bool), ~same])
    return {name: column[first] for name, column in whole.items()}, differing


def _logits(policy: MegatronPolicy, mini_batch: MiniBatch) -> dict[str, Tensor]:
    """Return `logits` `[LOGITS_OF, V]` float32 of the tokens `logit_ids`, drawn by hash."""
    groups, model = policy.groups, policy.model
    ids = mini_batch.cat("token_ids_global")
    _, chosen = groups.token_ranks.top_k(hash_uniform(policy.config.seed, ids), ids, LOGITS_OF)

    def on_output(output: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        wanted = micro_batch.loss_mask & torch.isin(micro_batch.token_ids_global, chosen)
        rows = output[wanted]
        return micro_batch.token_ids_global[wanted], rows @ model.output_weight.t() if model.hands_over_hidden else rows

    with torch.no_grad():
        found = run_schedule(model, mini_batch, on_output, forward_only=True)
    shards = [(ids.cpu(), Reducer(groups.tp, device.device()).gather(rows.float()).cpu()) for ids, rows in found]
    everywhere = groups.all_ranks.gather_objects(shards if groups.tp_rank == 0 else [])
    by_id = {
        int(token): shards[:, row].reshape(-1)[: policy.hf_config.vocab_size]
        for rank in everywhere
        for tokens, shards in rank
        for row, token in enumerate(tokens)
    }
    known = sorted(by_id)
    return {"logit_ids": torch.tensor(known), "logits": torch.stack([by_id[token] for token in known])}


def _differing_replicas(policy: MegatronPolicy) -> list[str]:
    """Return the parameters of which ranks with the same shard hold other bits: data-parallel ranks, tensor-parallel
    ones where it is whole, stages with a tied embedding."""
    groups, digests = policy.groups, {}
    for name, parameter in policy.parameters:
        if policy.hf_config.tie_word_embeddings:
            name = name.replace("output_layer.", "embedding.word_embeddings.")
        is_dealt = groups.ep_size > 1 and ".experts." in name
        is_whole = not is_dealt and not getattr(parameter, "tensor_model_parallel", False)
        shard = f"ep {groups.ep_rank}" if is_dealt else "" if is_whole else f"tp {groups.tp_rank}"
        digests[name, shard] = _digest(parameter)
    copies = groups.all_ranks.gather_objects(digests)
    first = {shard: digest for held in reversed(copies) for shard, digest in held.items()}
    return sorted({shard[0] for held in copies for shard, digest in held.items() if digest != first[shard]})


def _digest(tensor: Tensor) -> int:
    """Return a number that two tensors of other bits share by accident alone."""
    bits = tensor.detach().reshape(-1).view(torch.int16 if tensor.element_size() == 2 else torch.int32).long()
    return int((bits * (torch.arange(len(bits), device=bits.device) * 2 + 1)).sum())


def _engine_distance(config: Config, policy: MegatronPolicy, tokenizer: Any, layout: Layout, prompts: Any) -> float:
    groups = policy.groups
    place = Place(groups.rank, groups.world_size, launch.local_rank(), groups.all_ranks.gather_objects)
    served = Served(config, place, policy, tokenizer, shares_memory=policy)
    served.weight_version = 1
    try:
        with served.session(Timers(device.synchronize)) as engine:
            return probe_distance(engine, policy, layout, prompts)[0]
    finally:
        served.close()
