"""Selection: hand-computed numbers, numpy, and the authors' formulas written again from their description."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_rl.algorithms.covariance import covariance, covariance_metrics, covariances, quota
from megatron_rl.algorithms.entropy import entropy_spent
from megatron_rl.algorithms.hashing import hash_uniform
from megatron_rl.algorithms.methods.clip_cov import ClipCovLoss
from megatron_rl.algorithms.methods.kl_cov import KlCovLoss
from megatron_rl.algorithms.methods.ppo_clip import PpoClipLoss
from megatron_rl.types import MicroBatch
from tests.algorithms.covariance_case import ALONE, LENGTHS, build, by_hand, loss_sum, numpy_view, select


def test_covariance_by_hand() -> None:
    # mean logp = -2, mean A = 0.5; deviations (1, 0, -1, 0) and (0.5, 0.5, -1.5, 0.5)
    cov, count = covariance(torch.tensor([-1.0, -2.0, -3.0, -2.0]), torch.tensor([1.0, 1.0, -1.0, 1.0]), ALONE)
    assert cov.tolist() == [0.5, 0.0, 1.5, 0.0] and cov.dtype == torch.float64 and count == 4
    # several sets are centred each by itself; one without tokens stays empty
    sets = [torch.tensor([-1.0, -2.0, -3.0, -2.0]), torch.zeros(0), torch.tensor([-5.0, -7.0])]
    advantages = [torch.tensor([1.0, 1.0, -1.0, 1.0]), torch.zeros(0), torch.tensor([2.0, 0.0])]
    found = covariances(list(zip(sets, advantages, strict=True)), ALONE)
    assert [(c.tolist(), n) for c, n in found] == [([0.5, 0.0, 1.5, 0.0], 4), ([], 0), ([1.0, 1.0], 2)]


@pytest.mark.parametrize(
    ("fraction", "count", "expected"),
    [(0.0002, 3, 1), (0.0002, 9999, 1), (0.0002, 10000, 2), (0.1, 29, 2), (1.0, 7, 7), (0.5, 1, 1), (0.5, 0, 0)],
)
def test_quota(fraction: float, count: int, expected: int) -> None:
    assert quota(fraction, count) == expected


def test_kl_cov_takes_the_largest_and_breaks_ties_by_id() -> None:
    # mean logp -2, deviations (-2, 1, 1, -2, 2, 0), mean A 0: cov = (2, 1, -1, 1, 2, 0) for ids 1 to 6
    batch = by_hand([-4.0, -1.0, -1.0, -4.0, 0.0, -2.0], [-1.0, 1.0, -1.0, -0.5, 1.0, 0.5])
    falling = [1, 5, 2, 4, 6, 3]
    for k in range(1, 7):
        _, ids, metrics = select(batch, KlCovLoss(select_fraction=min(1.0, (k + 0.5) / 6)))
        assert ids == set(falling[:k])
        assert metrics["select/count"] == k and metrics["select/fraction"] == k / 6


def test_equal_covariances_are_taken_in_the_order_of_ids() -> None:
    batch = by_hand([-2.0, 0.0] * 4, [-1.0, 1.0] * 4)  # cov = 1 everywhere
    for k in (1, 3, 8):
        assert select(batch, KlCovLoss(select_fraction=k / 8))[1] == set(range(1, k + 1))


def test_clip_cov_candidates_lie_strictly_inside_and_were_not_clipped() -> None:
    # mean logp -4, mean A 0, |A| = 1: cov = +-(logp + 4) = 0, 1, 2, 3, 4 and 4, 1, 2, 3, 0 (ids 1 to 10)
    logprobs = [-4.0, -3.0, -2.0, -1.0, 0.0, -8.0, -5.0, -6.0, -7.0, -4.0]
    advantages = [1.0] * 5 + [-1.0] * 5
    old = list(logprobs)
    loss = ClipCovLoss(cov_low=1.0, cov_high=4.0, select_fraction=1.0, eps_low=0.2, eps_high=0.2)
    assert select(by_hand(logprobs, advantages), loss)[1] == {3, 4, 8, 9}
    old[2] -= 0.19  # ratio 1.209 at A > 0: clipped
    old[3] -= 0.18  # ratio 1.197: not yet
    old[7] += 0.23  # ratio 0.795 at A < 0: clipped
    old[8] -= 1.00  # ratio 2.718 at A < 0: PPO's maximum keeps the unclipped branch
    assert select(by_hand(logprobs, advantages, old), loss)[1] == {4, 9}
    wide = ClipCovLoss(cov_low=1.0, cov_high=4.0, select_fraction=1.0)  # eps 1 and 1: nothing here is clipped
    assert select(by_hand(logprobs, advantages, old), wide)[1] == {3, 4, 8, 9}
    none = ClipCovLoss(cov_low=100.0, cov_high=200.0)
    _, ids, metrics = select(by_hand(logprobs, advantages, old), none)
    assert ids == set() and metrics["select/count"] == 0 and "select/logprob_mean" not in metrics


CLIP = ClipCovLoss(cov_low=0.05, cov_high=2.0, select_fraction=0.1)


def candidates(view: dict[str, np.ndarray], loss: ClipCovLoss) -> np.ndarray:
    ratio = np.exp(view["logprobs"] - view["old_logprobs"])
    clipped = (ratio > 1 + loss.eps_high) & (view["advantages"] > 0)
    clipped |= (ratio < 1 - loss.eps_low) & (view["advantages"] < 0)
    return (view["cov"] > loss.cov_low) & (view["cov"] < loss.cov_high) & ~clipped


def test_clip_cov_takes_the_largest_hashes_of_its_candidates() -> None:
    batch = build([list(range(8))], index=3)
    view = numpy_view(batch)
    k = math.floor(0.1 * len(view["cov"]))
    names = ("prompt_ids", "sample_indices", "position_ids")
    hashed = hash_uniform(11, 5, 3, *(batch[0].cat(name) for name in names)).numpy()
    inside = candidates(view, CLIP)
    assert inside.sum() > 2 * k
    order = np.argsort(-np.where(inside, hashed, -1.0))[:k]
    assert select(batch, CLIP, seed=11, step=5)[1] == set(view["token_ids_global"][order].tolist())


def test_the_random_subset_depends_on_the_step_and_never_on_the_packing() -> None:
    one = select(build([list(range(8))]), CLIP)[1]
    assert len(one) == math.floor(0.1 * (sum(LENGTHS) - 16))
    for bins in ([[7, 2, 0], [1, 6], [5, 4, 3]], [[i] for i in (4, 0, 7, 3, 1, 2, 6, 5)], [[], list(range(8)), []]):
        assert select(build(bins), CLIP)[1] == one
    others = [
        select(build([list(range(8))]), CLIP, seed=2)[1],
        select(build([list(range(8))]), CLIP, step=1)[1],
        select(build([list(range(8))], index=1), CLIP)[1],
    ]
    assert len({frozenset(ids) for ids in [one, *others]}) == 4


def test_the_random_subset_is_uniform() -> None:
    batch = build([list(range(8))])
    inside = candidates(numpy_view(batch), CLIP)
    draws = 400
    counts: dict[int, int] = {}
    for step in range(draws):
        for i in select(batch, CLIP, step=step)[1]:
            counts[i] = counts.get(i, 0) + 1
    k, n = math.floor(0.1 * len(inside)), int(inside.sum())
    assert len(counts) == n and sum(counts.values()) == k * draws
    expected = draws * k / n
    chi_square = sum((c - expected) ** 2 for c in counts.values()) / (expected * (1 - k / n))
    assert chi_square < n - 1 + 4 * math.sqrt(2 * (n - 1))  # mean n - 1, standard deviation sqrt(2 (n - 1))


@pytest.mark.parametrize("bins", [[list(range(8))], [[0, 4], [], [3, 1, 2], [7, 6, 5]]], ids=["one", "four"])
def test_metrics_against_numpy(bins: list[list[int]]) -> None:
    batch = build(bins)
    view = numpy_view(batch)
    n = len(view["cov"])
    _, ids, metrics = select(batch, KlCovLoss(select_fraction=0.1))
    metrics |= covariance_metrics([batch[0]], ALONE)
    falling = np.sort(view["cov"])[::-1]
    chosen = np.isin(view["token_ids_global"], list(ids))
    k = math.floor(0.1 * n)
    assert set(view["cov"][chosen].tolist()) == set(falling[:k].tolist())
    p_y = np.exp(view["logprobs"])
    expected_change = view["sum_p2_logp"] + view["entropy"] * view["sum_p2"]
    vocab = view["advantages"] * (p_y * (view["logprobs"] + view["entropy"]) - expected_change)
    expected = {
        "cov/mean": view["cov"].mean(),
        "cov/std": view["cov"].std(),
        "cov/vocab_mean": vocab.mean(),
        "cov/top_0.02pct_mean": falling[0],
        "cov/top_0.2pct_mean": falling[0],
        "cov/top_2pct_mean": falling[: max(1, n // 50)].mean(),
        "select/count": k,
        "select/fraction": k / n,
        "select/logprob_mean": view["logprobs"][chosen].mean(),
        "select/entropy_mean": view["entropy"][chosen].mean(),
    }
    assert metrics == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_covariance_metrics_are_means_over_the_updates_with_tokens() -> None:
    batches = [build([[0, 1], [2]]), build([[], []]), build([[3, 4, 5, 6, 7]])]
    each = [covariance_metrics([batch[0]], ALONE) for batch in batches]
    assert each[1] == {} == covariance_metrics([batches[1][0]], ALONE)
    expected = {name: (each[0][name] + each[2][name]) / 2 for name in each[0]}
    assert covariance_metrics([batch for batch, _ in batches], ALONE) == pytest.approx(expected, rel=1e-14)


def test_top_fractions_of_many_tokens() -> None:
    generator = torch.Generator().manual_seed(2)
    n = 20_000
    batch = by_hand(torch.randn(n, generator=generator).tolist(), torch.randn(n, generator=generator).tolist())
    falling = np.sort(numpy_view(batch)["cov"])[::-1]
    metrics = covariance_metrics([batch[0]], ALONE)
    for name, k in (("0.02", 4), ("0.2", 40), ("2", 400)):
        assert metrics[f"cov/top_{name}pct_mean"] == pytest.approx(falling[:k].mean(), rel=1e-12)


def test_the_vocab_estimator_ranks_by_the_exact_entropy_loss() -> None:
    batch = build([[0, 1, 2], [3, 4, 5, 6, 7]])
    loss = KlCovLoss(select_fraction=0.1, cov_estimator="vocab")
    pairs = zip(batch[1], batch[0].micro_batches, strict=True)
    exact = torch.cat([entropy_spent(s, m.advantages)[m.loss_mask] for s, m in pairs])
    ids = batch[0].cat("token_ids_global")
    k = math.floor(0.1 * len(exact))
    assert select(batch, loss)[1] == set(ids[exact.topk(k).indices].tolist())
    assert select(batch, loss)[1] != select(batch, KlCovLoss(select_fraction=0.1))[1]


def test_other_losses_are_left_alone() -> None:
    batch = build([[0, 1], [2]])
    assert PpoClipLoss().mark(batch[0], ALONE, seed=1, step=0) is batch[0]


@pytest.mark.parametrize("scope", ["minibatch", "microbatch"])
@pytest.mark.parametrize("loss", [ClipCovLoss, KlCovLoss])
def test_micro_batches_without_tokens(loss: type[ClipCovLoss | KlCovLoss], scope: str) -> None:
    options: dict[str, Any] = {"select_fraction": 0.1, "cov_scope": scope}
    if loss is ClipCovLoss:
        options |= {"cov_low": 0.05, "cov_high": 2.0}
    config = loss(**options)
    chosen, ids, metrics = select(build([[], [0, 1, 2], []]), config)
    assert ids == select(build([[0, 1, 2]]), config)[1] != set()
    assert [int(mb.selected.sum()) for mb in chosen.micro_batches] == [0, len(ids), 0]
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("loss", [ClipCovLoss(), KlCovLoss()])
def test_a_mini_batch_without_any_token_selects_nothing(loss: ClipCovLoss | KlCovLoss) -> None:
    batch = build([[], []])
    mini_batch, ids, metrics = select(batch, loss)
    assert ids == set() and metrics == {}
    assert all(loss_sum(mb, s, loss) == 0.0 for mb, s in zip(mini_batch.micro_batches, batch[1], strict=True))


@pytest.mark.parametrize("loss", [ClipCovLoss(), KlCovLoss(select_fraction=0.1)])
def test_log_probabilities_that_are_not_finite_reach_the_update(loss: ClipCovLoss | KlCovLoss) -> None:
    """The update skips a non-finite gradient and counts it: selection must not raise before, nor exceed its quota."""
    mini_batch, stats = build([[0, 1, 2, 3], [4, 5, 6, 7]])
    stats[0].logprobs[3] = math.nan
    _, ids, metrics = select((mini_batch, stats), loss)
    assert len(ids) <= metrics["select/count"] <= quota(loss.select_fraction, sum(LENGTHS) - 16)
    assert math.isnan(covariance_metrics([mini_batch.with_stats(stats)], ALONE)["cov/mean"])


# ---- the authors' code, written again from its description: a micro-batch as [sequences, longest], and a response mask


def as_rows(micro_batch: MicroBatch, values: Tensor) -> Tensor:
    bounds = micro_batch.cu_seqlens.tolist()[: micro_batch.num_sequences + 1]
    rows = [values[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum()


def authors_clip_cov(
    old: Tensor, logp: Tensor, adv: Tensor, mask: Tensor, config: ClipCovLoss
) -> tuple[Tensor, int, int]:
    """(token-mean loss, tokens dropped, candidates)."""
    ratio = torch.exp(logp - old)
    first, second = -adv * ratio, -adv * torch.clamp(ratio, 1 - config.eps_low, 1 + config.eps_high)
    clipped = (second > first) & (mask > 0)
    cov = (adv - masked_mean(adv, mask)) * (logp - masked_mean(logp, mask))
    cov[mask == 0] = -torch.inf
    cov[clipped] = -torch.inf
    limit = max(int(config.select_fraction * mask.sum().item()), 1)
    inside = torch.nonzero((cov < config.cov_high) & (cov > config.cov_low) & (mask > 0))
    dropped = inside[torch.randperm(len(inside))[: min(limit, len(inside))]]
    factor = torch.ones_like(adv)
    factor[dropped[:, 0], dropped[:, 1]] = 0
    return masked_mean(torch.maximum(first, second) * factor, mask), len(dropped), len(inside)


def authors_kl_cov(old: Tensor, logp: Tensor, adv: Tensor, mask: Tensor, config: KlCovLoss) -> tuple[Tensor, int, int]:
    """(token-mean loss, tokens with the extra term, tokens). `k_percent` is a percentage there."""
    k_percent = 100 * config.select_fraction
    losses = -adv * torch.exp(logp - old)
    with_kl = losses + config.kl_coef * (logp - old).abs()
    valid = torch.nonzero(mask.reshape(-1) > 0)[:, 0]
    valid_adv, valid_logp = adv.reshape(-1)[valid], logp.reshape(-1)[valid]
    cov = (valid_adv - valid_adv.mean()) * (valid_logp - valid_logp.mean())
    k = max(1, int(len(cov) * k_percent / 100))
    largest = valid[torch.topk(cov, k).indices]
    losses = losses.reshape(-1).index_copy(0, largest, with_kl.reshape(-1)[largest]).reshape(mask.shape)
    return masked_mean(losses, mask), k, len(cov)


AUTHORS = {"clip_cov": authors_clip_cov, "kl_cov": authors_kl_cov}
BINS = [[0, 1, 2], [3, 4], [5, 6, 7]]


@pytest.mark.parametrize(
    "loss",
    [
        KlCovLoss(select_fraction=0.002, cov_scope="microbatch"),  # the floor of one token in each micro-batch
        KlCovLoss(select_fraction=0.13, cov_scope="microbatch", kl_coef=0.7),
        ClipCovLoss(select_fraction=1.0, cov_scope="microbatch", cov_low=0.1, cov_high=1.0),
        ClipCovLoss(select_fraction=1.0, cov_scope="microbatch", cov_low=0.1, cov_high=1.0, eps_low=0.2, eps_high=0.2),
    ],
    ids=["kl_cov_one", "kl_cov", "clip_cov", "clip_cov_eps_0.2"],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scope_microbatch_reproduces_the_authors_losses(loss: ClipCovLoss | KlCovLoss, seed: int) -> None:
    batch = build(BINS, seed)
    mini_batch, ids, _ = select(batch, loss)
    global_ids = select(batch, loss.model_copy(update={"cov_scope": "minibatch"}))[1]
    assert ids != global_ids  # the two scopes differ here, so agreeing with the authors means something
    for micro_batch, stats in zip(mini_batch.micro_batches, batch[1], strict=True):
        fields = (micro_batch.old_logprobs, stats.logprobs, micro_batch.advantages, micro_batch.loss_mask.float())
        expected, marked, _ = AUTHORS[loss.type](*(as_rows(micro_batch, field) for field in fields), loss)
        got = loss_sum(micro_batch, stats, loss) / micro_batch.loss_denominator
        assert got == pytest.approx(float(expected), abs=1e-6)
        assert int(micro_batch.selected.sum()) == marked


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scope_microbatch_drops_as_many_tokens_as_the_authors(seed: int) -> None:
    loss = ClipCovLoss(select_fraction=0.1, cov_scope="microbatch", cov_low=0.1, cov_high=1.0)
    batch = build(BINS, seed)
    mini_batch, _, _ = select(batch, loss)
    fewer = 0
    for micro_batch, stats in zip(mini_batch.micro_batches, batch[1], strict=True):
        fields = (micro_batch.old_logprobs, stats.logprobs, micro_batch.advantages, micro_batch.loss_mask.float())
        _, dropped, inside = authors_clip_cov(*(as_rows(micro_batch, field) for field in fields), loss)
        assert int(micro_batch.selected.sum()) == dropped
        fewer += dropped < inside
    assert fewer  # the quota, not the number of candidates, decided
