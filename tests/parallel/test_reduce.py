"""Global statistics on 1, 2 and 4 ranks against one numpy process; every rank must hold the same bits."""

from __future__ import annotations

import math
import pickle
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.parallel import reduce
from megatron_rl.parallel.reduce import Reducer
from tests.worlds import Worlds

# how many of 40 elements each rank holds; some ranks are empty
SPLITS = {1: [(40,)], 2: [(13, 27), (0, 40)], 4: [(5, 20, 0, 15), (0, 0, 0, 40), (10, 10, 10, 10)]}
LAYOUTS = [split for splits in SPLITS.values() for split in splits]
WORLD = pytest.mark.parametrize("split", LAYOUTS, ids=str)
FRACTIONS = [0.0, 0.1, 0.25, 0.5, 0.9, 0.999, 1.0]
COUNTS = [1, 2, 7, 39, 40, 41, 1000]


def world() -> tuple[Reducer, int]:
    """The reducer of this rank as a run has it (a group of one rank is a group too), and the rank."""
    return Reducer(dist.group.WORLD), dist.get_rank()


def share(values: Tensor, split: tuple[int, ...], rank: int) -> Tensor:
    return values.split(list(split))[rank]


def same_on_all(results: list[Any]) -> Any:
    """Rank 0's result, after checking that all ranks hold the same bits."""
    assert len({pickle.dumps(_plain(result)) for result in results}) == 1
    return results[0]


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.contiguous().view(torch.uint8).numpy().tobytes()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.hex() if isinstance(value, float) else value


def _sum_and_max(values: Tensor) -> tuple[Tensor, ...]:
    reducer, rank = world()
    before = values[rank].clone()
    result = (
        reducer.sum(values[rank]),
        reducer.max(values[rank]),
        reducer.sum((1000 * values[rank]).long()),
        reducer.max(values[rank].float()),
        reducer.sum(values[rank].T),  # not contiguous
    )
    result[0].add_(1.0)  # a new tensor: the caller's must not change, on one rank either
    assert torch.equal(values[rank], before)
    return result


