"""What each method would do with one mini-batch at the same weights."""

from typing import Any

import torch
from torch import Tensor

from megatron_rl.algorithms.policy_loss import PolicyLoss
from megatron_rl.algorithms.prediction import effective_advantages, predicted_change
from megatron_rl.parallel.reduce import Reducer
from megatron_rl.policy.gradients import entropy_gradient, gradient, inner
from megatron_rl.policy.policy import MegatronPolicy
from megatron_rl.types import MiniBatch, Ranks

RESTRAINED = 0.5  # of plain policy gradient's push: a token that gets less is restrained


def compare(
    policy: MegatronPolicy,
    mini_batch: MiniBatch,
    methods: dict[str, PolicyLoss],
    ranks: Reducer,
    *,
    seed: int,
    step: int,
) -> dict[str, Any]:
    """Return the comparison as plain data, the same on every rank. Collective; nothing moves.

    mini_batch: with `stats` under the current weights, with sum_p2. Per method, in `methods`: `restrained` tokens and
    their share (those that it selects, and those that get less than half of the push `A * ratio` of plain policy
    gradient: what clipping or a weight took), `weight/*` and `select/*` as training logs them, `predicted_change`
    (logits as free parameters, nats per unit of logit step), `grad_norm`, and `entropy_slope`: the entropy change per
    unit of length of a plain gradient step, through the weights, nats. Between methods, in the order of `methods`:
    `overlap` (Jaccard index of the restrained tokens, null where both have none) and `cosine` of the gradients.
    """
    vectors, sets, rows = [], [], []
    uphill = entropy_gradient(policy, mini_batch)
    for loss in methods.values():
        marked = loss.mark(mini_batch, ranks, seed=seed, step=step)
        vectors.append(gradient(policy, marked, loss))
        sets.append(_restrained(marked, loss, policy.context))
        kept = {name: value for name, value in marked.selection.items() if name.startswith(("weight/", "select/"))}
        change: float | None = predicted_change([marked], loss, ranks, policy.context)
        rows.append({"predicted_change": change, **kept})
    together, count = _intersections(torch.stack(sets), ranks)
    gram = [[inner(policy, a, b) for b in vectors] for a in vectors]
    for i, row in enumerate(rows):
        norm = gram[i][i] ** 0.5
        row["predicted_change"] = row["predicted_change"] if count else None
        row |= {"restrained": together[i][i], "restrained_fraction": together[i][i] / count if count else 0.0}
        row |= {"grad_norm": norm, "entropy_slope": -_ratio(inner(policy, vectors[i], uphill), norm)}
    pairs = range(len(rows))
    return {
        "minibatch": mini_batch.index,
        "tokens": count,
        "methods": dict(zip(methods, rows, strict=True)),
        "overlap": [[_jaccard(together, i, j) for j in pairs] for i in pairs],
        "cosine": [[_ratio(gram[i][j], (gram[i][i] * gram[j][j]) ** 0.5) for j in pairs] for i in pairs],
    }


def _restrained(mini_batch: MiniBatch, loss: PolicyLoss, context: Ranks | None) -> Tensor:
    """Return bool `[n_local]`: the response tokens that the method holds back."""
    parts = []
    for micro_batch in mini_batch.micro_batches:
        assert micro_batch.old_logprobs is not None
        log_ratio = micro_batch.computed_stats.logprobs - micro_batch.old_logprobs
        plain = micro_batch.advantages * torch.where(micro_batch.loss_mask, log_ratio, 0.0).exp()
        pushed = effective_advantages([micro_batch], loss, context) * plain.sign()
        held = (plain != 0) & (pushed < RESTRAINED * plain.abs())
        if micro_batch.selected is not None:
            held |= micro_batch.selected
        parts.append(held[micro_batch.loss_mask])
    return torch.cat(parts)


def _intersections(sets: Tensor, ranks: Reducer) -> tuple[list[list[int]], int]:
    """Return (number of tokens in both of each two rows of `sets [methods, n_local]`, all tokens) over the ranks."""
    members = sets.double()
    counts = ranks.sum(torch.cat([(members @ members.T).flatten(), members.new_tensor([sets.shape[1]])]))
    table = counts[:-1].view(len(sets), len(sets)).long().tolist()
    return table, int(counts[-1])


def _jaccard(together: list[list[int]], i: int, j: int) -> float | None:
    union = together[i][i] + together[j][j] - together[i][j]
    return together[i][j] / union if union else None


def _ratio(a: float, b: float) -> float:
    return a / b if b else float("nan")
