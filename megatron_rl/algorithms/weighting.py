"""Weights of the policy-gradient term per token, from statistics over the whole optimiser mini-batch.

Like the selection of Clip-Cov and KL-Cov, each statistic runs over the response tokens of all ranks and micro-batches,
so the layout never changes a weight. The papers' own code takes it over one micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_rl.types import MiniBatch, Ranks


def weigh(mini_batch: MiniBatch, weights: Callable[[MiniBatch, Ranks], Tensor], ranks: Ranks) -> MiniBatch:
    """Return the mini-batch with `surrogate_weights`: what `weights` gives its response tokens, float64 `[N]`.

    ranks: those that hold different tokens. Without a token on any of them all weights are 0, and `weights` is not
    asked. Metrics in `selection`: `weight/min`, and `weight/effective_fraction` = (sum w)^2 / (N sum w^2), which is 1
    for equal weights and keep_fraction for 80/20.
    """
    tokens = torch.stack([micro_batch.loss_mask.sum() for micro_batch in mini_batch.micro_batches]).sum()
    if not int(ranks.sum(tokens)):  # no token on any rank
        nothing = [torch.zeros_like(micro_batch.advantages) for micro_batch in mini_batch.micro_batches]
        return mini_batch.replace_each("surrogate_weights", nothing)
    values = weights(mini_batch, ranks)
    sums = torch.stack([torch.full_like(values.sum(), values.numel()), values.sum(), (values**2).sum()])
    count, total, squares = ranks.sum(sums).tolist()
    smallest = -float(ranks.max(torch.cat([-values, values.new_tensor([-math.inf])]).max()))
    mini_batch = mini_batch.replace_each("surrogate_weights", _uncat(mini_batch, values.float()))
    return mini_batch.with_selection(
        {"weight/min": smallest, "weight/effective_fraction": total**2 / (count * squares)}
    )


def _uncat(mini_batch: MiniBatch, values: Tensor) -> list[Tensor]:
    """Return [T] per micro-batch, 0 outside `loss_mask`, from values of the response tokens [N]."""
    masks = [micro_batch.loss_mask for micro_batch in mini_batch.micro_batches]
    whole = values.new_zeros(sum(map(len, masks))).masked_scatter(torch.cat(masks), values)
    return list(whole.split([len(mask) for mask in masks]))
