"""What a rehearsal writes down: live storages by place, collectives, operations and host reads, by phase."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Tag(NamedTuple):
    """What a storage is: the part of the memory it counts for, what made it, and where."""

    part: str
    maker: str  # module and operator
    line: str  # file:line


class Traffic(NamedTuple):
    """A kind of collective."""

    operation: str
    group: str
    dtype: str


Numbers = dict[tuple[str, ...], float]


@dataclass
class Phase:
    """What was seen in one phase. Bytes at the peak of the device, and of the host, by tag; of collectives the number
    and the bytes; operations by module; reads by line."""

    name: str
    device: Numbers = field(default_factory=dict)
    host: Numbers = field(default_factory=dict)
    calls: Numbers = field(default_factory=dict)
    traffic: Numbers = field(default_factory=dict)
    flops: Numbers = field(default_factory=dict)
    reads: Numbers = field(default_factory=dict)

    def at(self, other: Phase, here: int, there: int, depth: int) -> Phase:
        """Return the phase at `depth` layers, on the line through this one at `here` and the `other` at `there`."""
        result = Phase(self.name)
        for name in ("device", "host", "calls", "traffic", "flops", "reads"):
            first, second = getattr(self, name), getattr(other, name)
            slope = {k: (second.get(k, 0) - first.get(k, 0)) / (there - here) for k in first | second}
            getattr(result, name).update({k: first.get(k, 0) + rise * (depth - here) for k, rise in slope.items()})
        return result


class Heap:
    """The live bytes of one place, and those at the peak since `begin`."""

    def __init__(self) -> None:
        """Begin empty."""
        self.now = self._peak = 0
        self._alive: Counter[Tag] = Counter()
        self._at_peak: dict[Tag, int] = {}
        self._rises = True  # since the last time that something was freed at a peak

    def begin(self) -> None:
        """Begin a new peak."""
        self._peak, self._rises = self.now, True

    def add(self, tag: Tag, count: int) -> None:
        """Add bytes; take away negative ones."""
        if count < 0:
            self._remember()
        self.now += count
        self._alive[tag] += count
        if self.now > self._peak:
            self._peak, self._rises = self.now, True

    def at_peak(self) -> Numbers:
        """Return the bytes at the peak by tag."""
        self._remember()
        return {tag: count for tag, count in self._at_peak.items() if count}

    def _remember(self) -> None:
        if self._rises:
            self._at_peak, self._rises = dict(self._alive), False


class Books:
    """The storages that live, and the phase that is written."""

    def __init__(self) -> None:
        """Begin empty."""
        self.device, self.host = Heap(), Heap()
        self.phase = Phase("build")
        self.part = "other"  # of what is made from now on
        self._live: dict[int, tuple[object, int, Tag, Heap]] = {}

    def begin(self, name: str, part: str) -> None:
        """Begin a phase whose new storages count as `part`."""
        self.phase, self.part = Phase(name), part
        self.device.begin()
        self.host.begin()

    def end(self) -> Phase:
        """Return the phase with its peaks."""
        self.phase.device.update(self.device.at_peak())
        self.phase.host.update(self.host.at_peak())
        return self.phase

    def is_known(self, storage: torch.UntypedStorage) -> bool:
        """Tell whether the storage is in the books."""
        return storage._cdata in self._live or not storage.nbytes()

    def enter(self, storage: torch.UntypedStorage, tag: Tag, heap: Heap) -> None:
        """Enter a storage until it is freed."""
        key, count = storage._cdata, storage.nbytes()
        self._live[key] = (weakref.ref(storage, lambda _: self._leave(key)), count, tag, heap)
        heap.add(tag, count)

    def resize(self, storage: torch.UntypedStorage, count: int) -> None:
        """Note that a storage gets another size."""
        if storage._cdata in self._live:
            reference, before, tag, heap = self._live[storage._cdata]
            self._live[storage._cdata] = (reference, count, tag, heap)
            heap.add(tag, count - before)

    def name(self, tensor: Tensor, part: str) -> None:
        """Let what a tensor holds count as `part`, whoever made it."""
        key = tensor.untyped_storage()._cdata
        if key in self._live:
            reference, count, tag, heap = self._live[key]
            heap.add(tag, -count)
            self._live[key] = (reference, count, Tag(part, "", ""), heap)
            heap.add(Tag(part, "", ""), count)

    def _leave(self, key: int) -> None:
        _, count, tag, heap = self._live.pop(key)
        heap.add(tag, -count)
