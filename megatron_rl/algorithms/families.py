"""What several methods share: weighing the tokens of a mini-batch, and selecting some of them by their covariance.

Each statistic runs over the response tokens of all ranks and micro-batches, so the layout never changes a weight or a
choice. The papers' own code takes it over one micro-batch.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal

from megatron_rl.algorithms.later import (
    Flags,
    LossInputs,
    LossOutputs,
    MiniBatch,
    Number,
    Numbers,
    Ranks,
    covariance,
    terms,
    torch,
)
from megatron_rl.algorithms.policy_loss import ClippedLoss, PolicyLoss, Statistics
from megatron_rl.algorithms.section import Fraction

PERCENTAGE = 0.02  # a fraction of that size, where it selects many tokens, was probably meant as a percentage
MANY_TOKENS = 1000
SMALL_BOUND = 1e-12  # values that differ by no more are the same up to rounding


class WeightedLoss(ClippedLoss):
    """PPO's clipped surrogate, multiplied per token by `weights`, a statistic of the mini-batch."""

    stats: Statistics = "current"
    """Weights of the policy under which the tokens' statistics are computed; old is free and one update stale."""

    @property
    def statistics(self) -> Statistics:
        """Return `stats`."""
        return self.stats

    def weights(self, mini_batch: MiniBatch, ranks: Ranks) -> Numbers:
        """Return the weight of each of this rank's response tokens; some rank has one."""
        raise NotImplementedError

    def mark(self, mini_batch: MiniBatch, ranks: Ranks, *, seed: int, step: int) -> MiniBatch:
        """Return the mini-batch with `weights` in `surrogate_weights`; all 0 where no rank has a token.

        Metrics: `weight/min`, and `weight/effective_fraction` = (sum w)^2 / (N sum w^2), which is 1 for equal weights
        and keep_fraction for 80/20.
        """
        masks = [micro_batch.loss_mask for micro_batch in mini_batch.micro_batches]
        if not int(ranks.sum(torch.stack([mask.sum() for mask in masks]).sum())):  # no token on any rank
            nothing = [torch.zeros_like(micro_batch.advantages) for micro_batch in mini_batch.micro_batches]
            return mini_batch.replace_each("surrogate_weights", nothing)
        weights = self.weights(mini_batch, ranks)
        count, total, squares = _power_sums(weights, ranks).tolist()
        smallest = -float(ranks.max(torch.cat([-weights, weights.new_tensor([-math.inf])]).max()))
        everywhere = weights.new_zeros(sum(map(len, masks)), dtype=torch.float32)  # 0 outside loss_mask
        everywhere = everywhere.masked_scatter(torch.cat(masks), weights.float())
        mini_batch = mini_batch.replace_each("surrogate_weights", everywhere.split([len(mask) for mask in masks]))
        metrics = {"weight/min": smallest, "weight/effective_fraction": total**2 / (count * squares)}
        return mini_batch.with_selection(metrics)

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        """Return PPO's clipped surrogate times `inputs.surrogate_weights`."""
        inputs = terms.without_masked(inputs)
        weights, ratio = terms.marked("surrogate_weights", inputs, self), terms.ratio(inputs)
        surrogate, metrics = terms.clipped_surrogate(ratio, inputs, self)
        return terms.total(inputs, self, weights * surrogate, metrics, ratio)


def moments(values: Numbers, ranks: Ranks) -> tuple[Number, Number, Number]:
    """Return mean and standard deviation (divisor N) of all ranks' values, and N: scalars. One collective."""
    sums = _power_sums(values, ranks)
    mean, square = sums[1:] / sums[0]
    return mean, (square - mean**2).clamp_min(0).sqrt(), sums[0]


def _power_sums(values: Numbers, ranks: Ranks) -> Numbers:
    """Return how many values all ranks have, their sum and the sum of their squares. A collective."""
    total = values.sum()
    return ranks.sum(torch.stack([torch.full_like(total, values.numel()), total, (values**2).sum()]))


def outliers(mini_batch: MiniBatch, values: Numbers, bound: Number) -> Flags:
    """Return which response tokens have A < 0 and a value above the bound; none where the bound is about 0."""
    return (mini_batch.cat("advantages") < 0) & (values > bound) & (bound > SMALL_BOUND)


