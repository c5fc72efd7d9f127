"""How token losses become one number.

Each mode gives every token a weight and every micro-batch a share of one denominator, both additive: the aggregate is
`sum(weights * loss) / sum(denominator)` over all micro-batches and data-parallel ranks of the mini-batch. Nothing is
ever divided by a micro-batch's own denominator, so packing and layout cannot change the loss.

A sequence counts when it has at least one counted token; padding and fully masked (overlong-filtered) ones do not.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_rl.types import Bool, Float32, Int, Int64, LossInputs, Shaped


def segment_ids(cu_seqlens: Int[Tensor, "E"], length: int) -> Int64[Tensor, "{length}"]:
    """Return which sequence each of `length` tokens belongs to. Sequences may be empty. No host sync."""
    positions = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(positions, cu_seqlens[1:].contiguous(), right=True)


def segment_sums(
    values: Shaped[Tensor, "T"], cu_seqlens: Int[Tensor, "E"], ids: Int64[Tensor, "T"]
) -> Shaped[Tensor, "E-1"]:
    """Return the sum of `values` over each sequence; `ids` are `segment_ids`. Differentiable."""
    return values.new_zeros(cu_seqlens.numel() - 1).index_add(0, ids, values)


def sequence_sums(values: Shaped[Tensor, "T"], inputs: LossInputs) -> Shaped[Tensor, "T"]:
    """Return for each token the sum of `values` over its whole sequence, wherever its tokens are; detached."""
    ids = segment_ids(inputs.cu_seqlens, values.numel())
    sums = segment_sums(values.detach(), inputs.cu_seqlens, ids)
    return (sums if inputs.context is None else inputs.context.sum(sums))[ids]


def sequence_means(values: Shaped[Tensor, "T"], inputs: LossInputs) -> Shaped[Tensor, "T"]:
    """Return for each token the mean of `values`, which are 0 elsewhere, over the counted tokens of its sequence."""
    counts = sequence_sums(inputs.loss_mask.to(values.dtype), inputs).clamp_min(1)
    return sequence_sums(values, inputs) / counts


def token_weights(
    mode: str, loss_mask: Bool[Tensor, "T"], cu_seqlens: Int[Tensor, "E"], constant_length: int
) -> tuple[Float32[Tensor, "T"], int]:
    """Return the tokens' weights (0 outside `loss_mask`) and what this micro-batch adds to the global denominator.

    cu_seqlens: from 0 to T. constant_length: in tokens, read by its mode only.

    - `token_mean`: 1; tokens (DAPO, arXiv 2503.14476, eq. 12).
    - `seq_mean_token_mean`: 1 / counted tokens of the sequence; sequences (GRPO, arXiv 2402.03300, eq. 3).
    - `seq_mean_token_sum`: 1; sequences.
    - `constant_length`: 1 / constant_length; sequences (Dr.GRPO, arXiv 2503.20783, section 3.2).

    Raises: ValueError on an unknown mode, boundaries that do not cover the tokens, or constant_length < 1.
    """
    if mode not in AGGREGATIONS:
        raise ValueError(f"aggregation {mode!r} is unknown; expected one of {', '.join(AGGREGATIONS)}")
    if loss_mask.dtype != torch.bool or int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != len(loss_mask):
        raise ValueError(
            f"expected a bool loss_mask [T] and cu_seqlens from 0 to T, got {loss_mask.dtype} {list(loss_mask.shape)} "
            f"and boundaries from {int(cu_seqlens[0])} to {int(cu_seqlens[-1])}"
        )
    if constant_length < 1:
        raise ValueError(
            f"constant_length must be at least 1 token (rollout.max_response_tokens), got {constant_length}"
        )
    ids = segment_ids(cu_seqlens, len(loss_mask))
    counts = segment_sums(loss_mask.long(), cu_seqlens, ids)
    denominator = int(counts.sum() if mode == "token_mean" else (counts > 0).sum())
    return loss_mask.float() * AGGREGATIONS[mode](counts.clamp_min(1)[ids], constant_length), denominator


# mode -> a token's weight, from the counted tokens of its sequence [T] (at least 1) and the constant length
AGGREGATIONS: dict[str, Callable[[Tensor, int], Tensor | float]] = {
    "token_mean": lambda counts, constant_length: 1.0,
    "seq_mean_token_mean": lambda counts, constant_length: 1.0 / counts,
    "seq_mean_token_sum": lambda counts, constant_length: 1.0,
    "constant_length": lambda counts, constant_length: 1.0 / constant_length,
}
