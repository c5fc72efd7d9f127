from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from megatron_rl import cli
from megatron_rl.config import dump_config
from megatron_rl.errors import UserError
from megatron_rl.metrics.entropy_law import fit_law, fit_line
from megatron_rl.report import build_report, summarise
from megatron_rl.report import page as page_module
from megatron_rl.report.benchmarks import benchmarks
from megatron_rl.report.catalogue import sections
from megatron_rl.report.figures import build, smooth
from megatron_rl.report.panels import config_differences
from megatron_rl.report.runs import load_runs
from tests.browser import CHROMIUM, settled
from tests.packing.test_pack import make_config

LOGGED = (
    "entropy/p10 entropy/p90 cov/mean cov/std cov/vocab_mean cov/top_0.02pct_mean cov/top_0.2pct_mean "
    "cov/top_2pct_mean select/count select/fraction select/logprob_mean select/entropy_mean reward/mean "
    "response/length_mean loss/clip_low loss/policy optimizer/grad_norm optimizer/lr mismatch/abs_mean "
    "mismatch/abs_max mismatch/kl staleness/mean staleness/max "
    "rollout/idle_seconds rollout/tail_seconds sampling/discarded_token_fraction rollout/prefix_hit_fraction "
    "time/rollout time/reward time/old_logprobs time/select time/update time/sync time/probe "
    "time/total throughput/tokens_per_second entropy/first_order_change entropy/tangent_change law/ceiling "
    "law/ceiling_low law/ceiling_high law/surprise law/alarm eval/math500/accuracy control/kl_coef"
).split()
A, B = 0.2, 0.6


def write_run(path: Path, loss: str = "kl_cov", steps: int = 30, drop: tuple[str, ...] = ()) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(dump_config(make_config(name=path.name, loss={"type": loss})))
    with (path / "metrics.jsonl").open("w") as file:
        for step in range(steps):
            entropy = 0.7 - 0.01 * step
            row: dict[str, Any] = {"step": step, **{name: 0.5 + 0.001 * step for name in LOGGED}}
            row |= {"entropy/mean": entropy, "reward/accuracy": B - A * math.exp(entropy), "time/total": 5.0}
            row |= {"entropy/predicted_change": -0.01 * step, "entropy/realised_change": -0.02 * step + 0.1}
            if step % 10 == 0:
                row["eval/accuracy"] = step / 100
            row |= {"eval/math500/accuracy_low": 0.4, "eval/math500/accuracy_high": 0.9}
            file.write(json.dumps({name: value for name, value in row.items() if name not in drop}) + "\n")
    return path


def add_ledger(run: Path) -> None:
    """Two steps; the groups of covariance have magnitudes 4 + 1 and 3 + 2, so all spending is 10."""
    columns = {"columns": ["count", "spent", "probed", "realised", "covariance"], "quantiles": [0.9]}
    rows = [
        {"covariance": [[0.1, 9, -4, 0, 0], [None, 1, 1, 0, 0]], "tokens": [["\n", 7, 1, 2, 0, 0]]},
        {
            "covariance": [[0.1, 9, 3, 0, 0], [None, 1, 2, 0, 0]],
            "tokens": [["\n", 7, 1, 1, 0, 0], ["so", 8, 1, 6, 0, 0]],
        },
    ]
    positions: dict[str, Any] = {"positions": [[0, 0, 1, 5, 0, 0], [1, 2, 2, -1, 0, 0]]}
    positions |= {"quarters": [[0, 1, 3, 0, 0, 1.5], [3, 2, -1, 0, 0, -0.5]]}
    positions |= {"kinds": [["number", 2, 0.5, 0, 0, 0.5], ["word", 1, 3.5, 0, 0, 1]]}
    lines = [json.dumps({"step": step} | columns | row | positions) for step, row in enumerate(rows)]
    (run / "ledger.jsonl").write_text("\n".join(lines) + "\n")


