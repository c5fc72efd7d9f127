from __future__ import annotations

import contextlib
import gzip
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rl import device
from megatron_rl.metrics import Timers
from megatron_rl.metrics.spans import OFF, Recorder, from_json, to_json

Report = Callable[[str, str, int, float, float, float], None]


class Watch:
    """Stands for watch_collectives: hands the test the recorder's own report."""

    def __init__(self) -> None:
        self.report: Report | None = None
        self.open = 0

    @contextlib.contextmanager
    def __call__(self, report: Report) -> Iterator[None]:
        self.report, self.open = report, self.open + 1
        try:
            yield
        finally:
            self.open -= 1


def test_spans_nest_on_measured_steps_alone() -> None:
    watch = Watch()
    recorder = Recorder({1}, watch)
    timers = Timers(spans=recorder)
    for _ in recorder.steps(range(3)):
        with timers("update"):
            with recorder("forward_backward"):
                if watch.open:
                    assert watch.report
                    watch.report("all_reduce", "tp", 0, 1.0, 1.0, 2.0)
            with pytest.raises(KeyError), recorder("optimizer"), recorder.light("inner"):
                raise KeyError
        with timers("log"):
            pass
    assert watch.open == 0
    (record,) = recorder.records
    names = [(span.name, span.parent) for span in record.spans]
    assert record.step == 1
    assert names == [("update", -1), ("forward_backward", 0), ("optimizer", 0), ("inner", 2), ("log", -1)]
    for span in record.spans:
        parent = record.spans[span.parent] if span.parent >= 0 else record
        assert parent.start <= span.start <= span.end <= parent.end
    assert [c.span for c in record.collectives] == [1]
    assert from_json(json.loads(json.dumps(to_json(recorder.records)))) == recorder.records


def test_a_loop_left_early_ends_its_step() -> None:
    watch = Watch()
    recorder = Recorder({0, 1}, watch)
    for _ in recorder.steps(range(2)):
        break
    with recorder("after"):
        pass
    assert watch.open == 0 and [record.spans for record in recorder.records] == [[]]


def test_work_of_other_threads_is_no_part_of_a_phase() -> None:
    recorder = Recorder({0}, Watch())

    def grade() -> None:
        with recorder.light("reward"):
            pass

    for _ in recorder.steps(range(1)):
        with recorder("rollout"):
            thread = threading.Thread(target=grade, name="ahead")
            thread.start()
            thread.join()
    assert [(s.name, s.parent, s.thread) for s in recorder.records[0].spans] == [
        ("rollout", -1, ""),
        ("reward", -1, "ahead"),
    ]


def test_a_parent_keeps_its_childrens_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks of a device whose memory the test sets: 5 before the child, 9 in it, 4 after it."""
    state = {"now": 0, "peak": 0}

    def use(amount: int) -> None:
        state.update(now=amount, peak=max(state["peak"], amount))

    monkeypatch.setattr(device, "reset_peak", lambda: state.update(peak=state["now"]))
    monkeypatch.setattr(device, "peak_since_reset", lambda: state["peak"])
    recorder = Recorder({0}, Watch())
    for _ in recorder.steps(range(1)):
        with recorder("parent"):
            use(5)
            use(1)
            with recorder("child"):
                use(9)
                use(2)
            with recorder("second"):
                use(3)
            use(4)
        with recorder("next"):
            pass
    peaks = {span.name: span.peak_bytes for span in recorder.records[0].spans}
    assert peaks == {"parent": 9, "child": 9, "second": 3, "next": 4}


def test_memory_of_a_cpu_phase_is_its_own() -> None:
    """512 MB touched in one phase show there and not in the one after it."""
    recorder = Recorder({0}, Watch())
    for _ in recorder.steps(range(1)):
        with recorder("large"):
            large = torch.ones(128_000_000)
            del large
        with recorder("small"):
            pass
    spans = recorder.records[0].spans
    assert spans[0].peak_bytes is not None and spans[1].peak_bytes is not None
    assert spans[0].peak_bytes - spans[1].peak_bytes > 400e6
    assert spans[0].device_seconds is not None and spans[0].device_seconds > 0


def test_off_does_nothing() -> None:
    assert list(OFF.steps(range(3))) == [0, 1, 2]
    assert OFF("a") is OFF.light("b")  # one object for all: nothing is made


def test_the_trace_is_chrome_json_with_the_phases(tmp_path: Path) -> None:
    path = tmp_path / "traces" / "rank0.json.gz"
    watch = Watch()
    recorder = Recorder({1}, watch, traced=0, trace_path=path)
    for _ in recorder.steps(range(2)):
        with recorder("rollout"), recorder.light("reward"):
            torch.ones(4) @ torch.ones(4)
    with gzip.open(path, "rt") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    names = {event["name"] for event in events}
    assert {"rollout", "reward", "aten::dot"} <= names
    assert [record.step for record in recorder.records] == [1]  # the traced step is not measured
