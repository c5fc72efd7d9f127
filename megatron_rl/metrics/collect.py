"""Metrics of one step: exact global means from (sum, count) pairs, and wall time per phase.

No collective lives here: the caller injects the reducers, so that this file is testable without a process group.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_rl.metrics.spans import OFF, Spans

Reduce = Callable[[Tensor], Tensor]  # float64 [K] in, reduced over all ranks out


class Metrics:
    """Collects on every rank, reduces once per step.

    `add` names and `max` names must be the same on every rank that reduces (a rank with no tokens adds (0, 0));
    `reduce` verifies it before the values travel, because a mismatch would mix values of different metrics or hang.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        """`device`: where the reducers want their tensors; null: the CPU."""
        self._device = device or torch.device("cpu")
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[str, float] = {}
        self._values: dict[str, float] = {}

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Accumulate pairs `[2]` = (sum, count) in float64, on the device of this object, wherever the pairs are.

        Raises: ValueError when a tensor is not of shape [2].
        """
        for name, pair in sums.items():
            if pair.shape != (2,):
                raise ValueError(f"metric {name!r}: got shape {tuple(pair.shape)}, expected [2] = (sum, count)")
            # .to() of a float64 tensor there is the caller's own storage, which a later in-place change would corrupt
            pair = pair.detach().to(self._device, torch.float64)
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair.clone()

    def set(self, values: Mapping[str, float]) -> None:
        """Scalars that are global already; a later value replaces an earlier one."""
        self._values.update({name: float(value) for name, value in values.items()})

    def add_means(self, values: Mapping[str, float]) -> None:
        """Scalars that are global already and whose mean over the calls is wanted, one call per mini-batch."""
        self.add({name: torch.tensor([value, 1.0], dtype=torch.float64) for name, value in values.items()})

    def max(self, name: str, value: float | Tensor) -> None:
        """Keep the largest value over calls and, after `reduce`, over ranks. NaN is kept."""
        new, old = float(value), self._maxima.get(name, -torch.inf)
        self._maxima[name] = new if new > old or new != new else old

    def reduce(self, all_reduce_sum: Reduce, all_reduce_max: Reduce) -> dict[str, float]:
        """Global values by name: sum / count (omitted where the count is 0), maxima and plain scalars.

        Raises: ValueError when a name was used in two ways; RuntimeError when ranks hold different names.
        """
        names, maxima = sorted(self._sums), sorted(self._maxima)
        everything = [*names, *maxima, *self._values]
        twice = sorted({name for name in everything if everything.count(name) > 1})
        if twice:
            raise ValueError(f"metrics {twice} were given in two ways (add, max, set); use one for each name")
        self._check_same_names(names, maxima, all_reduce_max)
        result = dict(self._values)
        if names:
            packed = all_reduce_sum(torch.stack([self._sums[name] for name in names]).flatten())
            for name, (total, count) in zip(names, packed.view(-1, 2).tolist(), strict=True):
                if count != 0:
                    result[name] = total / count
        if maxima:
            packed = all_reduce_max(
                torch.tensor([self._maxima[name] for name in maxima], dtype=torch.float64, device=self._device)
            )
            result.update(zip(maxima, packed.tolist(), strict=True))
        return dict(sorted(result.items()))

    def _check_same_names(self, names: list[str], maxima: list[str], all_reduce_max: Reduce) -> None:
        digest = hashlib.blake2b("\n".join([*names, "", *maxima]).encode(), digest_size=6).digest()
        mark = float(int.from_bytes(digest, "big"))  # 48 bits: exact in float64
        highest, lowest = all_reduce_max(torch.tensor([mark, -mark], dtype=torch.float64, device=self._device)).tolist()
        if highest != -lowest:
            raise RuntimeError(
                f"ranks hold different metric names; this rank: sums {names}, maxima {maxima}. "
                "Add every metric on every rank, with (0, 0) where it has no tokens"
            )


class Timers:
    """Wall seconds per phase of a step.

    `synchronize` is called at both ends of a phase (a device that runs asynchronously would otherwise charge the work
    of one phase to the next one that waits). Each phase is a span of `spans` as well.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None, spans: Spans = OFF) -> None:
        """Start the first step's clock."""
        self.spans = spans
        self._synchronize = synchronize or (lambda: None)
        self._seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    def restart(self) -> None:
        """Forget what was timed so far; the next step begins now."""
        self._seconds, self._start = {}, time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the block's wall time to `time/<phase>`, also when it raises. Raises: ValueError for "total"."""
        if phase == "total":
            raise ValueError('phase "total" is the time between two calls of collect; give the phase another name')
        self._synchronize()
        start = time.perf_counter()
        try:
            with self.spans(phase):
                yield
        finally:
            self._synchronize()
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start

    def collect(self, tokens: float) -> dict[str, float]:
        """`time/<phase>` and `time/total` in seconds since the last call, and `throughput/tokens_per_second`.

        `tokens`: what the step processed over all ranks. The timers start again from 0.
        """
        now = time.perf_counter()
        total = now - self._start
        values = {f"time/{phase}": seconds for phase, seconds in self._seconds.items()}
        values["time/total"] = total
        values["throughput/tokens_per_second"] = tokens / total if total > 0 else 0.0
        self._seconds, self._start = {}, now
        return values
