"""Sums over the ranks' records. Seconds are those of one step, as means over the measured steps.

A span's own seconds are its duration without its children's, so that the phases of a rank add up to its step but for
what no span covers (`untracked`). A step's wall time is counted without its checkpoint, which few steps have.
"""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from megatron_rl.files import read_asset
from megatron_rl.metrics.spans import Collective, StepRecord

ASSETS = Path(__file__).parent / "assets"
PHASES: dict[str, str] = read_asset(__file__, "phases.yaml")  # name -> colour, in the order of a step
POINT_TO_POINT = ("send", "recv")
# A rank is a straggler when the others wait for it longer than for a rank on average, by more than this share of a
# step: where everyone is late now and then nobody is one.
STRAGGLER_FRACTION = 0.05


@dataclass(frozen=True, slots=True)
class RankRecord:
    """The record of one rank."""

    rank: int
    place: dict[str, int]  # rank inside tp, pp and dp
    host: str
    clock_offset: float  # seconds to add to get rank 0's clock
    peak_flops: float | None  # FLOP/s
    steps: list[StepRecord]


@dataclass(slots=True)
class Cost:
    """Seconds of one phase on one rank, or of several added up."""

    seconds: float = 0.0
    device_seconds: float = 0.0
    communication_seconds: float = 0.0  # in collectives, from the moment that the last rank came
    waiting_seconds: float = 0.0  # in collectives until then, and in sends and receives
    peak_bytes: int = 0

    def add(self, other: Self, share: float = 1.0) -> None:
        """Add a share of another's seconds, and take the larger peak."""
        self.seconds += share * other.seconds
        self.device_seconds += share * other.device_seconds
        self.communication_seconds += share * other.communication_seconds
        self.waiting_seconds += share * other.waiting_seconds
        self.peak_bytes = max(self.peak_bytes, other.peak_bytes)


@dataclass(slots=True)
class Summary:
    """A profile. Fractions are of the step's wall time, unless said otherwise; None: not measured."""

    steps: list[int]
    step_seconds: float  # mean over steps and ranks
    untracked_fraction: float  # of a rank's wall time that no span covers, the largest over ranks
    phases: dict[str, Cost]  # mean over ranks; checkpoint: one save
    by_rank: list[dict[str, float]]  # own seconds of each phase, by rank
    caused_waiting: list[float]  # seconds that the other ranks waited for this one, together, by rank
    stragglers: list[int]
    communication_fraction: float | None
    waiting_fraction: float | None
    pipeline_bubble: float | None  # see `bubble_fraction`
    collectives: dict[str, tuple[float, float]]  # operation -> (calls, seconds) of one rank and step
    peak_flops: float | None = None  # FLOP/s of all processes
    rates: dict[str, float | None] = field(default_factory=dict)


def summarise(ranks: Sequence[RankRecord], *, on_gpu: bool) -> Summary:
    """Return the summary without rates. On a GPU the host does not wait for collectives, so its clock says nothing
    about communication, waiting and bubbles: these are left out, and the trace has them.

    Raises: ValueError without a measured step, or when ranks measured different ones.
    """
    steps = [record.step for record in ranks[0].steps]
    if not steps or any([record.step for record in rank.steps] != steps for rank in ranks):
        raise ValueError(f"ranks measured different steps: {[[r.step for r in rank.steps] for rank in ranks]}")
    waits, caused = waiting(ranks)
    costs = [[_costs(rank, index, waits) for index in range(len(steps))] for rank in ranks]
    walls = [[_wall(record) for record in rank.steps] for rank in ranks]
    phases: dict[str, Cost] = defaultdict(Cost)
    by_rank: list[dict[str, float]] = []
    for steps_of_rank in costs:
        own: dict[str, float] = defaultdict(float)
        for phases_of_step in steps_of_rank:
            for name, cost in phases_of_step.items():
                if name != "checkpoint":
                    phases[name].add(cost, 1 / (len(steps) * len(ranks)))
                    own[name] += cost.seconds / len(steps)
        if saves := [each["checkpoint"] for each in steps_of_rank if "checkpoint" in each]:
            longest = max(saves, key=lambda cost: cost.seconds)
            phases["checkpoint"].add(longest, 1 / len(ranks))
            own["checkpoint"] = longest.seconds
        by_rank.append(dict(own))
    wall = statistics.mean(value for row in walls for value in row)
    tracked = [sum(s for name, s in own.items() if name != "checkpoint") for own in by_rank]
    untracked = max(1 - part / statistics.mean(row) for part, row in zip(tracked, walls, strict=True))
    stepwise = [cost for name, cost in phases.items() if name != "checkpoint"]
    threshold = statistics.mean(caused) + STRAGGLER_FRACTION * wall
    return Summary(
        steps=steps,
        step_seconds=wall,
        untracked_fraction=untracked,
        phases={name: phases[name] for name in sorted(phases, key=order)},
        by_rank=by_rank,
        caused_waiting=caused,
        stragglers=[rank for rank, seconds in enumerate(caused) if seconds > threshold and not on_gpu],
        communication_fraction=None if on_gpu else sum(c.communication_seconds for c in stepwise) / wall,
        waiting_fraction=None if on_gpu else sum(c.waiting_seconds for c in stepwise) / wall,
        pipeline_bubble=None if on_gpu else bubble_fraction(ranks),
        collectives=_operations(ranks),
    )


