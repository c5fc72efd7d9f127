"""Which samples of a mini-batch are computed together: the micro-batches of every data-parallel rank."""

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens to compute. Samples are known by their index in the step."""

    lengths: dict[int, int]  # of each sample alone
    families: dict[int, int] = field(default_factory=dict)  # sample -> its family, of those that begin alike
    prefixes: dict[int, int] = field(default_factory=dict)  # family -> tokens that its samples in a micro-batch share

    def shared(self, chosen: list[int]) -> set[int]:
        """Return the families with several samples in a micro-batch of the `chosen`."""
        families = [self.families[i] for i in chosen if i in self.families]
        return {family for family in set(families) if families.count(family) > 1}

    def load(self, chosen: list[int]) -> int:
        """Return the tokens of a micro-batch."""
        total, seen = 0, set[int]()
        for i in chosen:
            total += self.lengths[i]
            family = self.families.get(i)
            if family in seen:
                total -= self.prefixes[family]
            elif family is not None:
                seen.add(family)
        return total


def deal(work: Work, capacity: int, ranks: int, *, count_multiple: int = 1) -> list[list[list[int]]]:
    """Return each data-parallel rank's micro-batches, as samples in ascending order.

    Every rank gets the same number of them, a multiple of `count_multiple`. None exceeds `capacity` tokens, which each
    sample alone must not. Families that share a prefix stay together as far as that balances; where it does not, they
    are cut into 2, 4, ... parts, down to single samples, whichever gives the smallest heaviest micro-batch.

    Raises: ValueError when a sample alone exceeds the capacity.
    """
    best: tuple[int, list[list[int]]] | None = None
    for items in _splits(work):
        bins, heaviest = _fit(items, work, capacity, ranks, count_multiple)
        if heaviest <= capacity and (best is None or heaviest * len(bins) < best[0]):
            best = heaviest * len(bins), bins
    if best is None:
        longest = max(work.lengths.values())
        raise ValueError(f"a sample of {longest} tokens exceeds the {capacity} of a micro-batch; raise the budget")
    return _shares(best[1], work, ranks)


def _splits(work: Work) -> Iterator[list[list[int]]]:
    """Yield the samples as items that stay together: whole families, then halves of them, ..., then single samples."""
    families: dict[int, list[int]] = {}
    for i, family in work.families.items():
        families.setdefault(family, []).append(i)
    alone = [[i] for i in work.lengths if i not in work.families]
    parts, largest = 1, max(map(len, families.values()), default=1)
    while parts < largest:
        yield alone + [part for samples in families.values() for part in _cut(samples, min(parts, len(samples)))]
        parts *= 2
    yield [[i] for i in work.lengths]


def _fit(items: list[list[int]], work: Work, capacity: int, ranks: int, unit: int) -> tuple[list[list[int]], int]:
    """Return all ranks' micro-batches, as few as fit, and the tokens of the heaviest: more than `capacity` when none
    fits."""
    loads = [work.load(item) for item in items]
    count = unit * max(1, -(-work.load(list(work.lengths)) // (capacity * ranks * unit)))
    while True:
        dealt = _longest_first(loads, count * ranks)
        bins = [sorted(i for item in chosen for i in items[item]) for chosen in dealt]
        heaviest = max(map(work.load, bins))
        if heaviest <= capacity or max(loads) > capacity:
            return bins, heaviest
        count += unit


def _cut(samples: list[int], parts: int) -> list[list[int]]:
    ends = [len(samples) * k // parts for k in range(parts + 1)]
    return [samples[start:end] for start, end in itertools.pairwise(ends)]


def _shares(bins: list[list[int]], work: Work, ranks: int) -> list[list[list[int]]]:
    """Return each rank's bins: heaviest first, one to each rank per round, the heaviest of a round to the rank with
    the least so far: equal counts, balanced ranks, and micro-batches of one round that are alike, so that ranks keep
    pace."""
    bins = sorted(bins, key=lambda chosen: (-work.load(chosen), chosen))
    shares: list[list[list[int]]] = [[] for _ in range(ranks)]
    totals = [0] * ranks
    for start in range(0, len(bins), ranks):
        order = sorted(range(ranks), key=lambda which: (totals[which], which))
        for which, chosen in zip(order, bins[start : start + ranks], strict=True):
            totals[which] += work.load(chosen)
            shares[which].append(chosen)
    return shares


def _longest_first(loads: list[int], count: int) -> list[list[int]]:
    """Return the longest-processing-time partition into `count` bins: heaviest first, each to the emptiest bin, ties to
    the first.

    No bin stays empty while another holds two items.
    """
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, which) for which in range(count)]
    for i in sorted(range(len(loads)), key=lambda i: (-loads[i], i)):
        load, which = heapq.heappop(heap)
        bins[which].append(i)
        heapq.heappush(heap, (load + loads[i], which))
    return bins
