"""The nouns of the RL step, as frozen dataclasses.

Two shapes occur: `[L]` is one sample (prompt and response together), `[T]` the packed tokens of one micro-batch.
Every `[T]` tensor of a `MicroBatch` is aligned with the *logits*: entry t describes the prediction of `labels[t]`
made at position t, so `labels[t]` is the token that follows `token_ids[t]` in its sequence. The last position of a
sequence predicts nothing and has `loss_mask` False.

One spelling for four policies: bare `logprobs` (the current weights), `old_` (at the start of the step), `rollout_`
(as the engine sampled), `ref_` (the frozen reference). All log-probabilities and entropies are in nats.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem. `answer` is what the reward function gets; structured answers are JSON text."""

    prompt_id: int
    token_ids: tuple[int, ...]
    answer: str
    source: str


@dataclass(frozen=True, slots=True)
class Problems:
    """All prompts of a run. A `prompt_id` is the problem's row; evaluation rows count on after the training rows."""

    train: list[Prompt]
    eval: list[Prompt]


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled response to one prompt, with what the verifier and the reward shaping made of it."""

    prompt_id: int
    sample_index: int
    token_ids: Tensor  # [L] int64, prompt then response (stop token included when one was sampled)
    rollout_logprobs: Tensor  # [L] float32, nats, of the token at the same index; 0 on the prompt
    loss_mask: Tensor  # [L] bool, True where the policy sampled the token
    finish_reason: str  # "stop" or "length"
    weight_version: int  # of the oldest weights that sampled a token of it
    score: float = math.nan  # the verifier's verdict
    reward: float = math.nan  # score plus penalties: what the advantage estimator sees
    error: str = ""  # why grading failed; such a rollout scores 0 and is counted in the metrics
    spans: tuple[tuple[int, int], ...] = ()  # (weight_version, tokens), in order; empty: all by `weight_version`
    unfinished: str = ""  # "deadline" or "crash" when the verifier was ended over this response, which scores 0
    terms: tuple[float, ...] = ()  # values of reward.terms, in their order
    routes: Tensor | None = None  # [L, mixture layers, top_k], the engine's experts; see models/expert_routes.py

    @property
    def response_length(self) -> int:
        """Sampled tokens."""
        return int(self.loss_mask.sum())

    def replace(self, **changes: object) -> Rollout:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class CollectResult:
    """A step's rollouts, the same on every rank."""

    rollouts: list[Rollout]  # samples_per_prompt per prompt, in the order of the draw, then by sample_index
    prompts_by_id: dict[int, Prompt]  # of those rollouts
    metrics: dict[str, float]  # over everything sampled in the step, dropped groups included


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the model computes for a micro-batch: `[M]` tokens in packed sequences."""

    token_ids: Tensor  # int64
    position_ids: Tensor  # int64; behind a prefix they go on from it
    cu_seqlens: Tensor  # [S + 1] int32; trailing padding forms a last sequence of its own
    real: Tensor  # bool, no padding
    prefixes: Tensor | None = None  # [S] int64, which sequence holds the tokens before one's own, -1: none
    rows: Tensor | None = None  # [T] int64, which output is that of position t of the micro-batch; None: the t-th


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Packed sequences of one forward pass. All tensors `[T]`, logits-aligned, unless said otherwise.

    Where prompts are shared, a sequence holds a sample's predictions alone: from its prompt's last token to the last
    but one of the response. Else it holds the whole sample.
    Under context parallelism T counts this rank's tokens: its two chunks of every sequence, see parallel/context.py.
    """

    token_ids: Tensor  # int64
    labels: Tensor  # int64, the next token; 0 where loss_mask is False
    position_ids: Tensor  # int64, in the sample
    response_positions: Tensor  # int64, which token of its response labels[t] is, from 0; 0 outside loss_mask
    cu_seqlens: Tensor  # [S + 1] int32, boundaries in these T; trailing padding forms a last sequence of its own
    loss_mask: Tensor  # bool, True where labels[t] was sampled by the policy and counts
    advantages: Tensor  # float32
    rollout_logprobs: Tensor  # float32, nats
    token_weights: Tensor  # float32, the weight that the loss aggregation gives the token; 0 outside loss_mask
    prompt_ids: Tensor  # int64
    sample_indices: Tensor  # int64
    token_ids_global: Tensor  # int64, unique in the step and independent of the layout; -1 on padding
    loss_denominator: int  # what this rank's part adds to the global denominator (tokens or sequences)
    num_sequences: int  # without the padding sequence
    old_logprobs: Tensor | None = None  # float32, nats
    ref_logprobs: Tensor | None = None  # float32, nats
    selected: Tensor | None = None  # bool, the tokens that Clip-Cov or KL-Cov picked
    surrogate_weights: Tensor | None = None  # float32, of the policy-gradient term, by the weighting losses
    routes: Tensor | None = None  # [T, mixture layers, top_k] of token_ids, on the CPU; see models/expert_routes.py
    inputs: Inputs | None = None  # where prompts are shared; None: the model computes these sequences

    def model_inputs(self) -> Inputs:
        """What the model computes."""
        return self.inputs or Inputs(self.token_ids, self.position_ids, self.cu_seqlens, self.token_ids_global >= 0)

    @property
    def num_tokens(self) -> int:
        """Response tokens that count."""
        return int(self.loss_mask.sum())

    def replace(self, **changes: object) -> MicroBatch:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """What one optimiser update sees on this data-parallel rank: the same number of micro-batches on every rank."""

    index: int  # within the step, from 0
    micro_batches: tuple[MicroBatch, ...]

    def replace_each(self, name: str, values: Sequence[Tensor | None]) -> MiniBatch:
        """A copy in which micro-batch i has `name` set to `values[i]`."""
        if len(values) != len(self.micro_batches):
            raise ValueError(f"{name}: got {len(values)} tensors for {len(self.micro_batches)} micro-batches")
        pairs = zip(self.micro_batches, values, strict=True)
        return MiniBatch(self.index, tuple(mb.replace(**{name: value}) for mb, value in pairs))

    def to(self, device: torch.device) -> MiniBatch:
        """A copy on `device`."""
        return MiniBatch(self.index, tuple(_to(micro_batch, device) for micro_batch in self.micro_batches))

    def cat(self, name: str) -> Tensor:
        """Field `name` of the response tokens (`loss_mask`) of all micro-batches, concatenated: `[N_local]`."""
        return torch.cat([getattr(mb, name)[mb.loss_mask] for mb in self.micro_batches])


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """One step's rollouts on this data-parallel rank, packed."""

    step: int
    mini_batches: tuple[MiniBatch, ...]

    def minibatches(self) -> Iterator[MiniBatch]:
        """In the order of the updates."""
        return iter(self.mini_batches)

    def to(self, device: torch.device) -> TrainBatch:
        """A copy on `device`."""
        return TrainBatch(self.step, tuple(mini_batch.to(device) for mini_batch in self.mini_batches))

    def with_old_logprobs(self, stats: list[list[TokenStats]]) -> TrainBatch:
        """A copy whose old_logprobs are those of `stats`, listed per mini-batch and micro-batch."""
        return self._with("old_logprobs", [[stat.logprobs for stat in of_mini_batch] for of_mini_batch in stats])

    def with_ref_logprobs(self, logprobs: list[list[Tensor]]) -> TrainBatch:
        """A copy with the reference policy's logprobs, listed per mini-batch and micro-batch."""
        return self._with("ref_logprobs", logprobs)

    def _with(self, name: str, values: list[list[Tensor]]) -> TrainBatch:
        pairs = zip(self.mini_batches, values, strict=True)
        return TrainBatch(self.step, tuple(mini_batch.replace_each(name, of_it) for mini_batch, of_it in pairs))


