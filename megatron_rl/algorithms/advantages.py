"""Advantages from verifiable rewards: one number per sample, compared with the other samples of the same prompt.

Every estimator is `fn(rewards, prompt_ids, config) -> advantages`:

- `rewards` `[B]` float32 or float64, in reward units: the whole step's samples, of every data-parallel rank, because
  `reinforce_pp` whitens over the batch and a group must not be split;
- `prompt_ids` `[B]` int64: samples of one prompt share an id; any order;
- result `[B]` float32, computed in float64. Equal rewards in a group give exactly 0.

Standard deviations are unbiased (divisor n - 1), like torch.std and verl. All raise ValueError on non-finite rewards,
on shapes that differ, and on an empty batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron_rl.config import AlgorithmConfig

STD_EPS = 1e-6  # added to a standard deviation, reward units; the value of GRPO in verl


@dataclass(frozen=True, slots=True)
class _Groups:
    """The batch by prompt. `rewards` are measured from the group's smallest, which changes no group-relative advantage
    and makes the mean of equal rewards exact: otherwise its 1e-17 rounding error would be divided by STD_EPS."""

    rewards: Tensor  # [B] float64, >= 0
    index: Tensor  # [B] int64, the group of each sample
    sizes: Tensor  # [G] float64
    minima: Tensor  # [G] float64

    def sums(self, values: Tensor) -> Tensor:
        """`[B]` to `[G]`: the sum of each group."""
        return torch.zeros_like(self.sizes).index_add_(0, self.index, values)

    def spread(self, values: Tensor) -> Tensor:
        """`[G]` to `[B]`: each sample gets its group's value."""
        return values[self.index]

    def centred(self) -> Tensor:
        """`[B]`: reward minus the group's mean."""
        return self.rewards - self.spread(self.sums(self.rewards) / self.sizes)

    def std(self) -> Tensor:
        """`[B]`: the unbiased standard deviation of each sample's group."""
        return self.spread((self.sums(self.centred() ** 2) / (self.sizes - 1)).sqrt())


def grpo(rewards: Tensor, prompt_ids: Tensor, config: AlgorithmConfig) -> Tensor:
    """`(r - mean) / (std + 1e-6)` over the group; `[B]` float32, without unit.

    Raises: ValueError for a prompt with one sample, and as the module says.
    Source: arXiv 2402.03300, section 4.1.2; verl `compute_grpo_outcome_advantage`.
    """
    groups = _group(rewards, prompt_ids, "grpo")
    return (groups.centred() / (groups.std() + STD_EPS)).float()


def dr_grpo(rewards: Tensor, prompt_ids: Tensor, config: AlgorithmConfig) -> Tensor:
    """`r - mean` over the group; `[B]` float32, reward units. No division, hence no bias towards easy or hard prompts.

    Raises: ValueError for a prompt with one sample, and as the module says.
    Source: arXiv 2503.20783, section 3.2.
    """
    return _group(rewards, prompt_ids, "dr_grpo").centred().float()


def rloo(rewards: Tensor, prompt_ids: Tensor, config: AlgorithmConfig) -> Tensor:
    """`r` minus the mean of the group's *other* samples; `[B]` float32, reward units.

    Equals `(r - mean) * n / (n - 1)`, which is how it is computed.
    Raises: ValueError for a prompt with one sample, and as the module says.
    Source: arXiv 2402.14740.
    """
    groups = _group(rewards, prompt_ids, "rloo")
    return (groups.centred() * groups.spread(groups.sizes / (groups.sizes - 1))).float()


