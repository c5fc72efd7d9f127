"""What several methods share: weighing the tokens of a mini-batch, and selecting some of them by their covariance."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from megatron_rl.algorithms.later import LossInputs, LossOutputs, MiniBatch, Ranks, Tensor, covariance, terms, weighting
from megatron_rl.algorithms.policy_loss import ClippedLoss, PolicyLoss, Statistics
from megatron_rl.section import Fraction

PERCENTAGE = 0.02  # a fraction of that size, where it selects many tokens, was probably meant as a percentage
MANY_TOKENS = 1000


class WeightedLoss(ClippedLoss):
    """PPO's clipped surrogate, multiplied per token by `weights`, a statistic of the mini-batch."""

    stats: Statistics = "current"
    """Weights of the policy under which the tokens' statistics are computed; old is free and one update stale."""

    @property
    def statistics(self) -> Statistics:
        """Return `stats`."""
        return self.stats

    def weights(self, mini_batch: MiniBatch, ranks: Ranks) -> Tensor:
        """Return the weight of each of this rank's response tokens, float64 `[N]`; some rank has one."""
        raise NotImplementedError

    def mark(self, mini_batch: MiniBatch, ranks: Ranks, *, seed: int, step: int) -> MiniBatch:
        """Return the mini-batch with `weights` in `surrogate_weights`."""
        return weighting.weigh(mini_batch, self.weights, ranks)

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        """Return PPO's clipped surrogate times `inputs.surrogate_weights`."""
        inputs = terms.without_masked(inputs)
        weights, ratio = terms.marked("surrogate_weights", inputs, self), terms.ratio(inputs)
        surrogate, metrics = terms.clipped_surrogate(ratio, inputs, self)
        return terms.total(inputs, self, weights * surrogate, metrics, ratio)


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

    def priority(self, part: MiniBatch, cov: Tensor, counter: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """Return (candidates, priority) of the response tokens whose covariances are `cov`: bool and float64 `[N]`.

        counter: seed, step and mini-batch, for what is drawn by hash.
        """
        raise NotImplementedError

    def mark(self, mini_batch: MiniBatch, ranks: Ranks, *, seed: int, step: int) -> MiniBatch:
        """Return the mini-batch with the selected tokens in `selected`."""
        counter, options = (seed, step, mini_batch.index), (self.cov_scope, self.cov_estimator)
        return covariance.select_tokens(mini_batch, self.priority, self.select_fraction, options, ranks, counter)

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
