"""Mini-batches for the selection tests: built without a tokenizer or a model, in any packing."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_rl.algorithms.aggregation import token_weights
from megatron_rl.algorithms.methods.clip_cov import ClipCovLoss
from megatron_rl.algorithms.methods.kl_cov import KlCovLoss
from megatron_rl.algorithms.policy_loss import PolicyLoss
from megatron_rl.parallel.reduce import Reducer
from megatron_rl.types import MicroBatch, MiniBatch, TokenStats

ALONE = Reducer(None)
LENGTHS = [14, 9, 20, 5, 17, 11, 8, 16]
STRIDE = 32


def sequence(index: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Per-token fields of one sequence, a function of its index: position 0 is prompt, the last predicts nothing."""
    generator = torch.Generator().manual_seed(1000 * seed + index)
    mask = torch.arange(length) >= 1
    mask[-1] = False
    logprobs = -3 * torch.rand(length, generator=generator)
    return {
        "loss_mask": mask,
        "advantages": torch.randn((), generator=generator).expand(length) * mask,
        "logprobs": logprobs,
        "old_logprobs": logprobs + 0.3 * torch.randn(length, generator=generator),
        "entropy": 2 * torch.rand(length, generator=generator),
        "sum_p2": torch.rand(length, generator=generator),
        "sum_p2_logp": -torch.rand(length, generator=generator),
        "position_ids": torch.arange(length),
        "prompt_ids": torch.full((length,), 50 + index // 4),
        "sample_indices": torch.full((length,), index % 4),
        "token_ids_global": index * STRIDE + torch.arange(length) + 1,
    }


def build(bins: list[list[int]], seed: int = 0, index: int = 0) -> tuple[MiniBatch, list[TokenStats]]:
    """A mini-batch whose micro-batch b packs the sequences `bins[b]` in that order, with two positions of padding."""
    pairs = [_micro_batch([sequence(i, LENGTHS[i], seed) for i in chosen]) for chosen in bins]
    return MiniBatch(index, tuple(mb.replace(stats=stats) for mb, stats in pairs)), [stats for _, stats in pairs]


def _micro_batch(sequences: list[dict[str, Tensor]]) -> tuple[MicroBatch, TokenStats]:
    def cat(name: str, padding: float) -> Tensor:
        parts = [s[name] for s in sequences]
        like = parts[0] if parts else sequence(0, 4)[name]
        return torch.cat([*parts, torch.full((2,), padding, dtype=like.dtype)])

    lengths = [len(s["loss_mask"]) for s in sequences]
    cu_seqlens = torch.tensor([0, *lengths, 2], dtype=torch.int32).cumsum(0).int()
    mask = cat("loss_mask", False)
    weights, denominator = token_weights("token_mean", mask, cu_seqlens, 20)
    micro_batch = MicroBatch(
        token_ids=torch.zeros(len(mask), dtype=torch.int64),
        labels=torch.zeros(len(mask), dtype=torch.int64),
        position_ids=cat("position_ids", 0),
        response_positions=torch.cat(
            [*(s["loss_mask"].long().cumsum(0) - 1 for s in sequences), torch.zeros(2).long()]
        ),
        response_lengths=torch.cat(
            [*(s["loss_mask"].sum() * s["loss_mask"] for s in sequences), torch.zeros(2).long()]
        ),
        cu_seqlens=cu_seqlens,
        loss_mask=mask,
        advantages=cat("advantages", 0.0),
        rollout_logprobs=cat("old_logprobs", 0.0),
        token_weights=weights,
        prompt_ids=cat("prompt_ids", -1),
        sample_indices=cat("sample_indices", -1),
        token_ids_global=cat("token_ids_global", -1),
        loss_denominator=denominator,
        num_sequences=len(sequences),
        longest=max([*lengths, 2]),
        old_logprobs=cat("old_logprobs", 0.0),
    )
    # garbage where nothing counts: it must not reach any sum
    stats = TokenStats(*(cat(name, 1e30) for name in ("logprobs", "entropy", "sum_p2", "sum_p2_logp")))
    return micro_batch, stats


def by_hand(
    logprobs: list[float], advantages: list[float], old: list[float] | None = None
) -> tuple[MiniBatch, list[TokenStats]]:
    """One sequence of tokens with global ids 1, 2, ... that all count."""
    n = len(logprobs)
    fields = {name: value[:1].expand(n) for name, value in sequence(0, 3).items()}
    fields |= {"loss_mask": torch.ones(n, dtype=torch.bool), "position_ids": torch.arange(n)}
    fields |= {"token_ids_global": torch.arange(n) + 1}
    fields |= {"logprobs": torch.tensor(logprobs), "advantages": torch.tensor(advantages)}
    fields |= {"old_logprobs": torch.tensor(old or logprobs)}
    micro_batch, stats = _micro_batch([fields])
    return MiniBatch(0, (micro_batch.replace(num_sequences=2, stats=stats),)), [stats]


def select(
    batch: tuple[MiniBatch, list[TokenStats]],
    loss: PolicyLoss,
    *,
    seed: int = 1,
    step: int = 0,
) -> tuple[MiniBatch, set[int], dict[str, float]]:
    """The marked mini-batch, the selected global ids and the metrics, on one process."""
    mini_batch = loss.mark(batch[0].with_stats(batch[1]), ALONE, seed=seed, step=step)
    for micro_batch in mini_batch.micro_batches:
        assert not (micro_batch.selected & ~micro_batch.loss_mask).any()
    ids = set(mini_batch.cat("token_ids_global")[mini_batch.cat("selected")].tolist())
    return mini_batch, ids, dict(mini_batch.selection)


def loss_sum(micro_batch: MicroBatch, stats: TokenStats, loss: ClipCovLoss | KlCovLoss) -> float:
    return float(loss(micro_batch.loss_inputs(stats)).loss_sum)


def numpy_view(batch: tuple[MiniBatch, list[TokenStats]]) -> dict[str, np.ndarray]:
    """Counted tokens' fields as float64 / int64 numpy, and their covariance."""
    mini_batch, stats = batch
    masks = [mb.loss_mask for mb in mini_batch.micro_batches]
    view = {
        name: torch.cat([getattr(s, name)[m] for s, m in zip(stats, masks, strict=True)]).double().numpy()
        for name in ("logprobs", "entropy", "sum_p2", "sum_p2_logp")
    }
    view |= {name: mini_batch.cat(name).numpy() for name in ("token_ids_global", "advantages", "old_logprobs")}
    adv = view["advantages"].astype(np.float64)
    view["cov"] = (view["logprobs"] - view["logprobs"].mean()) * (adv - adv.mean())
    return view
