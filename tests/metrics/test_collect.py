from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_rl.metrics import Metrics, Timers


class ThreadWorld:
    """All-reduce between threads: ranks meet at a barrier. Counts the collectives of rank 0."""

    def __init__(self, size: int) -> None:
        self.size, self.calls = size, 0
        self.barrier = threading.Barrier(size, timeout=20)
        self.slots: list[Tensor] = [torch.empty(0)] * size

    def reducers(self, rank: int) -> tuple:  # type: ignore[type-arg]
        def gather(values: Tensor) -> Tensor:
            assert values.dtype == torch.float64
            self.calls += rank == 0
            self.slots[rank] = values.clone()
            self.barrier.wait()
            stacked = torch.stack(self.slots)
            self.barrier.wait()
            return stacked

        return (lambda v: gather(v).sum(0), lambda v: gather(v).amax(0))

    def run(self, ranks: list[Metrics]) -> list[dict[str, float] | Exception]:
        results: list[dict[str, float] | Exception] = [{}] * self.size

        def work(rank: int) -> None:
            try:
                results[rank] = ranks[rank].reduce(*self.reducers(rank))
            except RuntimeError as error:
                results[rank] = error

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def test_reduction_equals_numpy() -> None:
    generator = np.random.default_rng(0)
    world, ranks, everything = ThreadWorld(3), [], []
    for rank in range(3):
        metrics = Metrics()
        for _ in range(4):  # micro-batches of unequal size: a mean of means would be wrong
            values = generator.normal(1e4, 1.0, size=generator.integers(1, 50))
            everything.append(values)
            metrics.add({"b": torch.tensor([values.sum(), len(values)]), "never": torch.zeros(2)})
            metrics.max("largest", float(values.max()))
        metrics.add({"a": torch.tensor([float(rank), 1.0])})
        metrics.set({"lr": 0.5})
        ranks.append(metrics)
    results = world.run(ranks)
    assert results[0] == results[1] == results[2]
    result = results[0]
    assert isinstance(result, dict)
    assert list(result) == ["a", "b", "largest", "lr"]  # "never" has count 0
    flat = np.concatenate(everything)
    assert result["b"] == pytest.approx(flat.mean(), rel=1e-6)  # the pairs came in as float32
    assert result["largest"] == flat.max() and result["a"] == 1.0 and result["lr"] == 0.5
    assert world.calls == 3  # names, sums, maxima


def test_accumulates_in_float64_and_copies() -> None:
    metrics, pair = Metrics(), torch.tensor([16777216.0, 1.0])
    metrics.add({"x": pair})
    metrics.add({"x": torch.tensor([1.0, 0.0])})
    pair.zero_()
    assert metrics.reduce(lambda v: v, lambda v: v) == {"x": 16777217.0}  # 2^24 + 1 does not exist in float32


def test_different_names_are_an_error_on_every_rank() -> None:
    ranks = [Metrics(), Metrics()]
    ranks[0].add({"x": torch.ones(2)})
    ranks[1].add({"y": torch.ones(2)})
    results = ThreadWorld(2).run(ranks)
    assert all(isinstance(result, RuntimeError) for result in results)
    assert "this rank: sums ['x']" in str(results[0]) and "this rank: sums ['y']" in str(results[1])


def test_misuse() -> None:
    metrics = Metrics()
    with pytest.raises(ValueError, match="'x': got shape"):
        metrics.add({"x": torch.ones(3)})
    metrics.add({"x": torch.ones(2)})
    metrics.set({"x": 1.0})
    with pytest.raises(ValueError, match=r"\['x'\] were given in two ways"):
        metrics.reduce(lambda v: v, lambda v: v)
    metrics = Metrics()
    metrics.max("nan", float("nan"))
    metrics.max("nan", 3.0)
    assert np.isnan(metrics.reduce(lambda v: v, lambda v: v)["nan"])


def test_timers() -> None:
    marks = []
    timers = Timers(synchronize=lambda: marks.append(1))
    for _ in range(2):
        with timers("rollout"):
            time.sleep(0.02)
    with pytest.raises(KeyError), timers("update"):
        raise KeyError
    values = timers.collect(tokens=100)
    assert len(marks) == 6
    assert 0.04 <= values["time/rollout"] <= values["time/total"] < 1
    assert values["time/update"] >= 0
    assert values["throughput/tokens_per_second"] == pytest.approx(100 / values["time/total"])
    assert set(timers.collect(tokens=0)) == {"time/total", "throughput/tokens_per_second"}
    with pytest.raises(ValueError, match="total"), timers("total"):
        pass