def bubble_fraction(ranks: Sequence[RankRecord]) -> float:
    """Return the share of the pipelines' forward and backward time in which a stage does no work; 0 without a pipeline.

    For each pass of each pipeline: 1 - (busy seconds of its stages, added up) / (stages * the time from the first
    stage's start to the last stage's end), where a stage is busy while it is in the pass and not blocked in a send or a
    receive. Passes are weighted by their length.
    """
    pipelines: dict[tuple[int, int], list[RankRecord]] = defaultdict(list)
    for rank in ranks:
        pipelines[rank.place["tp"], rank.place["dp"]].append(rank)
    busy = total = 0.0
    for stages in pipelines.values():
        if len(stages) == 1:
            continue
        for index in range(len(stages[0].steps)):
            for passes in zip(*(_passes(stage, index) for stage in stages), strict=True):
                busy += sum(end - start - blocked for start, end, blocked in passes)
                window = max(end for _, end, _ in passes) - min(start for start, _, _ in passes)
                total += len(stages) * window
    return 1 - busy / total if total else 0.0


def _passes(stage: RankRecord, index: int) -> list[tuple[float, float, float]]:
    """Return (start, end, seconds blocked in sends and receives) of each forward-backward pass, on rank 0's clock."""
    record = stage.steps[index]
    blocked: dict[int, float] = defaultdict(float)
    for c in record.collectives:
        if c.name in POINT_TO_POINT:
            blocked[c.span] += c.end - c.start
    return [
        (span.start + stage.clock_offset, span.end + stage.clock_offset, blocked[i])
        for i, span in enumerate(record.spans)
        if span.name == "forward_backward"
    ]


def waiting(ranks: Sequence[RankRecord]) -> tuple[dict[int, float], list[float]]:
    """Return (seconds waited in each Collective, by its id(); seconds a step that the others waited for each rank).

    Waiting ends when the last rank calls. A send or a receive is all waiting.
    """
    waits: dict[int, float] = {}
    caused = [0.0] * len(ranks)
    for index in range(len(ranks[0].steps)):
        meetings: dict[tuple[str, int], list[tuple[int, Collective]]] = defaultdict(list)
        for position, rank in enumerate(ranks):
            for c in rank.steps[index].collectives:
                if c.name in POINT_TO_POINT:
                    waits[id(c)] = c.end - c.start
                else:
                    meetings[c.group, c.number].append((position, c))
        for met in meetings.values():
            if len({c.name for _, c in met}) > 1:
                continue  # not one collective: a rank began to watch in the middle
            calls = [(c.called + ranks[position].clock_offset, position) for position, c in met]
            last, latecomer = max(calls)
            for position, c in met:
                held_up = last - (c.start + ranks[position].clock_offset)
                waits[id(c)] = wait = min(max(held_up, 0.0), c.end - c.start)
                caused[latecomer] += wait
    return waits, [seconds / len(ranks[0].steps) for seconds in caused]


def _costs(rank: RankRecord, index: int, waits: dict[int, float]) -> dict[str, Cost]:
    """Return the cost of each phase in one step. Spans of other threads run beside the step and are no part of it."""
    record = rank.steps[index]
    own = [Cost(s.end - s.start, s.device_seconds or 0.0, peak_bytes=s.peak_bytes or 0) for s in record.spans]
    for span in record.spans:
        if span.parent >= 0:
            own[span.parent].seconds -= span.end - span.start
            own[span.parent].device_seconds -= span.device_seconds or 0.0
    for c in record.collectives:
        if c.span >= 0:
            wait = waits.get(id(c), 0.0)
            own[c.span].waiting_seconds += wait
            own[c.span].communication_seconds += c.end - c.start - wait
    costs: dict[str, Cost] = defaultdict(Cost)
    for span, cost in zip(record.spans, own, strict=True):
        if not span.thread:
            costs[span.name].add(cost)
    return costs


def _wall(record: StepRecord) -> float:
    saving = sum(span.end - span.start for span in record.spans if span.name == "checkpoint")
    return record.end - record.start - saving


def _operations(ranks: Sequence[RankRecord]) -> dict[str, tuple[float, float]]:
    seconds_of: dict[str, list[float]] = defaultdict(list)
    for rank in ranks:
        for record in rank.steps:
            for c in record.collectives:
                seconds_of[c.name].append(c.end - c.start)
    count = len(ranks) * len(ranks[0].steps)
    return {name: (len(seconds) / count, sum(seconds) / count) for name, seconds in sorted(seconds_of.items())}


def order(name: str) -> tuple[int, str]:
    """Return a sort key: phases in the order of a step, others behind."""
    return (list(PHASES).index(name) if name in PHASES else len(PHASES), name)
