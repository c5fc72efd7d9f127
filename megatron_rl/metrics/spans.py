"""Named stretches of a step's time on one rank. `OFF` records nothing and costs a call; `Recorder` records the steps it
was told to and traces one with torch's profiler."""

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from megatron_rl import device

Watch = Callable[[Callable[[str, str, int, float, float, float], None]], AbstractContextManager[None]]
_NOTHING: AbstractContextManager[None] = contextlib.nullcontext()


class Spans:
    """Spans that record nothing; `Recorder` overrides them."""

    def __call__(self, name: str) -> AbstractContextManager[None]:
        """Return the context of a phase or a part of one; spans nest. The device is waited for at both ends."""
        return _NOTHING

    def light(self, name: str) -> AbstractContextManager[None]:
        """Return the context of something frequent, on any thread: wall time alone, nothing is waited for."""
        return _NOTHING

    def elsewhere(self, name: str, start: float, end: float, place: str) -> None:
        """Record what another machine or process did, `place`, between two times of time.time()."""

    def steps(self, steps: Iterable[int]) -> Iterator[int]:
        """Yield the same steps; what the loop's body does between two of them is one step."""
        yield from steps


OFF = Spans()


@dataclass(slots=True)
class Span:
    """Seconds on this machine's monotonic clock. A span of the main thread lies within its parent."""

    name: str
    start: float
    end: float = 0.0
    parent: int = -1  # index into the step's spans; -1: none
    device_seconds: float | None = None  # see device.seconds_between; None: not measured
    peak_bytes: int | None = None  # see device.peak_since_reset
    thread: str = ""  # of another thread than the main one: its name


@dataclass(slots=True)
class Collective:
    """Seconds that the host was inside one collective, or blocked until it was done."""

    name: str
    group: str  # the process group's name, the same on its ranks
    number: int  # of the call in this step, the same on the group's ranks; -1 for a send or receive
    called: float  # earlier than start when asynchronous
    start: float
    end: float
    span: int  # index of the innermost span around it; -1: none


@dataclass(slots=True)
class StepRecord:
    """One step on one rank."""

    step: int
    start: float
    end: float = 0.0
    spans: list[Span] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)


class Recorder(Spans):
    """Records the steps in `measured`; writes torch's trace of step `traced` to `trace_path`.

    A traced step is not measured: torch's profiler slows it down.
    """

    def __init__(
        self, measured: Collection[int], watch: Watch, *, traced: int | None = None, trace_path: Path | None = None
    ) -> None:
        """Prepare. `watch`: reports collectives while its context is open (parallel.traffic.watch_collectives)."""
        self.records: list[StepRecord] = []
        self._measured, self._watch, self._traced, self._trace_path = measured, watch, traced, trace_path
        self._record: StepRecord | None = None
        self._tracing = False
        self._stack: list[int] = []
        self._peaks: list[int] = []  # of the open spans, before their current child
        self._main = threading.get_ident()

    @override
    def __call__(self, name: str) -> AbstractContextManager[None]:
        if self._record is not None:
            return self._span(self._record, name)
        return torch.profiler.record_function(name) if self._tracing else _NOTHING

    @override
    def light(self, name: str) -> AbstractContextManager[None]:
        if self._record is not None:
            return self._light_span(self._record, name)
        return torch.profiler.record_function(name) if self._tracing else _NOTHING

    @override
    def elsewhere(self, name: str, start: float, end: float, place: str) -> None:
        if self._record is not None:
            shift = time.perf_counter() - time.time()
            self._record.spans.append(Span(name, start + shift, end + shift, thread=place))

    @override
    def steps(self, steps: Iterable[int]) -> Iterator[int]:
        for step in steps:
            if step == self._traced:
                with self._trace():
                    yield step
            elif step in self._measured:
                with self._recording(step), self._watch(self._add_collective):
                    yield step
            else:
                yield step

    @contextlib.contextmanager
    def _recording(self, step: int) -> Iterator[None]:
        device.synchronize()
        self._record = record = StepRecord(step, time.perf_counter())
        try:
            yield
        finally:
            device.synchronize()
            record.end = time.perf_counter()
            self._record = None
            self.records.append(record)

    @contextlib.contextmanager
    def _trace(self) -> Iterator[None]:
        with torch.profiler.profile(activities=device.profiler_activities()) as profiler:
            self._tracing = True
            try:
                yield
            finally:
                self._tracing = False
        if self._trace_path is not None:
            self._trace_path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self._trace_path))

    @contextlib.contextmanager
    def _span(self, record: StepRecord, name: str) -> Iterator[None]:
        device.synchronize()
        device.push_range(name)
        if self._peaks:
            self._peaks[-1] = max(self._peaks[-1], device.peak_since_reset())
        device.reset_peak()
        span = Span(name, 0.0, parent=self._stack[-1] if self._stack else -1)
        self._stack.append(len(record.spans))
        self._peaks.append(0)
        record.spans.append(span)
        mark = device.mark()
        span.start = time.perf_counter()
        try:
            yield
        finally:
            end = device.mark()
            device.synchronize()
            span.end = time.perf_counter()
            span.device_seconds = device.seconds_between(mark, end)
            span.peak_bytes = max(self._peaks.pop(), device.peak_since_reset())
            self._stack.pop()
            if self._peaks:
                self._peaks[-1] = max(self._peaks[-1], span.peak_bytes)
                device.reset_peak()
            device.pop_range()

    @contextlib.contextmanager
    def _light_span(self, record: StepRecord, name: str) -> Iterator[None]:
        is_main = threading.get_ident() == self._main
        parent = self._stack[-1] if is_main and self._stack else -1
        start = time.perf_counter()
        try:
            yield
        finally:
            thread = "" if is_main else threading.current_thread().name
            record.spans.append(Span(name, start, time.perf_counter(), parent, thread=thread))

    def _add_collective(self, name: str, group: str, number: int, called: float, start: float, end: float) -> None:
        if self._record is not None:
            span = self._stack[-1] if self._stack else -1
            self._record.collectives.append(Collective(name, group, number, called, start, end, span))


def to_json(records: list[StepRecord]) -> list[dict[str, Any]]:
    """Return plain data, a list for each span and collective: a step may have thousands."""
    return [
        {"step": r.step, "start": r.start, "end": r.end}
        | {"spans": list(map(astuple, r.spans)), "collectives": list(map(astuple, r.collectives))}
        for r in records
    ]


def from_json(steps: list[dict[str, Any]]) -> list[StepRecord]:
    """Undo `to_json`."""
    records = []
    for step in steps:
        spans, collectives = [Span(*row) for row in step["spans"]], [Collective(*row) for row in step["collectives"]]
        records.append(StepRecord(step["step"], step["start"], step["end"], spans, collectives))
    return records
