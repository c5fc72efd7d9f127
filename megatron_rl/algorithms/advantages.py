"""Advantages from verifiable rewards: one number per sample, compared with the other samples of the same prompt.

Every estimator is `fn(rewards, prompt_ids, config) -> advantages`:

- `rewards`, in reward units: the whole step's samples, of every data-parallel rank, because `reinforce_pp` whitens over
  the batch and siblings (the samples of one prompt) must not be parted;
- `prompt_ids`: siblings share an id; any order;
- `config`: the section `algorithm`;
- the result is computed in float64. Siblings of equal rewards get exactly 0.

Standard deviations are unbiased (divisor n - 1), like torch.std and verl. All raise ValueError on non-finite rewards,
on shapes that differ, on an empty batch, and all but `reinforce_pp` on a prompt with one sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_rl.types import Float, Float32, Float64, Int64

STD_EPS = 1e-6  # added to a standard deviation, reward units; the value of GRPO in verl


@dataclass(frozen=True, slots=True)
class _ByPrompt:
    """The batch by prompt. `rewards` are measured from the prompt's smallest, which changes no relative advantage and
    makes the mean of equal rewards exact: otherwise its 1e-17 rounding error would be divided by STD_EPS."""

    rewards: Float64[Tensor, "B"]  # >= 0
    index: Int64[Tensor, "B"]  # which prompt, of G, a sample answers
    sizes: Float64[Tensor, "G"]  # its samples
    minima: Float64[Tensor, "G"]

    def sums(self, values: Float64[Tensor, "B"]) -> Float64[Tensor, "G"]:
        """Return each prompt's sum."""
        return torch.zeros_like(self.sizes).index_add_(0, self.index, values)

    def spread(self, values: Float64[Tensor, "G"]) -> Float64[Tensor, "B"]:
        """Give each sample its prompt's value."""
        return values[self.index]

    def centred(self) -> Float64[Tensor, "B"]:
        """Return the rewards minus their prompt's mean."""
        return self.rewards - self.spread(self.sums(self.rewards) / self.sizes)

    def std(self) -> Float64[Tensor, "B"]:
        """Return the unbiased standard deviation of each sample's siblings, itself included."""
        return self.spread((self.sums(self.centred() ** 2) / (self.sizes - 1)).sqrt())


def grpo(rewards: Float[Tensor, "B"], prompt_ids: Int64[Tensor, "B"], config: Any) -> Float32[Tensor, "B"]:
    """Return `(r - mean) / (std + 1e-6)` over the siblings; without unit.

    Source: arXiv 2402.03300, section 4.1.2; verl `compute_grpo_outcome_advantage`.
    """
    by_prompt = _by_prompt(rewards, prompt_ids, "grpo")
    return (by_prompt.centred() / (by_prompt.std() + STD_EPS)).float()


def dr_grpo(rewards: Float[Tensor, "B"], prompt_ids: Int64[Tensor, "B"], config: Any) -> Float32[Tensor, "B"]:
    """Return `r - mean` over the siblings, in reward units. No division, hence no bias towards easy or hard prompts.

    Source: arXiv 2503.20783, section 3.2.
    """
    return _by_prompt(rewards, prompt_ids, "dr_grpo").centred().float()


def rloo(rewards: Float[Tensor, "B"], prompt_ids: Int64[Tensor, "B"], config: Any) -> Float32[Tensor, "B"]:
    """Return `r` minus the mean of the *other* siblings, in reward units.

    It equals `(r - mean) * n / (n - 1)`, which is how it is computed.
    Source: arXiv 2402.14740.
    """
    by_prompt = _by_prompt(rewards, prompt_ids, "rloo")
    return (by_prompt.centred() * by_prompt.spread(by_prompt.sizes / (by_prompt.sizes - 1))).float()


def reinforce_pp(rewards: Float[Tensor, "B"], prompt_ids: Int64[Tensor, "B"], config: Any) -> Float32[Tensor, "B"]:
    """Return `x = r - mean` over the siblings, whitened over the batch: `(x - mean(x)) / (std(x) + 1e-6)`.

    With one sample for every prompt there is none to compare with and the prompt's mean would erase everything, so the
    rewards are whitened as they are: the paper's plain REINFORCE++ (k = 1). Moments are over samples; verl's are over
    response tokens, so that long responses weigh more.

    Raises: ValueError when only some prompts have one sample (raw and centred rewards share no scale), for a batch of
    one sample, and as the module says.
    Source: arXiv 2501.03262; verl `compute_reinforce_plus_plus_baseline_outcome_advantage`.
    """
    by_prompt = _by_prompt(rewards, prompt_ids, None)
    single = int((by_prompt.sizes == 1).sum())
    if len(by_prompt.rewards) == 1 or 0 < single < len(by_prompt.sizes):
        raise ValueError(
            f"reinforce_pp: got {len(by_prompt.rewards)} samples, {single} of {len(by_prompt.sizes)} prompts with one; "
            "expected at least two samples, and one for every prompt or several for every prompt: "
            "set rollout.samples_per_prompt and keep the samples of a prompt together"
        )
    whole_batch = by_prompt.rewards + by_prompt.spread(by_prompt.minima - by_prompt.minima.min())
    values = whole_batch if single else by_prompt.centred()
    return ((values - values.mean()) / (values.std() + STD_EPS)).float()


def qae(rewards: Float[Tensor, "B"], prompt_ids: Int64[Tensor, "B"], config: Any) -> Float32[Tensor, "B"]:
    """Return `(r - b) / (std + 1e-6)` with b the siblings' K-quantile, K = `config.qae_quantile`; without unit.

    b is the paper's `inf {x : F(x) >= K}`, F the empirical distribution: the ceil(K * n)-th smallest reward, never
    interpolated. Binary rewards therefore fall into the two regimes exactly: success rate p <= 1 - K gives b = 0 (only
    the rare successes are reinforced), p > 1 - K gives b = 1 (only the remaining failures are punished). The authors'
    code interpolates (torch.quantile's default), which puts b between 0 and 1 near p = 1 - K; the paper is followed.

    Source: arXiv 2509.22611; the authors' repository junkangwu/QAE.
    """
    by_prompt = _by_prompt(rewards, prompt_ids, "qae")
    by_reward = by_prompt.rewards.argsort()
    order = by_reward[by_prompt.index[by_reward].argsort(stable=True)]  # by prompt, then by reward
    starts = by_prompt.sizes.cumsum(0) - by_prompt.sizes
    # 0.28 * 25 is 7.000000000000001: without the tolerance the 8th reward would be taken for the 7th
    ranks = (config.qae_quantile * by_prompt.sizes - 1e-9).ceil().clamp_min(1)
    baselines = by_prompt.rewards[order][(starts + ranks - 1).long()]
    return ((by_prompt.rewards - by_prompt.spread(baselines)) / (by_prompt.std() + STD_EPS)).float()


ADVANTAGES: dict[str, Callable[[Tensor, Tensor, Any], Tensor]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "qae": qae,
}


def _by_prompt(rewards: Tensor, prompt_ids: Tensor, needs_two: str | None) -> _ByPrompt:
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
            "set rollout.samples_per_prompt to at least 2 and keep the samples of a prompt together"
        )
    minima = torch.full((len(counts),), math.inf, dtype=torch.float64, device=rewards.device)
    minima.scatter_reduce_(0, index, rewards, "amin")
    return _ByPrompt(rewards - minima[index], index, counts.double(), minima)
