"""Token sampling whose randomness comes in as numbers that the caller hashes (algorithms/hashing.py)."""

import torch
from torch import Tensor

# float64 copies of the logits are made for this many entries at a time: 64 MiB a copy at any vocabulary
_BLOCK_ENTRIES = 1 << 23


def sample_tokens(
    logits: Tensor, uniform: Tensor, temperature: float, top_p: float = 1.0, top_k: int = 0
) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling of one token per row, in vocabulary order and float64.

    Args:
        logits: [B, V], any floating type; -inf forbids a token.
        uniform: [B] float64 in [0, 1).
        temperature: divides the logits; 0 takes the likeliest token and reports its log-probability at temperature 1.
        top_p: keep the smallest set of likeliest tokens whose mass reaches top_p (of the full distribution); 1 keeps
        all. top_k: keep the k likeliest tokens; 0 keeps all. With top_p, a token must pass both. Ties go to the lower
        id.

    Returns: tokens [B] int64 and their log-probabilities [B] float32, nats, under the distribution that they were drawn
        from: temperature-scaled and, with top_p or top_k, renormalised over the tokens kept. Then the importance weight
        against them (loss.rollout_correction) corrects for the cut. A row with a NaN has a NaN log-probability; the
        caller must look.
    """
    rows = max(1, _BLOCK_ENTRIES // logits.shape[-1])
    pairs = zip(logits.split(rows), uniform.split(rows), strict=True)
    blocks = [_sample_block(block, part, temperature, top_p, top_k) for block, part in pairs]
    return torch.cat([tokens for tokens, _ in blocks]), torch.cat([logprobs for _, logprobs in blocks])


def _sample_block(
    logits: Tensor, uniform: Tensor, temperature: float, top_p: float, top_k: int
) -> tuple[Tensor, Tensor]:
    scaled = logits.double()
    if temperature not in (0.0, 1.0):
        scaled.div_(temperature)
    scaled.sub_(scaled.amax(-1, keepdim=True))
    weights = scaled.exp()
    if temperature == 0:
        tokens, total = logits.argmax(-1, keepdim=True), weights.sum(-1, keepdim=True)
    else:
        if top_p < 1 or top_k > 0:
            scaled.sub_(weights.sum(-1, keepdim=True).log_())
            weights = _truncate(scaled.exp(), top_p, top_k)
        cdf = cumsum(weights)
        total = cdf[:, -1:]
        # a product rounded up to the total would fall behind the last token that has mass
        drawn = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))
        tokens = torch.searchsorted(cdf, drawn, right=True).clamp_(max=logits.shape[-1] - 1)  # of NaN: behind the end
    return tokens[:, 0], (scaled.gather(-1, tokens) - total.log())[:, 0].float()


def _truncate(probs: Tensor, top_p: float, top_k: int) -> Tensor:
    ranked, order = probs.sort(dim=-1, descending=True, stable=True)
    drop = cumsum(ranked) - ranked >= top_p if top_p < 1 else torch.zeros_like(ranked, dtype=torch.bool)
    if top_k > 0:
        drop[:, top_k:] = True
    return torch.zeros_like(probs).scatter(-1, order, ranked.masked_fill(drop, 0.0))


def cumsum(rows: torch.Tensor) -> torch.Tensor:
    """Return the running sums of `[B, V]` along V, the same bits in every run.

    Deterministic algorithms forbid float sums of this kind on a GPU, though of torch's two kernels only the one for a
    single row takes blocks as they come (ATen/native/cuda/ScanUtils.cuh).
    """
    if not torch.are_deterministic_algorithms_enabled():
        return rows.cumsum(-1)
    torch.use_deterministic_algorithms(False)
    try:
        return rows.expand(2, -1).cumsum(-1)[:1] if len(rows) == 1 else rows.cumsum(-1)
    finally:
        torch.use_deterministic_algorithms(True)