@pytest.mark.parametrize("size", [1, 2, 4])
def test_sum_and_max(worlds: Worlds, size: int) -> None:
    # magnitudes from 1 to 1e8 of both signs: a sum in another order would differ in its last bits
    exponents = 16 * torch.rand(size, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 8
    values = exponents.sign() * 10 ** exponents.abs()
    total, largest, integers, single, transposed = same_on_all(worlds.run(size, _sum_and_max, values))
    array = values.numpy()
    np.testing.assert_allclose(total.numpy(), array.sum(0) + 1.0, rtol=1e-15 * 4)
    np.testing.assert_array_equal(largest.numpy(), array.max(0))
    np.testing.assert_array_equal(integers.numpy(), (1000 * array).astype(np.int64).sum(0))
    np.testing.assert_array_equal(single.numpy(), array.astype(np.float32).max(0))
    np.testing.assert_allclose(transposed.numpy(), array.sum(0).T, rtol=1e-15 * 4)


def _top_k(values: Tensor, ids: Tensor, split: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    reducer, rank = world()
    return [reducer.top_k(share(values, split, rank), share(ids, split, rank), k) for k in COUNTS]


def expected_top_k(values: Tensor, ids: Tensor, k: int) -> list[tuple[float, int]]:
    return sorted(zip(values.tolist(), ids.tolist(), strict=True), key=lambda pair: (-pair[0], pair[1]))[:k]


@WORLD
def test_top_k_takes_the_largest_and_ties_go_to_the_smaller_id(worlds: Worlds, split: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randperm(1000, generator=generator)[:40]
    tied = torch.randint(-3, 4, (40,), generator=generator).double()  # about six of each value, spread over the ranks
    tied[7] = -0.0
    infinite = torch.randn(40, generator=generator, dtype=torch.float64)
    infinite[[3, 30]] = math.inf
    infinite[[4, 20, 39]] = -math.inf
    for values in (tied, torch.zeros(40), infinite):
        results = same_on_all(worlds.run(len(split), _top_k, values, ids, split))
        for k, (best, winners) in zip(COUNTS, results, strict=True):
            assert list(zip(best.tolist(), winners.tolist(), strict=True)) == expected_top_k(values, ids, k)
            assert best.dtype == torch.float64 and winners.dtype == torch.int64


@pytest.mark.parametrize("split", [(0,), (0, 0), (40,), (13, 27)], ids=str)
def test_top_k_without_elements_and_with_nan(worlds: Worlds, split: tuple[int, ...]) -> None:
    values = torch.full((sum(split),), math.nan, dtype=torch.float64)
    if sum(split):
        values[::2] = torch.arange(20)
    ids = torch.arange(sum(split))
    for k, (best, winners) in zip(COUNTS, same_on_all(worlds.run(len(split), _top_k, values, ids, split)), strict=True):
        # NaN counts as the largest, as in torch
        order = [*range(1, sum(split), 2), *reversed(range(0, sum(split), 2))][:k]
        assert winners.tolist() == order
        torch.testing.assert_close(best, values[order], equal_nan=True)


def _top_ks_and_sum(values: Tensor, ids: Tensor, split: tuple[int, ...]) -> tuple[Any, Any]:
    reducer, rank = world()
    mine = share(values, split, rank), share(ids, split, rank)
    sets = [(*mine, 5), (mine[0][:0], mine[1][:0], 3), (-mine[0], mine[1], 40), (*mine, 0)]
    # a sum that only rank order gives to the last bit
    sums = torch.tensor([[rank + 1.0, 1e16 * (-1) ** rank], [3.0**-rank, 0.1]], dtype=torch.float64)
    found, total = reducer.top_ks_and_sum(sets, sums)
    assert torch.equal(total, reducer.sum(sums))
    return [reducer.top_k(*one) for one in sets], found


@WORLD
def test_several_top_ks_and_a_sum_travel_together(worlds: Worlds, split: tuple[int, ...]) -> None:
    values = torch.randn(40, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    ids = torch.arange(40) + (1 << 60)  # beyond float64's integers
    for alone, together in worlds.run(len(split), _top_ks_and_sum, values, ids, split):
        for one, other in zip(alone, together, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert [len(winners) for _, winners in together] == [5, 0, 40, 0]
        assert together[0][1].tolist() == (values.topk(5).indices + (1 << 60)).tolist()
        assert together[2][1].tolist() == (values.argsort() + (1 << 60)).tolist()


def _quantiles(values: list[Tensor], split: tuple[int, ...], few: int, first: int) -> list[list[float]]:
    reducer, rank = world()
    with mock.patch.multiple(reduce, _FEW=few, _FIRST_VALUES=first):
        return [reducer.quantiles(share(of_all, split, rank), FRACTIONS) for of_all in values]


@WORLD
@pytest.mark.parametrize(("few", "first"), [(40, 40), (40, 5), (3, 2)])
def test_quantiles_are_elements_of_the_set(worlds: Worlds, split: tuple[int, ...], few: int, first: int) -> None:
    """Gathered in one go or two, or counted by bins."""
    generator = torch.Generator().manual_seed(2)
    signed = torch.randn(40, generator=generator) * 10 ** (6 * torch.randn(40, generator=generator))
    infinite = signed.clone()
    infinite[[1, 2, 3, 30, 31]] = -math.inf
    infinite[[0, 10, 20, 39]] = math.inf
    zeros = torch.tensor([-0.0, 0.0] * 20)
    equal = torch.full((40,), -2.5)
    tiny = torch.tensor([2e-45, -2e-45] * 20) * torch.arange(40)  # subnormal
    sets = [signed, infinite, zeros, equal, tiny, signed.double()]
    results = same_on_all(worlds.run(len(split), _quantiles, sets, split, few, first))
    for values, got in zip(sets, results, strict=True):
        # -0.0 sorts before 0.0: numpy's sort keeps their order, so the key looks at the sign bit too
        rising = sorted(values.float().tolist(), key=lambda x: (x, math.copysign(1.0, x)))
        want = [rising[math.floor(q * 39)] for q in FRACTIONS]
        assert [x.hex() for x in got] == [x.hex() for x in want]


def _kth(values: Tensor, split: tuple[int, ...]) -> list[float]:
    reducer, rank = world()
    return [reducer.kth_largest(share(values, split, rank), k) for k in range(1, 41)]


@WORLD
def test_kth_largest(worlds: Worlds, split: tuple[int, ...]) -> None:
    values = torch.randn(40, generator=torch.Generator().manual_seed(3)).round(decimals=1)  # with ties
    values[7] = math.inf
    got = same_on_all(worlds.run(len(split), _kth, values, split))
    assert got == sorted(values.tolist(), reverse=True)


def _empty_quantiles() -> list[float]:
    reducer, _ = world()
    return reducer.quantiles(torch.zeros(0), [0.1, 0.9])


@pytest.mark.parametrize("size", [1, 2])
def test_quantiles_of_nothing_are_nan(worlds: Worlds, size: int) -> None:
    assert all(math.isnan(x) for rank in worlds.run(size, _empty_quantiles) for x in rank)


# what a rollout holds, and what travels as torch itself would send it
TENSORS = [torch.arange(6.0).view(2, 3).t(), torch.tensor(True), torch.zeros(2, 0), torch.ones(3, dtype=torch.bfloat16)]


def _objects() -> tuple[list[Any], list[bool]]:
    reducer, rank = world()
    tensors = [torch.arange(rank), TENSORS[0].double() + rank, *TENSORS]
    value = {"rank": rank, "text": "ä" * (40**rank), "tensors": tensors, "none": None}
    flags = [reducer.any(flag) for flag in (False, rank == dist.get_world_size() - 1, True)]
    return reducer.gather_objects(value), flags


@pytest.mark.parametrize("size", [1, 2, 4])
def test_objects_of_any_size_arrive_in_rank_order(worlds: Worlds, size: int) -> None:
    for gathered, flags in worlds.run(size, _objects):
        assert [one["rank"] for one in gathered] == list(range(size))
        assert [len(one["text"]) for one in gathered] == [40**rank for rank in range(size)]
        for rank, one in enumerate(gathered):
            expected = [torch.arange(rank), TENSORS[0].double() + rank, *TENSORS]
            for tensor, want in zip(one["tensors"], expected, strict=True):
                assert tensor.dtype == want.dtype and tensor.shape == want.shape and torch.equal(tensor, want)
        assert flags == [False, True, True]


def _exchanged() -> list[Any]:
    reducer, rank = world()
    return reducer.exchange_objects([(rank, to, torch.arange(3000 * to)) for to in range(reducer.size)])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_rank_receives_what_was_sent_to_it(worlds: Worlds, size: int) -> None:
    for rank, came in enumerate(worlds.run(size, _exchanged)):
        assert [(sender, to) for sender, to, _ in came] == [(sender, rank) for sender in range(size)]
        assert all(torch.equal(tensor, torch.arange(3000 * rank)) for *_, tensor in came)


def _top_k_traffic(values: Tensor, ids: Tensor, split: tuple[int, ...], k: int, many: int) -> tuple[Any, list[int]]:
    reducer, rank = world()
    sizes, gather = [], reducer._gather

    def counted(payload: Tensor) -> Tensor:
        sizes.append(payload.numel())
        return gather(payload)

    mine = share(values, split, rank), share(ids, split, rank), k
    with mock.patch.multiple(reduce, _MANY=many, _FIRST_VALUES=2), mock.patch.object(reducer, "_gather", counted):
        return reducer.top_ks_and_sum([mine], values.new_zeros(0)), sizes


@pytest.mark.parametrize("k", [8, 200])
@pytest.mark.parametrize("narrowed", [False, True])
def test_a_rank_offers_no_more_than_it_has_or_can_win(worlds: Worlds, k: int, narrowed: bool) -> None:
    """Values that float32 cannot tell apart, both zeros, infinities and NaN of both signs pass the histograms."""
    draw = torch.Generator().manual_seed(5)
    values = 1 + 1e-12 * torch.randn(40, generator=draw, dtype=torch.float64)
    values[::3] = torch.tensor([0.0, -0.0]).repeat(7).double()
    values[[4, 28]], values[[5, 11]] = (
        torch.tensor([math.nan, -math.nan]).double(),
        torch.tensor([-math.inf, math.inf]).double(),
    )
    ids, split = torch.randperm(40, generator=draw) + (1 << 60), (10, 10, 12, 8)
    for case in (values, -values, values.clamp(-1, 0)):
        ranks = worlds.run(4, _top_k_traffic, case, ids, split, k, 0 if narrowed else 1 << 20)
        (((best, winners),), _), sizes = same_on_all(ranks)
        key = lambda pair: (not math.isnan(pair[0]), -pair[0] if not math.isnan(pair[0]) else 0, pair[1])  # noqa: E731
        expected = sorted(zip(case.tolist(), ids.tolist(), strict=True), key=key)[:k]
        assert winners.tolist() == [i for _, i in expected]
        np.testing.assert_array_equal(best.numpy(), [value for value, _ in expected])
        # a count and two pairs; then as many pairs as the rank with most has
        assert sizes[4 * narrowed] == 1 + 2 * 2 and sum(sizes[4 * narrowed + 1 :]) <= 2 * min(k, 12)
    if narrowed and k == 8:
        apart = torch.arange(40.0, dtype=torch.float64)[torch.randperm(40, generator=draw)]  # about two to a rank
        for _, sizes in worlds.run(4, _top_k_traffic, apart, ids, split, k, 0):
            assert sum(sizes[5:]) < 2 * 8


def test_without_a_group_the_process_is_alone() -> None:
    reducer = Reducer(None)
    values, ids = torch.tensor([1.0, 3.0, 3.0], dtype=torch.float64), torch.tensor([5, 9, 2])
    assert reducer.size == 1 and reducer.sum(values).tolist() == [1.0, 3.0, 3.0]
    assert reducer.top_k(values, ids, 2)[1].tolist() == [2, 9]
    assert reducer.quantiles(values, [0.0, 0.5]) == [1.0, 3.0] and reducer.gather_objects("x") == ["x"]
    assert reducer.exchange_objects(["x"]) == ["x"]
