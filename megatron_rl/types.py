"""The nouns of the RL step, as frozen dataclasses.

Two shapes occur: `[L]` is one sample (prompt and response together), `[T]` the packed tokens of one micro-batch.
Every `[T]` tensor of a `MicroBatch` is aligned with the *logits*: entry t describes the prediction of `labels[t]`
made at position t, so `labels[t]` is the token that follows `token_ids[t]` in its sequence. The last position of a
sequence predicts nothing and has `loss_mask` False.

One spelling for four policies: bare `logprobs` (the current weights), `old_` (at the start of the step), `rollout_`
(as the engine sampled), `ref_` (the frozen reference). All log-probabilities and entropies are in nats.

Shapes in signatures: `Float[Tensor, "T V"]` is a floating-point tensor of two dimensions. Tests check them at every
call, by jaxtyping and beartype (tests/conftest.py); a run does not, and needs neither installed.

Within one call a letter stands for one length. The letters:

| letter | length                                                                                              |
|--------|-----------------------------------------------------------------------------------------------------|
| T      | packed tokens of a micro-batch, padding included; under context parallelism this rank's             |
| M      | tokens that the model computes for a micro-batch: fewer than T where samples share their prompt      |
| B      | rollouts of a step                                                                                  |
| S      | sequences of a micro-batch                                                                          |
| E      | their S + 1 boundaries in the packed tokens (`cu_seqlens`); the S sequences themselves are "E-1"    |
| N      | response tokens of a mini-batch: in a shape this rank's, in a formula those of all ranks            |
| V      | columns of the vocabulary that this rank holds, padding included                                    |
| H      | hidden size                                                                                         |
| G      | prompts, or other groups of what is summed up                                                       |
| R      | ranks                                                                                               |
| k      | selected                                                                                            |
| C      | columns of a table                                                                                  |

"..." is any shape, "" a scalar, and a number that number. `Float` is any floating-point type, `Int` any integer type,
`Shaped` any type at all; a number behind the name is the number of bits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:  # `as`: for the files that import them from here
    from jaxtyping import Bool as Bool
    from jaxtyping import Float as Float
    from jaxtyping import Float32 as Float32
    from jaxtyping import Float64 as Float64
    from jaxtyping import Int as Int
    from jaxtyping import Int32 as Int32
    from jaxtyping import Int64 as Int64
    from jaxtyping import Shaped as Shaped
else:
    try:
        from jaxtyping import Bool, Float, Float32, Float64, Int, Int32, Int64, Shaped
    except ImportError:

        class _Unchecked:
            """Stands for all of them: `_Unchecked[Tensor, "T V"]` is Tensor."""

            def __class_getitem__(cls, tensor_and_shape: tuple[type, str]) -> type:
                return tensor_and_shape[0]

        Bool = Float = Float32 = Float64 = Int = Int32 = Int64 = Shaped = _Unchecked


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


class Lengths(NamedTuple):
    """A rollout's tokens, counted."""

    total: int
    prompt: int  # before the first that the policy drew; all when it drew none
    response: int  # that the policy drew


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled response to one prompt, with what the verifier and the reward shaping made of it.

    `sampled` says which tokens the policy drew, `counts` whether they enter the loss: a response that overlong
    filtering takes out keeps its tokens, its length and its reward.
    """

    prompt_id: int
    sample_index: int
    token_ids: Tensor  # [L] int64, prompt then response (stop token included when one was sampled)
    rollout_logprobs: Tensor  # [L] float32, nats, of the token at the same index; 0 on the prompt
    sampled: Tensor  # [L] bool, True where the policy sampled the token
    finish_reason: str  # "stop" or "length"
    weight_version: int  # of the oldest weights that sampled a token of it
    score: float = math.nan  # the verifier's verdict
    reward: float = math.nan  # score plus penalties: what the advantage estimator sees
    error: str = ""  # why grading failed; such a rollout scores 0 and is counted in the metrics
    spans: tuple[tuple[int, int], ...] = ()  # (weight_version, tokens), in order; empty: all by `weight_version`
    unfinished: str = ""  # "deadline" or "crash" when the verifier was ended over this response, which scores 0
    terms: tuple[float, ...] = ()  # values of reward.terms, in their order
    routes: Tensor | None = None  # [L, mixture layers, top_k], the engine's experts; see models/expert_routes.py
    counts: bool = True  # False: no loss, and no share of the denominators
    known_lengths: Lengths | None = None  # known where another rank holds the tokens, whose tensors have no data here

    @property
    def has_tokens(self) -> bool:
        """Tell whether this rank holds the tokens."""
        return not self.token_ids.is_meta

    @property
    def lengths(self) -> Lengths:
        """Return how many tokens it has."""
        if self.known_lengths is not None:
            return self.known_lengths
        drawn = self.sampled.nonzero()
        return Lengths(len(self.token_ids), int(drawn[0]) if len(drawn) else len(self.token_ids), len(drawn))

    @property
    def response_length(self) -> int:
        """Return the number of sampled tokens."""
        return self.lengths.response

    @property
    def response_ids(self) -> Tensor:
        """Return the sampled tokens, int64."""
        return self.token_ids[self.sampled]

    def replace(self, **changes: object) -> Rollout:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class CollectResult:
    """A step's rollouts, the same on every rank but for the tokens: a rank has those of the ones that it sampled."""

    rollouts: list[Rollout]  # samples_per_prompt per prompt, in the order of the draw, then by sample_index
    prompts_by_id: dict[int, Prompt]  # of those rollouts
    metrics: dict[str, float]  # over everything sampled in the step, dropped groups included


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the model computes for a micro-batch: M tokens in packed sequences."""

    token_ids: Int64[Tensor, "M"]
    position_ids: Int64[Tensor, "M"]  # behind a prefix they go on from it
    cu_seqlens: Int32[Tensor, "E"]  # trailing padding forms a last sequence of its own
    real: Bool[Tensor, "M"]  # no padding
    longest: int  # tokens of the longest sequence, over all context-parallel ranks
    prefixes: Int64[Tensor, "E-1"] | None = None  # which sequence holds the tokens before one's own, -1: none
    rows: Int64[Tensor, "T"] | None = None  # which output is that of position t of the micro-batch; None: the t-th


@dataclass(frozen=True, slots=True)
class TokenStats:
    """What one forward pass tells about each position, in nats (the two sums are without unit); float32 in a run."""

    logprobs: Float[Tensor, "T"]  # log pi(labels[t])
    entropy: Float[Tensor, "T"]  # H = -sum_a pi_a log pi_a
    sum_p2: Float[Tensor, "T"] | None = None  # sum_a pi_a^2
    sum_p2_logp: Float[Tensor, "T"] | None = None  # sum_a pi_a^2 log pi_a


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Packed sequences of one forward pass. All [T] tensors are logits-aligned.

    Where prompts are shared, a sequence holds a sample's predictions alone: from its prompt's last token to the last
    but one of the response. Else it holds the whole sample.
    Under context parallelism T counts this rank's tokens: its two chunks of every sequence, see parallel/context.py.
    """

    token_ids: Int64[Tensor, "T"]
    labels: Int64[Tensor, "T"]  # the next token; 0 where loss_mask is False
    position_ids: Int64[Tensor, "T"]  # in the sample
    response_positions: Int64[Tensor, "T"]  # which token of its response labels[t] is, from 0; 0 outside loss_mask
    response_lengths: Int64[Tensor, "T"]  # tokens of that response, on all context-parallel ranks; 0 outside loss_mask
    cu_seqlens: Int32[Tensor, "E"]  # boundaries in these T; trailing padding forms a last sequence of its own
    loss_mask: Bool[Tensor, "T"]  # True where labels[t] was sampled by the policy and counts
    advantages: Float32[Tensor, "T"]
    rollout_logprobs: Float32[Tensor, "T"]  # nats
    token_weights: Float32[Tensor, "T"]  # the weight that the loss aggregation gives the token; 0 outside loss_mask
    prompt_ids: Int64[Tensor, "T"]
    sample_indices: Int64[Tensor, "T"]
    token_ids_global: Int64[Tensor, "T"]  # unique in the step and independent of the layout; -1 on padding
    loss_denominator: int  # what this rank's part adds to the global denominator (tokens or sequences)
    num_sequences: int  # without the padding sequence
    longest: int  # tokens of the longest sequence, over all context-parallel ranks: nobody asks the device for it
    old_logprobs: Float[Tensor, "T"] | None = None  # nats
    old_entropy: Float[Tensor, "T"] | None = None  # nats, where a loss looks at it
    ref_logprobs: Float[Tensor, "T"] | None = None  # nats
    selected: Bool[Tensor, "T"] | None = None  # the tokens that Clip-Cov or KL-Cov picked
    surrogate_weights: Float32[Tensor, "T"] | None = None  # of the policy-gradient term, by the weighting losses
    stats: TokenStats | None = None  # at the start of the step; once tokens are selected, those of the selection
    routes: Tensor | None = None  # [T, mixture layers, top_k] of token_ids, on the CPU; see models/expert_routes.py
    inputs: Inputs | None = None  # where prompts are shared; None: the model computes these sequences

    def model_inputs(self) -> Inputs:
        """Return what the model computes."""
        real = self.token_ids_global >= 0
        return self.inputs or Inputs(self.token_ids, self.position_ids, self.cu_seqlens, real, self.longest)

    @property
    def computed_stats(self) -> TokenStats:
        """Return `stats`. Raises: ValueError when no forward pass has set them."""
        if self.stats is None:
            raise ValueError("micro-batch without stats: give it those of a forward pass with MiniBatch.with_stats")
        return self.stats

    def loss_inputs(self, stats: TokenStats, context: Ranks | None = None) -> LossInputs:
        """Return what a loss sees of this micro-batch: its fields of the same names, and `stats` as the current policy.

        `context`: the sum over context-parallel ranks, if there are several.
        Raises: ValueError when old_logprobs were never set.
        """
        if self.old_logprobs is None:
            raise ValueError("micro-batch without old_logprobs; call with_old_stats on the batch before updating")
        fields = {name: getattr(self, name) for name in _LOSS_FIELDS}
        return LossInputs(logprobs=stats.logprobs, entropy=stats.entropy, context=context, **fields)

    @property
    def num_tokens(self) -> int:
        """Return the number of response tokens that count."""
        return int(self.loss_mask.sum())

    def replace(self, **changes: object) -> MicroBatch:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """What one optimiser update sees on this data-parallel rank: the same number of micro-batches on every rank."""

    index: int  # within the step, from 0
    micro_batches: tuple[MicroBatch, ...]
    selection: Mapping[str, float] = field(default_factory=dict)  # metrics of the tokens that the method marked, global

    def replace_each(self, name: str, values: Sequence[Any]) -> MiniBatch:
        """Return a copy in which micro-batch i has `name` set to `values[i]`."""
        if len(values) != len(self.micro_batches):
            raise ValueError(f"{name}: got {len(values)} values for {len(self.micro_batches)} micro-batches")
        pairs = zip(self.micro_batches, values, strict=True)
        return dataclasses.replace(self, micro_batches=tuple(mb.replace(**{name: value}) for mb, value in pairs))

    def with_stats(self, stats: Sequence[TokenStats]) -> MiniBatch:
        """Return a copy whose micro-batches carry `stats`, one each."""
        return self.replace_each("stats", stats)

    def with_selection(self, metrics: Mapping[str, float]) -> MiniBatch:
        """Return a copy that tells these metrics besides those it has."""
        return dataclasses.replace(self, selection={**self.selection, **metrics})

    def to(self, device: torch.device) -> MiniBatch:
        """Return a copy on `device`."""
        return dataclasses.replace(self, micro_batches=tuple(_to(mb, device) for mb in self.micro_batches))

    def cat(self, name: str) -> Tensor:
        """Return the field `name` of the response tokens (`loss_mask`) of all micro-batches: `[N_local]`."""
        return self.response_tokens([getattr(mb, name) for mb in self.micro_batches])

    def cat_stats(self, name: str) -> Tensor:
        """Return the field `name` of the micro-batches' `stats`, of the response tokens: `[N_local]`."""
        return self.response_tokens([getattr(mb.computed_stats, name) for mb in self.micro_batches])

    def response_tokens(self, values: Sequence[Tensor]) -> Tensor:
        """Return the response tokens of `values`, a tensor [T] per micro-batch, with one wait: `[N_local]`."""
        return torch.cat(list(values))[torch.cat([mb.loss_mask for mb in self.micro_batches])]


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """One step's rollouts on this data-parallel rank, packed."""

    step: int
    mini_batches: tuple[MiniBatch, ...]  # in the order of the updates

    @property
    def micro_batches(self) -> list[MicroBatch]:
        """Return those of all mini-batches."""
        return [micro_batch for mini_batch in self.mini_batches for micro_batch in mini_batch.micro_batches]

    def to(self, device: torch.device) -> TrainBatch:
        """Return a copy on `device`."""
        return TrainBatch(self.step, tuple(mini_batch.to(device) for mini_batch in self.mini_batches))

    def with_old_stats(self, stats: Sequence[Sequence[TokenStats]]) -> TrainBatch:
        """Return a copy with the statistics at the step's start, per mini-batch and micro-batch, and old_logprobs."""
        old = [[each.logprobs for each in row] for row in stats]
        return self._with_each("stats", stats)._with_each("old_logprobs", old)

    def with_ref_logprobs(self, logprobs: Sequence[Sequence[Tensor]]) -> TrainBatch:
        """Return a copy with the reference policy's logprobs, listed per mini-batch and micro-batch."""
        return self._with_each("ref_logprobs", logprobs)

    def _with_each(self, name: str, values: Sequence[Sequence[Any]]) -> TrainBatch:
        pairs = zip(self.mini_batches, values, strict=True)
        return TrainBatch(self.step, tuple(mini_batch.replace_each(name, row) for mini_batch, row in pairs))