def add_samples(run: Path, text: str = "1</script>") -> None:
    values = {"text": [text, "+"], "token_id": [1, 2], "logprob": [-0.5, -2], "entropy": [0.1, 1.5]}
    values |= {"covariance": [-0.3, 0.2], "selected": [1]}
    sample = {
        "prompt": "1,2=3:",
        "response": text + "+",
        "answer": "3",
        "score": 0,
        "reward": 0,
        "finish_reason": "stop",
    }
    lines = [json.dumps({"step": 0, **sample}), json.dumps({"step": 29, **sample, "tokens": values})]
    (run / "samples.jsonl").write_text("\n".join(lines) + "\n")


class Page(HTMLParser):
    """What a browser would load or follow, and the text of headings and notes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.headings: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [str(value) for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]
        self.ids += [str(value) for name, value in attrs if name == "id"]
        if tag not in ("meta", "line", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "line":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h3":
            self.headings.append(data)


def figures_of(text: str) -> dict[str, Any]:
    found = re.search(r"<script>const FIGURES = (.*);</script>", text)
    assert found
    return json.loads(found.group(1))


def test_page_is_self_contained_and_complete(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a"),
        write_run(tmp_path / "b", "clip_cov"),
        write_run(tmp_path / "c", "ppo_clip"),
    ]
    for run in runs:
        add_ledger(run)
    out = build_report(runs)
    assert out == tmp_path.resolve() / "report.html"
    text = out.read_text()
    page = Page(text)
    assert page.links == [] and page.open == []
    assert not re.search(r"//cdn\.|jsdelivr|unpkg|cdnjs", text)
    assert "default-src 'none'" in text
    expected = [spec.title for _, specs in sections(load_runs(runs)) for spec in specs]
    assert [title for title in page.headings if title != "Options that differ"] == expected and len(expected) == 42
    figures = figures_of(text)
    assert sorted(figures) == sorted(i for i in page.ids if i.startswith("figure-"))
    for figure in figures.values():
        go.Figure(data=figure["traces"], layout=figure["layout"])  # refuses unknown properties and bad values
        assert {trace["meta"] for trace in figure["traces"] if "meta" in trace} in ({0, 1, 2}, set())
    assert "Not shown" not in text and "was not logged" not in text
    for label in ("a (kl_cov)", "b (clip_cov)", "c (ppo_clip)"):
        assert label in text
    assert "prompts_per_minibatch" in text  # the config


def test_the_ledgers_shares_by_hand(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    add_ledger(run)
    covariance, position, quarter, kind, by_quarter, by_kind, token = (
        build(spec, load_runs([run])) for spec in dict(sections([]))["Ledger"]
    )
    assert covariance.traces[0]["x"] == ["0–90%", "90–100%"] and covariance.traces[0]["y"] == [-0.1, 0.3]
    assert position.traces[0]["x"] == ["0", "1–2"] and position.traces[0]["y"] == [1.0, -0.2]
    assert quarter.traces[0]["x"] == ["0–25%", "75–100%"] and quarter.traces[0]["y"] == [0.6, -0.2]
    assert kind.traces[0]["x"] == ["number", "word"] and kind.traces[0]["y"] == [0.1, 0.7]
    assert by_quarter.traces[0]["y"] == [1.5, -0.25]  # over 2 and 4 tokens of the two steps
    assert by_kind.traces[0]["x"] == ["number", "word"] and by_kind.traces[0]["y"] == [0.25, 1.0]
    assert token.traces[0]["x"] == ["so", "\\n"] and token.traces[0]["y"] == [0.6, 0.3]


def add_evaluation(run: Path, name: str, title: str, value: float) -> None:
    """What `megatron-rl eval` leaves of a set."""
    triple = {"value": value, "low": value - 0.1, "high": value + 0.05}
    table = {"sets": {"x": {"title": title, "samples": 4, "estimates": {"avg@4": triple, "pass@4": {"value": 1}}}}}
    (run / "eval" / name).mkdir(parents=True)
    (run / "eval" / name / "table.json").write_text(json.dumps(table))


def test_benchmarks_have_intervals_in_training_and_from_evaluations(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a")
    add_evaluation(path, "a-step_20", "MATH-500", 0.25)
    add_evaluation(path, "other", "AMC", 0.75)
    add_evaluation(path, "step_000010", "AMC", 0.5)  # the run's own, which is a metric too
    (path / "eval" / "broken").mkdir()
    (path / "eval" / "broken" / "table.json").write_text('{"sets": []}')
    runs = load_runs([path])
    course, together = (build(spec, runs) for spec in benchmarks(runs))
    bars = course.traces[0]["error_y"]
    assert course.title == "Accuracy on MATH-500"
    assert bars["array"][0] == pytest.approx(0.4) and bars["arrayminus"][0] == pytest.approx(0.1)
    assert together.table == [
        ["evaluation", "MATH-500", "AMC"],
        ["in training, step 29", "0.529 [0.400, 0.900]", "–"],
        ["a-step_20", "0.250 [0.150, 0.300]", "–"],
        ["other", "–", "0.750 [0.650, 0.800]"],
    ]
    assert [trace["x"] for trace in together.traces] == [["MATH-500"], ["MATH-500"], ["AMC"]]
    assert together.traces[2]["error_y"]["arrayminus"] == [pytest.approx(0.1)]
    assert "eval/broken/table.json is no table of an evaluation" in runs[0].notes[0]


def test_config_differences_are_the_options_that_differ(tmp_path: Path) -> None:
    runs = load_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b", "ppo_clip")])
    header, *rows = config_differences(runs)
    names = [row[0] for row in rows]
    assert header == ["option", "a (kl_cov)", "b (ppo_clip)"]
    assert "loss.select_fraction" in names and "loss.eps_low" in names and "optimizer.lr" not in names
    assert config_differences(runs[:1]) == []


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: apt-get install chromium")
def test_the_page_works_in_a_browser(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", "clip_cov", drop=("cov/std",))]
    for run in runs:
        add_ledger(run)
        add_samples(run)
    dom = settled(build_report(runs), tmp_path)
    assert dom.count('class="main-svg"') >= 30
    samples = dom[dom.index('id="sample-list"') : dom.index("const SAMPLES")]
    assert "logprob -2, entropy 1.5 nats, covariance 0.2, selected" in samples and "1</script>" in samples
    assert re.search(r'class="picked"[^>]*style="background: rgba\(232, 120, 12', samples)


def test_a_live_page_is_rewritten_until_it_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "a", steps=3)
    seen, waits = [], iter([None, None, KeyboardInterrupt()])

    def sleep(_: float) -> None:
        wait = next(waits)
        seen.append((run / "report.html").read_text())
        if wait is not None:
            raise wait
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 2 + len(seen), "reward/mean": 0.125}) + "\n")

    monkeypatch.setattr(page_module.time, "sleep", sleep)
    build_report([run], None, 7)
    page_module.keep_current([run], None, 7)
    assert len(seen) == 3 and len(set(seen)) == 3 and all("const RELOAD_SECONDS = 7" in text for text in seen)
    assert "const RELOAD_SECONDS = " not in (run / "report.html").read_text()


def test_a_live_page_waits_for_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, said, seen = tmp_path / "late", [], []

    def sleep(_: float) -> None:
        page = run / "report.html"
        seen.append(page.read_text() if page.is_file() else "")
        if len(seen) == 1:
            run.mkdir()
        elif len(seen) == 2:
            (run / "metrics.jsonl").write_text("")
        elif len(seen) == 3:
            (run / "metrics.jsonl").write_text('{"step": 0, "reward/mean": 0.5}\n')
        else:
            raise KeyboardInterrupt

    monkeypatch.setattr(page_module.time, "sleep", sleep)
    page_module.keep_current([run], None, 7, said.append)
    assert [text.split(": ")[-1].split(";")[0].split(" in it")[0] for text in said[:3]] == [
        "no such folder",
        "no metrics.jsonl",
        "no complete line yet",
    ]
    assert said[3] == str(run / "report.html") and seen[0] == ""
    assert all("const RELOAD_SECONDS = 7" in text for text in seen[1:])
    assert "no metrics.jsonl in it" in seen[1] and "no complete line yet" in seen[2] and "Mean reward" in seen[3]


def test_markup_in_a_run_is_escaped(tmp_path: Path) -> None:
    run = write_run(tmp_path / "x")
    config = (run / "config.yaml").read_text().replace("name: x", 'name: "<img src=x></script>"')
    (run / "config.yaml").write_text(config)
    page = Page(build_report([run], tmp_path / "sub" / "out.html").read_text())
    assert page.links == [] and page.open == []


def test_missing_metrics_are_noted_not_fatal(tmp_path: Path) -> None:
    full = write_run(tmp_path / "full")
    partial = write_run(
        tmp_path / "partial", drop=("cov/std", "select/count", "entropy/realised_change", "reward/accuracy")
    )
    text = build_report([partial]).read_text()
    assert "Covariance, standard deviation (no run logged cov/std)" in text
    assert "no run has both entropy/predicted_change and entropy/realised_change" in text
    assert "partial (kl_cov), mean reward" in text  # the law falls back on reward/mean, and says so
    text = build_report([full, partial], tmp_path / "both.html").read_text()
    assert "cov/std was not logged by partial (kl_cov)" in text
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "metrics.jsonl").write_text('{"step": 0}\n')
    text = build_report([bare]).read_text()
    assert figures_of(text) == {} and "no config.yaml" in text


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        ("folder", "cannot use {}/folder: Is a directory; mend it, or name another place"),
        ("file/x.html", "cannot use {}/file: File exists; mend it, or name another place"),
        ("/proc/gone/x.html", "cannot write /proc/gone/x.html: [Errno 2] No such file or directory: '/proc/gone'"),
    ],
)
def test_a_page_that_cannot_be_written_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], page: str, reason: str
) -> None:
    run = write_run(tmp_path / "run", steps=3)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as end:
        cli.main(lambda: build_report([run], tmp_path / page))
    assert end.value.code == 1 and not list(tmp_path.glob(".folder*"))
    assert capsys.readouterr().err == f"error: {reason.format(tmp_path)}\n"


def test_broken_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        build_report([tmp_path / "absent"])
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        build_report([tmp_path])
    with pytest.raises(UserError, match="no run folders"):
        build_report([])
    run = write_run(tmp_path / "run", steps=3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "entropy/me')
    (loaded,) = load_runs([run])
    assert len(loaded.steps) == 3 and "incomplete" in loaded.notes[0]
    assert "last line is incomplete" in build_report([run]).read_text()
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no complete line yet"):
        load_runs([run])
    (run / "metrics.jsonl").write_text('{"loss": 1}\n')
    with pytest.raises(UserError, match='line 1: expected an integer "step"'):
        load_runs([run])
    (run / "metrics.jsonl").write_text('{"step": 0, "x": 1}\n{"step": 0, "x": 2, "y": null, "non_finite": ["y"]}\n')
    (loaded,) = load_runs([run])
    assert loaded.series("x") == ([0], [2.0]) and loaded.series("y") == ([], [])
    assert loaded.notes == (
        "metrics.jsonl: 1 steps occur twice; the later line counts",
        "non-finite values left out of: y",
    )


def test_rows_of_other_writers_do_not_end_a_report(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    add_ledger(run)
    add_samples(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "entropy/mean": NaN, "reward/mean": 1e999, "cov/std": "0.1", "cov/mean": [1]}\n')
    with (run / "ledger.jsonl").open("a") as file:
        file.write((run / "ledger.jsonl").read_text().splitlines()[0].replace("[0.1, 9, -4,", "[0.1, 9, null,") + "\n")
    with (run / "samples.jsonl").open("a") as file:
        file.write('{"step": 30, "prompt": "1", "response": "2", "score": NaN, "reward": 1e999}\n{"step": 30, "pro')
    text = build_report([run]).read_text()
    assert "non-finite values left out of: entropy/mean, reward/mean" in text
    assert "ledger.jsonl: 1 steps with non-finite values are left out of its figures" in text
    assert "samples.jsonl: the last line is incomplete" in text
    (loaded,) = load_runs([run])
    assert loaded.series("cov/std")[0] == list(range(30)) and [row["step"] for row in loaded.samples] == [0, 29, 30]
    covariance = build(dict(sections([]))["Ledger"][0], [loaded])
    assert covariance.traces[0]["y"] == pytest.approx([-0.1, 0.3])  # as without the third row

    for name in ("samples.jsonl", "ledger.jsonl"):
        whole = (run / name).read_text()
        (run / name).write_text('{"response": "2"}\n' + whole)
        with pytest.raises(UserError, match=rf'{name}, line 1: expected an integer "step"'):
            load_runs([run])
        (run / name).write_text(whole)
    (run / "ledger.jsonl").write_text('{"step": 0, "columns": ["spent"], "tokens": 3}\n')
    with pytest.raises(UserError, match="ledger.jsonl: expected rows of who spent the entropy"):
        load_runs([run])


def test_long_runs_are_thinned_and_say_so(tmp_path: Path) -> None:
    run = tmp_path / "long"
    run.mkdir()
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(10_001):
            row = {"entropy/mean": 9.0 if step == 7777 else 0.5 + step % 2, "reward/accuracy": 0.1 + step / 20_000}
            row |= {"entropy/predicted_change": step / 1e5, "entropy/realised_change": step / 1e5}
            file.write(json.dumps({"step": step, **row}) + "\n")
    with (run / "samples.jsonl").open("w") as file:
        file.writelines(json.dumps({"step": step, "response": str(i)}) + "\n" for step in range(30) for i in range(10))
    (loaded,) = load_runs([run])
    figures = {spec.title: build(spec, [loaded]) for _, specs in sections([loaded]) for spec in specs}
    faint, smoothed = figures["Policy entropy"].traces
    assert len(faint["x"]) == 2000 == len(faint["y"]) and faint["y"][faint["x"].index(7777)] == 9.0
    assert min(faint["y"]) == 0.5 and len(smoothed["x"]) <= 2000 and faint["x"] == sorted(faint["x"])
    assert figures["Policy entropy"].notes == ("of 10,001 steps each stretch of 10 is drawn by its extremes",)
    points = figures["Predicted against realised entropy change"]
    assert len(points.traces[0]["x"]) == 1667 and points.table[1][3] == "10001"
    assert points.notes == ("one of 6 of 10,001 points is drawn; fits use them all",)
    assert len(build_report([run]).read_text()) < 7_000_000
    steps = [row["step"] for row in loaded.samples]
    assert len(steps) == 12 * 8 and sorted(set(steps)) == [0, 3, 5, 8, 11, 13, 16, 18, 21, 24, 26, 29]
    assert [row["response"] for row in loaded.samples[:8]] == list("01234567")


def test_summary_by_hand(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "clip_cov")
    other = write_run(tmp_path / "elsewhere" / "run", "clip_cov", drop=("entropy/mean",))
    first, second = summarise([run, other])
    assert (first["run"], first["loss"], first["steps"]) == ("run", "clip_cov", 30)
    assert first["entropy_first"] == pytest.approx(0.655) and first["entropy_last"] == pytest.approx(0.455)
    assert (first["eval_first"], first["eval_last"], first["wall_seconds"]) == (0.0, 0.2, 150.0)
    assert first["law_a"] == pytest.approx(A) and first["law_b"] == pytest.approx(B)
    assert second["entropy_first"] is None and second["law_a"] is None
    assert first["label"] != second["label"]


def test_law_recovers_known_parameters() -> None:
    generator = np.random.default_rng(3)
    entropy = np.linspace(0.1, 1.2, 400)
    noise = generator.normal(0, 0.01, 400)
    reward = -0.3 * np.exp(entropy) + 0.9 + noise
    fit = fit_law([*entropy, float("nan")], [*reward, 0.5])
    assert fit.a == pytest.approx(0.3, abs=2e-3) and fit.b == pytest.approx(0.9, abs=4e-3)
    assert fit.residual_std == pytest.approx(0.01, rel=0.1) and len(fit.residuals) == 400
    slope, intercept = np.polyfit(np.exp(entropy), reward, 1)
    assert (-slope, intercept) == pytest.approx((fit.a, fit.b))
    assert fit.r2 == pytest.approx(np.corrcoef(np.exp(entropy), reward)[0, 1] ** 2)
    assert fit.at([0.0]) == pytest.approx([fit.b - fit.a])
    np.testing.assert_allclose(fit.residuals, reward - fit.at(entropy.tolist()), atol=1e-12)


def test_law_degenerate() -> None:
    assert "at least 3" in fit_law([0.1, 0.2], [1, 2]).problem
    assert "at least 3" in fit_law([], []).problem
    constant = fit_law([0.5] * 5, [1, 2, 3, 4, 5])
    assert constant.a is None and "entropy is constant" in constant.problem
    with pytest.raises(ValueError, match="no fitted law"):
        constant.at([0.1])
    flat = fit_law([0.1, 0.2, 0.3], [0.4] * 3)
    assert flat.a == pytest.approx(0) and flat.r2 is None
    line = fit_line([1, 2, 4], [1, 3, 2])  # by hand: Sxx 14/3, Sxy 1, Syy 2
    assert (line.slope, line.intercept) == pytest.approx((3 / 14, 1.5))
    assert line.correlation == pytest.approx(1 / math.sqrt(28 / 3))


def test_predicted_change_slope_and_phases(tmp_path: Path) -> None:
    runs = load_runs([write_run(tmp_path / "run")])
    figures = {spec.title: build(spec, runs) for _, specs in sections(runs) for spec in specs}
    assert figures["Predicted against realised entropy change"].table[1] == ["run (kl_cov)", "2", "1.000", "30"]
    bars = {trace["name"]: trace["x"][0] for trace in figures["Time per phase"].traces}
    assert list(bars)[0] == "rollout" and sum(bars.values()) == pytest.approx(5.0)
    assert bars["other"] == pytest.approx(5.0 - 7 * (0.5 + 0.001 * 14.5))


def test_the_controllers_options_are_drawn_with_the_entropy_and_its_band(tmp_path: Path) -> None:
    runs = load_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b", drop=("control/kl_coef",))])
    runs[0].config["loss"] = {"entropy_band": {"low": 0.3, "high": 0.5}}
    (plot,) = (plot for plot in dict(sections(runs))["Updates"] if plot.title == "What the controller did")
    entropy, low, high, option = build(plot, runs).traces
    assert entropy["y"] == runs[0].series("entropy/mean")[1] and option["y"] == runs[0].series("control/kl_coef")[1]
    assert (low["x"], low["y"], high["y"]) == ([0, 29], [0.3, 0.3], [0.5, 0.5])
    assert option["name"] == "a (kl_cov), kl_coef" and [t["yaxis"] for t in (entropy, low, option)] == ["y", "y", "y2"]
    assert build(plot, runs[1:]).missing


def test_smoothing() -> None:
    assert smooth([1.0, 2.0]) == [1.0, 2.0]
    values = [0.0] * 24 + [24.0] + [0.0] * 23  # 48 points: windows of 5
    assert smooth(values)[21:28] == [0.0, 4.8, 4.8, 4.8, 4.8, 4.8, 0.0]
