"""By hand: two ranks, one step of 10 seconds. Rank 1's clock is 100 seconds ahead."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from typing import Any

import pytest

from megatron_rl.config import parse_config
from megatron_rl.metrics.spans import Collective, Recorder, Span, StepRecord
from megatron_rl.plan.shapes import forward_flops, shape_of
from megatron_rl.profiling.analysis import RankRecord, summarise
from megatron_rl.profiling.page import median_step, timeline_figure
from megatron_rl.profiling.record import add_rates
from megatron_rl.profiling.tables import compare_rows, phase_rows, rate_rows
from tests.config.test_config import raw

AHEAD = 100.0


def rank(number: int, collectives: list[Collective], *, pp: int = 0, shift: float = 0.0) -> RankRecord:
    spans = [
        Span("rollout", 0.0, 4.0, device_seconds=3.0, peak_bytes=10),
        Span("reward", 1.0, 2.0, parent=0),
        Span("update", 4.0, 9.5, device_seconds=5.0, peak_bytes=30),
        Span("forward_backward", 4.0, 8.0, parent=2, device_seconds=4.0, peak_bytes=30),
        Span("optimizer", 8.0, 9.0, parent=2, device_seconds=0.5, peak_bytes=20),
        Span("reward", 0.0, 9.0, thread="ahead"),
        Span("checkpoint", 10.0, 12.0, device_seconds=1.0, peak_bytes=5),
    ]
    for stretch in (*spans, *collectives):
        stretch.start += shift
        stretch.end += shift
    for collective in collectives:
        collective.called += shift
    step = StepRecord(7, shift, 12.0 + shift, spans, collectives)
    return RankRecord(number, {"tp": 0, "pp": pp, "dp": 0}, "host", -shift, 1e12, [step])


def two_ranks() -> list[RankRecord]:
    """Rank 1 comes to the all-reduce 1.5 s after rank 0; the second one, asynchronous, is called in time by both."""
    first = [Collective("all_reduce", "tp", 0, 5.0, 5.0, 7.0, 3), Collective("all_gather", "tp", 1, 7.0, 7.5, 7.75, 3)]
    second = [Collective("all_reduce", "tp", 0, 6.5, 6.5, 7.0, 3), Collective("all_gather", "tp", 1, 7.0, 7.0, 7.5, 3)]
    return [rank(0, first), rank(1, second, shift=AHEAD)]


def test_phases_add_up_and_waiting_is_told_from_communication() -> None:
    summary = summarise(two_ranks(), on_gpu=False)
    assert summary.step_seconds == pytest.approx(10.0)  # without the checkpoint
    seconds = {name: cost.seconds for name, cost in summary.phases.items()}
    assert seconds == pytest.approx(
        {"rollout": 3, "reward": 1, "forward_backward": 4, "optimizer": 1, "update": 0.5, "checkpoint": 2}
    )
    assert sum(seconds.values()) - seconds["checkpoint"] == pytest.approx(10 * (1 - summary.untracked_fraction))
    assert summary.untracked_fraction == pytest.approx(0.05)
    passes = summary.phases["forward_backward"]
    assert passes.waiting_seconds == pytest.approx(1.5 / 2)
    assert passes.communication_seconds == pytest.approx((0.5 + 0.25 + 0.5 + 0.5) / 2)
    assert summary.waiting_fraction == pytest.approx(0.075)
    assert summary.caused_waiting == pytest.approx([0.0, 1.5]) and summary.stragglers == [1]
    assert summary.phases["update"].device_seconds == pytest.approx(0.5)  # 5 - 4 - 0.5
    assert (passes.peak_bytes, summary.phases["rollout"].peak_bytes) == (30, 10)
    assert summary.collectives["all_reduce"] == pytest.approx((1.0, 1.25))
    assert summary.pipeline_bubble == 0.0


def test_the_bubble_is_the_time_blocked_between_stages() -> None:
    """Stages of 4 s, 1 s and 2 s blocked: busy 5 of 2 * 4. Shifted by a second they span 5: 1 - 5/10."""
    first = rank(0, [Collective("recv", "pp", -1, 5.0, 5.0, 6.0, 3)])
    second = rank(1, [Collective("send", "pp", -1, 5.0, 5.0, 7.0, 3)], pp=1, shift=AHEAD)
    summary = summarise([first, second], on_gpu=False)
    assert summary.pipeline_bubble == pytest.approx(1 - 5 / 8)
    assert summary.phases["forward_backward"].waiting_seconds == pytest.approx(1.5)
    late = RankRecord(1, second.place, "host", 1 - AHEAD, None, second.steps)
    assert summarise([first, late], on_gpu=False).pipeline_bubble == pytest.approx(0.5)


def test_a_gpus_collectives_are_not_measured_by_the_host() -> None:
    summary = summarise(two_ranks(), on_gpu=True)
    assert summary.communication_fraction is summary.waiting_fraction is summary.pipeline_bubble is None
    assert summary.stragglers == []


def test_ranks_must_have_measured_the_same() -> None:
    first, second = two_ranks()
    second.steps[0].step = 8
    with pytest.raises(ValueError, match="different steps"):
        summarise([first, second], on_gpu=False)


def test_flops_by_hand() -> None:
    """h 4, 2 heads of width 2, one key-value head, ffn 8, one layer, vocabulary 16, 3 tokens: 6 causal pairs."""
    hf = {"model_type": "qwen2", "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2}
    hf |= {"num_key_value_heads": 1, "intermediate_size": 8, "vocab_size": 16}
    weights = 4 * 8 + 4 * 4 + 3 * 4 * 8 + 16 * 4
    assert 3 * sum(forward_flops(shape_of(hf), 6 / 3)) == 2 * weights * 3 + 4 * 2 * 2 * 6
    moe = {**hf, "model_type": "qwen3_moe", "head_dim": 2, "num_experts": 4, "num_experts_per_tok": 2}
    moe |= {"moe_intermediate_size": 6}
    weights += 2 * 3 * 4 * 6 + 4 * 4 - 3 * 4 * 8
    assert 3 * sum(forward_flops(shape_of(moe), 6 / 3)) == 2 * weights * 3 + 4 * 2 * 2 * 6


METRICS = {
    "batch/sequence_tokens": 120,
    "packing/computed_tokens": 100,
    "packing/attention_pairs": 1000,
    "batch/response_tokens": 60,
}


def profile(on_gpu: bool = False, peak: float | None = 1e12) -> dict[str, Any]:
    ranks = [RankRecord(r.rank, r.place, r.host, r.clock_offset, peak, r.steps) for r in two_ranks()]
    summary = summarise(ranks, on_gpu=on_gpu)
    add_rates(summary, ranks, parse_config(raw()), [{"step": 6, "batch/sequence_tokens": 1e9}, {"step": 7, **METRICS}])
    facts = {"on_gpu": on_gpu, "peak_source": "a datasheet", "device": "x", "torch": "y", "processes": 2, "layout": "z"}
    return {"facts": facts, "summary": dataclasses.asdict(summary)}


def test_rates() -> None:
    rates = profile()["summary"]["rates"]
    assert rates["tokens_per_second"] == pytest.approx(12) and rates["generated_tokens_per_second"] == pytest.approx(20)
    forward = rates["model_flops_per_step"] / 4
    assert rates["mfu_forward_backward"] == pytest.approx(3 * forward / (4 * 2e12))
    assert rates["mfu_step"] == pytest.approx(4 * forward / (10 * 2e12))
    assert rates["mfu_old_logprobs"] is None  # there was no such phase
    unknown = profile(peak=None)
    assert unknown["summary"]["rates"]["mfu_step"] is None
    assert ("MFU of the step", "a datasheet") in rate_rows(unknown)


def test_tables() -> None:
    rows = {row[0]: row[1:] for row in phase_rows(profile())}
    assert rows["forward_backward"] == ["4.000", "0.400", "4.000", "0.875", "0.750", "0 (4.000)", "0"]
    assert rows["no phase"][:2] == ["0.500", "0.050"] and rows["step"][:2] == ["10.000", "1.000"]
    assert rows["checkpoint (one)"][:2] == ["2.000", "–"]
    assert {row[0]: row for row in phase_rows(profile(on_gpu=True))}["step"][4:6] == ["–", "–"]


def test_compare() -> None:
    first, second = profile(), profile()
    second["summary"]["phases"]["rollout"]["seconds"] = 1.5
    second["summary"]["phases"]["probe"] = {**second["summary"]["phases"].pop("optimizer")}
    rows = {row[0]: row[1:] for row in compare_rows(first, second)}
    assert rows["rollout, s"] == ["3.000", "1.500", "0.50"]
    assert rows["optimizer, s"] == ["1.000", "–", "–"] and rows["probe, s"] == ["–", "1.000", "–"]
    assert rows["step, s"] == ["10.000", "10.000", "1.00"]


def test_the_timeline_is_on_one_clock() -> None:
    ranks = two_ranks()
    assert median_step(ranks) == 7
    traces, layout = timeline_figure(ranks, 7)
    by_name = {trace["name"]: trace for trace in traces}
    assert by_name["rollout"]["base"] == [0.0, 0.0] and by_name["rollout"]["x"] == [4.0, 4.0]
    waiting = zip(by_name["waiting"]["y"], by_name["waiting"]["base"], by_name["waiting"]["x"], strict=True)
    assert ("rank 0 collectives", 5.0, 1.5) in list(waiting)
    assert layout["yaxis"]["categoryarray"][-1] == "rank 0" and "rank 0 ahead" in layout["yaxis"]["categoryarray"]


def test_what_a_server_did_has_a_lane_of_its_own_on_the_same_clock() -> None:
    recorder = Recorder({0}, lambda report: contextlib.nullcontext())
    for _ in recorder.steps(range(1)):
        began = time.time()
        with recorder("rollout"):
            time.sleep(0.02)
        recorder.elsewhere("generating", began, began + 0.01, "http://a")
    traces, layout = timeline_figure([RankRecord(0, {"tp": 0, "pp": 0, "dp": 0}, "", 0.0, None, recorder.records)], 0)
    assert set(layout["yaxis"]["categoryarray"]) == {"rank 0", "rank 0 http://a"}
    (lane,) = (trace for trace in traces if trace["name"] == "generating")
    assert lane["y"] == ["rank 0 http://a"] and lane["x"] == pytest.approx([0.01], abs=1e-4)
    assert lane["base"] == pytest.approx([0.0], abs=0.005)
    summary = summarise([RankRecord(0, {"tp": 0, "pp": 0, "dp": 0}, "", 0.0, None, recorder.records)], on_gpu=False)
    assert "generating" not in summary.phases  # it ran beside the step


def test_who_waits_is_told_on_one_clock() -> None:
    """As above, but the rank whose clock is ahead comes first."""
    early = rank(1, [Collective("all_reduce", "tp", 0, 5.0, 5.0, 7.0, 3)], shift=AHEAD)
    summary = summarise([rank(0, [Collective("all_reduce", "tp", 0, 6.5, 6.5, 7.0, 3)]), early], on_gpu=False)
    assert summary.caused_waiting == pytest.approx([1.5, 0.0]) and summary.stragglers == [0]
    assert summary.phases["forward_backward"].waiting_seconds == pytest.approx(0.75)