@dataclass(frozen=True, slots=True)
class TokenStats:
    """What one forward pass tells about each position: `[T]` float32, nats (the two sums are without unit)."""

    logprobs: Tensor  # log pi(labels[t])
    entropy: Tensor  # H = -sum_a pi_a log pi_a
    sum_p2: Tensor | None = None  # sum_a pi_a^2
    sum_p2_logp: Tensor | None = None  # sum_a pi_a^2 log pi_a


@runtime_checkable
class Ranks(Protocol):
    """The processes that hold other tokens, as the algorithms see them: global statistics, the same on every rank.
    parallel/reduce.py has the real one."""

    def sum(self, values: Tensor) -> Tensor:
        """Return the element-wise sum over ranks."""
        ...

    def max(self, values: Tensor) -> Tensor:
        """Return the element-wise maximum over ranks."""
        ...

    def top_k(self, values: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the k largest values of all ranks and their ids."""
        ...

    def top_ks_and_sum(
        self, sets: Sequence[tuple[Tensor, Tensor, int]], sums: Tensor
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Return `top_k` of each (values, ids, k), and `sum` of `sums`, in one collective."""
        ...

    def kth_largest(self, values: Tensor, k: int) -> float:
        """Return the k-th largest of all ranks' values."""
        ...

    def quantiles(self, values: Tensor, fractions: list[float]) -> list[float]:
        """Return exact quantiles over all ranks' values."""
        ...

    def gather_objects(self, value: Any) -> list[Any]:
        """Return every rank's value, in rank order."""
        ...


@dataclass(frozen=True, slots=True)
class LossInputs:
    """All that a loss may look at: one micro-batch, `[T]` float32 unless said otherwise."""

    logprobs: Tensor  # with gradient
    entropy: Tensor  # with gradient
    old_logprobs: Tensor
    rollout_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor  # bool
    token_weights: Tensor  # of the aggregation; 0 outside loss_mask
    cu_seqlens: Tensor  # [S + 1] int32
    selected: Tensor | None  # bool
    surrogate_weights: Tensor | None = None  # of the policy-gradient term, without gradient; None: 1
    context: Ranks | None = None  # over the ranks that hold the rest of these sequences; None: they are whole


@dataclass(frozen=True, slots=True)
class LossOutputs:
    """`loss_sum` is a scalar with gradient: the sum over tokens, never a mean. Each metric is a tensor `[2]`: (sum,
    count), so that adding micro-batches and ranks and dividing once gives the exact global mean."""

    loss_sum: Tensor
    metrics: dict[str, Tensor]


def _to(micro_batch: MicroBatch, device: torch.device) -> MicroBatch:
    # routes of a whole step are large, and the forward passes need those of one micro-batch at a time
    moved = micro_batch.replace(**_tensors(micro_batch, device) | {"routes": micro_batch.routes})
    if micro_batch.inputs is None:
        return moved
    return moved.replace(inputs=dataclasses.replace(micro_batch.inputs, **_tensors(micro_batch.inputs, device)))


def _tensors(of: Any, device: torch.device) -> dict[str, Tensor]:
    values = {field.name: getattr(of, field.name) for field in dataclasses.fields(of)}
    return {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