class CovarianceLoss(PolicyLoss):
    """Selects the tokens of highest `priority`, which goes by their covariance (arXiv 2505.22617)."""

    restraints = {"select_fraction": 1}

    cov_scope: Literal["minibatch", "microbatch"] = "minibatch"
    """Tokens over which means, quota and top-k run; microbatch reproduces the authors' code."""
    cov_logprobs: Statistics = "current"
    """Weights under which the covariance is computed; old is free and one update stale."""
    cov_estimator: Literal["batch", "vocab"] = "batch"
    """batch: Theorem 2; vocab: Theorem 1 per state, exact over the vocabulary."""
    select_fraction: Fraction
    """Fraction of the mini-batch's response tokens that is selected."""

    @property
    def statistics(self) -> Statistics:
        """Return `cov_logprobs`."""
        return self.cov_logprobs

    def priority(self, part: MiniBatch, cov: Numbers, counter: tuple[int, int, int]) -> tuple[Any, Numbers]:
        """Return which response tokens are candidates, bool `[N]`, and the priorities of all, from their covariances.
        counter: seed, step and mini-batch, for what is drawn by hash."""
        raise NotImplementedError

    def mark(self, mini_batch: MiniBatch, ranks: Ranks, *, seed: int, step: int) -> MiniBatch:
        """Return the mini-batch with `selected`: of all N response tokens the floor(select_fraction * N), at least one,
        of highest priority, a distributed top-k. Metrics: `select/*`, global."""
        counter, logprobs = (seed, step, mini_batch.index), mini_batch.cat_stats("logprobs")
        cov, count = covariance.covariance(logprobs, mini_batch.cat("advantages"), ranks)
        if count == 0:  # overlong filtering can mask a whole mini-batch
            nothing = [torch.zeros_like(micro_batch.loss_mask) for micro_batch in mini_batch.micro_batches]
            return mini_batch.replace_each("selected", nothing)
        if self.cov_scope == "minibatch":
            values, offered = self._offer(mini_batch, cov, counter)
            _, winners = ranks.top_k(values, offered, covariance.quota(self.select_fraction, count))
            chosen = _marked(mini_batch, winners)
        else:
            parts = [dataclasses.replace(mini_batch, micro_batches=(each,)) for each in mini_batch.micro_batches]
            chosen = [self._choose_within(part, counter) for part in parts]
        mini_batch = mini_batch.replace_each("selected", chosen)
        kept = (torch.ones_like(logprobs), logprobs, mini_batch.cat_stats("entropy"))
        selected = mini_batch.cat("selected")
        picked = torch.stack([torch.where(selected, value, 0.0).double().sum() for value in kept])
        number, logp, entropy = ranks.sum(picked).tolist()
        metrics = {"select/count": number, "select/fraction": number / count}
        if number:
            metrics |= {"select/logprob_mean": logp / number, "select/entropy_mean": entropy / number}
        return mini_batch.with_selection(metrics)

    def _offer(self, part: MiniBatch, cov: Numbers, counter: tuple[int, int, int]) -> tuple[Numbers, Any]:
        """Return the candidates' priorities and global ids."""
        exact = covariance.spent(part) if self.cov_estimator == "vocab" else cov
        candidates, values = self.priority(part, exact, counter)
        return values[candidates], part.cat("token_ids_global")[candidates]

    def _choose_within(self, part: MiniBatch, counter: tuple[int, int, int]) -> Any:
        """Return `selected` [T] of one micro-batch by itself: what `cov_scope=microbatch`, the authors' code, sees."""
        cov, count = covariance.covariance(part.cat_stats("logprobs"), part.cat("advantages"), None)
        if count == 0:
            return torch.zeros_like(part.micro_batches[0].loss_mask)
        values, offered = self._offer(part, cov, counter)
        # torch's own top-k, ties as they come, as the authors call it
        best = values.topk(min(covariance.quota(self.select_fraction, count), len(offered))).indices
        return _marked(part, offered[best])[0]

    def faults(self, config: Any) -> Iterator[str]:
        """Yield why the layout cannot select within a micro-batch."""
        if config.parallel.cp > 1 and self.cov_scope == "microbatch":
            yield (
                f"loss.cov_scope=microbatch ranks the tokens of one process, and parallel.cp={config.parallel.cp} "
                "spreads each sequence over several; set cov_scope=minibatch, which is exact under any layout, or cp=1"
            )

    def notes(self, config: Any) -> Iterator[str]:
        """Yield what keeps the loss from selecting as intended, with its remedy."""
        longest = config.max_sequence_tokens
        sequences = config.train.prompts_per_minibatch * config.rollout.samples_per_prompt
        least = 2 * config.parallel.dp * config.parallel.micro_batch_multiple
        lone = "a micro-batch may hold one sequence, whose tokens share one advantage, so that their covariance is 0"
        if self.cov_scope == "microbatch" and config.train.micro_batch_tokens < 2 * longest:
            yield (
                f"loss.cov_scope=microbatch with train.micro_batch_tokens={config.train.micro_batch_tokens}: {lone}. "
                f"Use cov_scope=minibatch, or raise micro_batch_tokens to {2 * longest} or more, twice the longest "
                "sequence"
            )
        if self.cov_scope == "microbatch" and sequences < least:
            yield (
                f"loss.cov_scope=microbatch with {sequences} sequences in a mini-batch (prompts_per_minibatch * "
                f"samples_per_prompt): {lone}. Use cov_scope=minibatch, or at least {least} sequences"
            )
        tokens = sequences * config.rollout.max_response_tokens
        selected = int(self.select_fraction * tokens)
        if self.select_fraction >= PERCENTAGE and selected > MANY_TOKENS:
            yield (
                f"loss.select_fraction={self.select_fraction} selects up to {selected} of {tokens} tokens; it is a "
                "fraction, never a percentage: the paper's 0.2% is 0.002"
            )


def _marked(mini_batch: MiniBatch, winners: Any) -> list[Any]:
    """Return [T] per micro-batch, True on the tokens whose global ids won."""
    # padding and prompt positions are no candidates, so masking again drops their ids (the padding id is -1)
    return [torch.isin(each.token_ids_global, winners) & each.loss_mask for each in mini_batch.micro_batches]