def reinforce_pp(rewards: Tensor, prompt_ids: Tensor, config: AlgorithmConfig) -> Tensor:
    """`r - mean` over the group, then whitened over the batch: `(x - mean(x)) / (std(x) + 1e-6)`; `[B]` float32.

    With one sample for every prompt there is no group to compare with and the group mean would erase everything, so the
    rewards are whitened as they are: the paper's plain REINFORCE++ (k = 1). Moments are over samples; verl's are over
    response tokens, so that long responses weigh more.

    Raises: ValueError when only some prompts have one sample (raw and centred rewards share no scale), for a batch of
    one sample, and as the module says.
    Source: arXiv 2501.03262; verl `compute_reinforce_plus_plus_baseline_outcome_advantage`.
    """
    groups = _group(rewards, prompt_ids, None)
    single = int((groups.sizes == 1).sum())
    if len(groups.rewards) == 1 or 0 < single < len(groups.sizes):
        raise ValueError(
            f"reinforce_pp: got {len(groups.rewards)} samples, {single} of {len(groups.sizes)} prompts with one; "
            "expected at least two samples, and one for every prompt or several for every prompt: "
            "set rollout.samples_per_prompt and keep groups whole"
        )
    whole_batch = groups.rewards + groups.spread(groups.minima - groups.minima.min())
    values = whole_batch if single else groups.centred()
    return ((values - values.mean()) / (values.std() + STD_EPS)).float()


def qae(rewards: Tensor, prompt_ids: Tensor, config: AlgorithmConfig) -> Tensor:
    """`(r - b) / (std + 1e-6)` with b the group's K-quantile, K = `config.qae_quantile`; `[B]` float32, without unit.

    b is the paper's `inf {x : F(x) >= K}`, F the empirical distribution: the ceil(K * n)-th smallest reward, never
    interpolated. Binary rewards therefore fall into the two regimes exactly: success rate p <= 1 - K gives b = 0 (only
    the rare successes are reinforced), p > 1 - K gives b = 1 (only the remaining failures are punished). The authors'
    code interpolates (torch.quantile's default), which puts b between 0 and 1 near p = 1 - K; the paper is followed.

    Raises: ValueError for a prompt with one sample, and as the module says.
    Source: arXiv 2509.22611; the authors' repository junkangwu/QAE.
    """
    groups = _group(rewards, prompt_ids, "qae")
    by_reward = groups.rewards.argsort()
    order = by_reward[groups.index[by_reward].argsort(stable=True)]  # by group, then by reward
    starts = groups.sizes.cumsum(0) - groups.sizes
    # 0.28 * 25 is 7.000000000000001: without the tolerance the 8th reward would be taken for the 7th
    ranks = (config.qae_quantile * groups.sizes - 1e-9).ceil().clamp_min(1)
    baselines = groups.rewards[order][(starts + ranks - 1).long()]
    return ((groups.rewards - groups.spread(baselines)) / (groups.std() + STD_EPS)).float()


ADVANTAGES: dict[str, Callable[[Tensor, Tensor, AlgorithmConfig], Tensor]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "qae": qae,
}


def _group(rewards: Tensor, prompt_ids: Tensor, needs_two: str | None) -> _Groups:
    if rewards.dim() != 1 or rewards.shape != prompt_ids.shape or not len(rewards):
        raise ValueError(
            f"expected rewards and prompt_ids of one shape [B] with B > 0, got {list(rewards.shape)} and "
            f"{list(prompt_ids.shape)}"
        )
    rewards = rewards.detach().double()
    bad = int((~rewards.isfinite()).sum())
    if bad:
        raise ValueError(
            f"{bad} of {len(rewards)} rewards are not finite; the reward function must return a finite number "
            "for every sample"
        )
    _, index, counts = prompt_ids.unique(return_inverse=True, return_counts=True)
    single = int((counts == 1).sum())
    if needs_two and single:
        raise ValueError(
            f"{needs_two} compares the samples of one prompt: {single} of {len(counts)} prompts have one sample; "
            "set rollout.samples_per_prompt to at least 2 and keep groups whole"
        )
    minima = torch.full((len(counts),), math.inf, dtype=torch.float64, device=rewards.device)
    minima.scatter_reduce_(0, index, rewards, "amin")
    return _Groups(rewards - minima[index], index, counts.double(), minima)