@runtime_checkable
class Ranks(Protocol):
    """The processes that hold other tokens, as the algorithms see them: global statistics, the same on every rank.
    parallel/reduce.py has the real one."""

    size: int

    def sum(self, values: Tensor) -> Tensor:
        """Return the element-wise sum over ranks."""

    def max(self, values: Tensor) -> Tensor:
        """Return the element-wise maximum over ranks."""

    def top_k(self, values: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the k largest values of all ranks and their ids."""

    def top_ks_and_sum(
        self, sets: Sequence[tuple[Tensor, Tensor, int]], sums: Tensor
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Return `top_k` of each (values, ids, k), and `sum` of `sums`."""

    def kth_largest(self, values: Tensor, k: int) -> float:
        """Return the k-th largest of all ranks' values."""

    def quantiles(self, values: Tensor, fractions: list[float]) -> list[float]:
        """Return exact quantiles over all ranks' values."""

    def gather_objects(self, value: Any) -> list[Any]:
        """Return every rank's value, in rank order."""

    def exchange_objects(self, values: Sequence[Any]) -> list[Any]:
        """Send value i to rank i; return what each rank sent to this one, in rank order."""


@dataclass(frozen=True, slots=True)
class LossInputs:
    """All that a loss may look at: one micro-batch; float32 in a run."""

    logprobs: Float[Tensor, "T"]  # with gradient
    entropy: Float[Tensor, "T"]  # with gradient
    old_logprobs: Float[Tensor, "T"]
    rollout_logprobs: Float[Tensor, "T"]
    ref_logprobs: Float[Tensor, "T"] | None
    advantages: Float[Tensor, "T"]
    loss_mask: Bool[Tensor, "T"]
    token_weights: Float[Tensor, "T"]  # of the aggregation; 0 outside loss_mask
    cu_seqlens: Int32[Tensor, "E"]
    selected: Bool[Tensor, "T"] | None
    surrogate_weights: Float[Tensor, "T"] | None = None  # of the policy-gradient term, without gradient; None: 1
    old_entropy: Float[Tensor, "T"] | None = None  # nats; set by the losses that look at it
    context: Ranks | None = None  # over the ranks that hold the rest of these sequences; None: they are whole


@dataclass(frozen=True, slots=True)
class LossOutputs:
    """`loss_sum`, with gradient, is a sum over tokens, a metric is (sum, count): added up, and divided once, exact."""

    loss_sum: Float[Tensor, ""]
    metrics: dict[str, Float64[Tensor, "2"]]


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """What one optimizer update reports, the same on every rank but `sums`: this data-parallel rank's part."""

    sums: dict[str, Tensor]  # metric -> float64 [2], (sum, count); on the host where there are several pipeline stages
    grad_norm: float
    learning_rate: float
    skipped: bool  # a non-finite gradient (grad_norm says so) or no counted token on any rank: the weights did not move


_LOSS_FIELDS = {f.name for f in dataclasses.fields(LossInputs)} & {f.name for f in dataclasses.fields(MicroBatch)}


def _to(micro_batch: MicroBatch, device: torch.device) -> MicroBatch:
    # routes of a whole step are large, and the forward passes need those of one micro-batch at a time
    moved = micro_batch.replace(**_tensors(micro_batch, device) | {"routes": micro_batch.routes})
    inputs = micro_batch.inputs
    return moved.replace(inputs=inputs and dataclasses.replace(inputs, **_tensors(inputs, device)))


def _tensors(holder: Any, device: torch.device) -> dict[str, Any]:
    values = {each.name: getattr(holder, each.name) for each in dataclasses.fields(holder)}
    return {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
