"""Who spent the entropy: groups by hand, and the same totals whatever the packing."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import torch

from megatron_rl.algorithms.entropy import entropy_spent
from megatron_rl.algorithms.ledger import ledger
from megatron_rl.parallel.reduce import Reducer
from megatron_rl.types import TokenStats, TrainBatch
from tests.algorithms.covariance_case import ALONE, build, by_hand
from tests.worlds import Worlds


def _kind(token_id: int) -> str:
    """Numbers, so that the rows of kinds make a table too."""
    return str(token_id % 3)


def test_groups_by_hand() -> None:
    mini_batch, (stats,) = by_hand([-1.0, -2.0, -3.0, -2.0, -1.0], [1.0, -1.0, 1.0, -1.0, 2.0])
    (micro_batch,) = mini_batch.micro_batches
    labels = torch.tensor([7, 8, 7, 7, 9, 0, 0])  # two positions of padding at the end
    mini_batch = mini_batch.replace_each("labels", [labels])
    after = [TokenStats(stats.logprobs, stats.entropy + torch.tensor([0.5, -0.25, 0, 0, -1.0, 8, 8]))]
    entry = ledger(TrainBatch(0, (mini_batch,)), after, ALONE, {7: "word", 8: "sign", 9: "word"}.__getitem__)
    spent = entropy_spent(stats, micro_batch.advantages)[:5].tolist()
    by_token = {row[0]: row[1:] for row in entry["tokens"]}
    assert {i: (row[0], row[2]) for i, row in by_token.items()} == {7: (3, 3), 8: (1, 1), 9: (1, 1)}
    expected = {7: spent[0] + spent[2] + spent[3], 8: spent[1], 9: spent[4]}
    changes = {7: 0.5, 8: -0.25, 9: -1.0}
    for i, row in by_token.items():
        np.testing.assert_allclose(row[1::2], [expected[i], changes[i]], rtol=1e-6)
    assert [abs(row[2]) for row in entry["tokens"]] == sorted((abs(v) for v in expected.values()), reverse=True)
    assert [row[:3] for row in entry["positions"]] == [[0, 0, 1], [1, 2, 2], [3, 6, 2]]
    np.testing.assert_allclose(entry["positions"][1][3], spent[1] + spent[2], rtol=1e-6)
    # A's mean 0.4, logp's -1.8: cov 0.48, 0.28, -0.72, 0.28, 1.28; the 50% quantile is 0.28, the others 0.48
    assert [row[1] for row in entry["covariance"]] == [3, 1, 0, 0, 0, 1]
    assert entry["covariance"][-1][0] is None and entry["total"][0] == 5
    np.testing.assert_allclose([row[5] for row in entry["covariance"]], [-0.16, 0.48, 0, 0, 0, 1.28], atol=1e-6)
    # five tokens: positions 0 and 1 are in the first quarter
    assert [row[:2] for row in entry["quarters"]] == [[0, 2], [1, 1], [2, 1], [3, 1]]
    np.testing.assert_allclose([row[2] for row in entry["quarters"]], [spent[0] + spent[1], *spent[2:]], rtol=1e-6)
    np.testing.assert_allclose([row[5] for row in entry["quarters"]], [0.76, -0.72, 0.28, 1.28], rtol=1e-6)
    assert [row[:2] for row in entry["kinds"]] == [["sign", 1], ["word", 4]]
    np.testing.assert_allclose(entry["kinds"][0][2:4], [spent[1], 1], rtol=1e-6)


def test_the_packing_does_not_matter_and_nothing_is_lost() -> None:
    """The mini-batches of a step share one covariance; only the first is probed."""
    entries = []
    for bins in ([list(range(8))], [[0, 4], [], [3, 1, 2], [7, 6, 5]]):
        (first, before), (second, _) = build(bins), build(bins, seed=1, index=1)
        after = [TokenStats(s.logprobs, s.entropy * 0.9) for s in before]
        entries.append(ledger(TrainBatch(0, (first, second)), after, ALONE, _kind))
    one, several = entries
    for part in ("total", "tokens", "kinds", "positions", "quarters", "covariance"):
        np.testing.assert_allclose(
            np.array(one[part], dtype=float), np.array(several[part], dtype=float), rtol=1e-5, atol=1e-6
        )
        table = np.array(one[part], dtype=float)
        total = table[..., -5:] if part == "total" else table[:, -5:].sum(0)
        np.testing.assert_allclose(total, one["total"], rtol=1e-9)
    assert one["total"][2] * 2 == one["total"][0]
    assert ledger(TrainBatch(0, (build([[]])[0],)), None, ALONE, _kind) == {}


def _of_rank(bins: list[list[list[int]]]) -> tuple[dict[str, Any], list[int]]:
    """This rank's entry, and the token ids of each of the two exchanges that it receives."""
    import torch.distributed as dist

    received, ranks = list[int](), Reducer(dist.group.WORLD)
    exchange = ranks.exchange_objects

    def counted(values: list[Any]) -> list[Any]:
        came = exchange(values)
        received.append(sum(len(part[0][0]) for part in came if part is not None))
        return came

    mini_batch, _ = build(bins[dist.get_rank()])
    labels = [mb.token_ids_global * 7 % 101 for mb in mini_batch.micro_batches]
    with mock.patch.object(ranks, "exchange_objects", counted):
        return ledger(TrainBatch(0, (mini_batch.replace_each("labels", labels),)), None, ranks, _kind), received


def test_ranks_deal_the_token_ids_out_and_the_first_tells_all(worlds: Worlds) -> None:
    (alone, _), *_ = worlds.run(1, _of_rank, [[list(range(8))]])
    (entry, (dealt, totals)), *others = worlds.run(4, _of_rank, [[[0, 1]], [[2], [3]], [[]], [[4, 5], [6, 7]]])
    assert entry["tokens"] and [token[0] for token in entry["tokens"]] == [token[0] for token in alone["tokens"]]
    for part in ("total", "tokens", "other_tokens", "kinds", "positions", "quarters", "covariance"):
        got, want = (np.array(one[part], dtype=float) for one in (entry, alone))
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
    assert [other for other, _ in others] == [{}] * 3 and [received[1] for _, received in others] == [0] * 3
    shares = [dealt, *(received[0] for _, received in others)]
    assert max(shares) < 0.4 * sum(shares) and totals <= 101
