"""What a rehearsal writes down: live storages of the device and of the host, collectives, operations, by phase."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Tag(NamedTuple):
    """What a storage is: the part of the memory that it counts for, the module and operator that made it, file:line."""

    part: str
    maker: str = ""
    line: str = ""


Numbers = Counter[Any]  # by a tuple of texts; at a depth between two, whole numbers no more


@dataclass
class Phase:
    """What was seen in one phase: bytes by tag at the peaks of device and host, calls and bytes of collectives by
    operation, group and dtype, operations by module and operator."""

    name: str
    device: Numbers = field(default_factory=Counter)
    host: Numbers = field(default_factory=Counter)
    calls: Numbers = field(default_factory=Counter)
    traffic: Numbers = field(default_factory=Counter)
    flops: Numbers = field(default_factory=Counter)

    def at(self, share: float, other: Phase) -> Phase:
        """Return the phase on the line from this one (share 0) through the `other` (1), which is of a deeper model.
        What shrinks with depth is another tensor on a border between ranks: it stays."""
        result = Phase(self.name)
        for name in (each.name for each in fields(Phase)[1:]):
            first, second, ours = getattr(self, name), getattr(other, name), getattr(result, name)
            ours.update({k: first[k] + share * max(0, second[k] - first[k]) for k in first | second})
        return result


class Heap:
    """The live bytes of one place by tag, and those at the peak since `begin`."""

    def __init__(self) -> None:
        """Begin empty."""
        self._now = self._peak = 0
        self._alive: Numbers = Counter()
        self._at_peak: Numbers = Counter()
        self._rises = False  # a peak whose tags are not kept yet

    def begin(self) -> None:
        """Forget the peak."""
        self._peak, self._rises = self._now, True

    def add(self, tag: Tag, count: int) -> None:
        """Add bytes, negative ones where they are freed."""
        if count < 0:
            self.at_peak()
        self._now += count
        self._alive[tag] += count
        if self._now > self._peak:
            self.begin()

    def at_peak(self) -> Numbers:
        """Return the bytes at the peak."""
        if self._rises:
            self._at_peak, self._rises = +self._alive, False
        return self._at_peak


class Books:
    """The storages that live, and the phase that is written."""

    def __init__(self) -> None:
        """Begin empty."""
        self.device, self.host = Heap(), Heap()
        self.phase, self.part = Phase(""), ""  # that is written, and what new storages count as
        self.phases: list[Phase] = []  # that are over
        self._live: dict[int, tuple[object, int, Tag, Heap]] = {}

    @contextmanager
    def during(self, name: str, part: str) -> Iterator[None]:
        """Write the phase `name`, whose new storages count as `part`."""
        self.phase, self.part = Phase(name), part
        self.device.begin()
        self.host.begin()
        yield
        self.phase.device, self.phase.host = self.device.at_peak(), self.host.at_peak()
        self.phases.append(self.phase)

    def knows(self, storage: torch.UntypedStorage) -> bool:
        """Tell whether the storage is in the books, or empty."""
        return storage._cdata in self._live or not storage.nbytes()

    def enter(self, storage: torch.UntypedStorage, tag: Tag, heap: Heap, count: int | None = None) -> None:
        """Enter a storage of `count` bytes until it is freed; again: with other bytes or another tag."""
        key, count = storage._cdata, storage.nbytes() if count is None else count
        self._leave(key)
        self._live[key] = (weakref.ref(storage, lambda _: self._leave(key)), count, tag, heap)
        heap.add(tag, count)

    def change(self, storage: torch.UntypedStorage, count: int | None = None, tag: Tag | None = None) -> None:
        """Give a storage that is in the books other bytes or another tag."""
        if storage._cdata in self._live:
            _, before, old, heap = self._live[storage._cdata]
            self.enter(storage, tag or old, heap, before if count is None else count)

    def name(self, tensor: Tensor, part: str) -> None:
        """Let what a tensor holds count as `part`, whoever made it."""
        self.change(tensor.untyped_storage(), tag=Tag(part))

    def _leave(self, key: int) -> None:
        if key in self._live:
            _, count, tag, heap = self._live.pop(key)
            heap.add(tag, -count)
