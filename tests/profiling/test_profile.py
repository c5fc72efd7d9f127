"""Real profiles: two processes of the quickstart made small, as a person types it; the page in a real browser."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_rl.config import load_config
from megatron_rl.errors import UserError
from megatron_rl.profiling.commands import load_profile
from megatron_rl.profiling.record import load_ranks, profile_config, trace_collectives
from tests.browser import CHROMIUM, settled
from tests.test_cli import ROOT, megatron_rl
from tests.tiny import tiny_raw

QUICKSTART = ROOT / "configs" / "quickstart.yaml"
SMALL = "warm_start=null train.prompts_per_step=8 train.prompts_per_minibatch=4 data.num_train=64".split()


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a profile of two steps, over which a run's own checkpoints would lie."""
    folder = tmp_path_factory.mktemp("profile")
    (folder / "runs" / "quickstart" / "checkpoints").mkdir(parents=True)
    arguments = ["profile", str(QUICKSTART), *SMALL, "--steps", "2", "--warmup", "2"]
    result = megatron_rl(*arguments, cwd=folder, GLOO_SOCKET_IFNAME="lo")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "forward_backward" in result.stdout and "profile.html" in result.stdout
    return folder / "runs" / "quickstart" / "profile"


def test_phases_sum_to_the_steps_wall_time(quickstart: Path) -> None:
    profile = load_profile(quickstart)
    summary = profile["summary"]
    stepwise = sum(cost["seconds"] for name, cost in summary["phases"].items() if name != "checkpoint")
    assert stepwise == pytest.approx(summary["step_seconds"], rel=0.03)
    expected = (
        "rollout reward sync pack old_logprobs metrics ledger select forward_backward optimizer probe log checkpoint"
    )
    assert set(expected.split()) <= set(summary["phases"])
    assert summary["steps"] == [2, 3] and profile["facts"]["traced_step"] == 0
    assert 0 < summary["communication_fraction"] + summary["waiting_fraction"] < 1
    assert summary["rates"]["mfu_step"] > 0
    assert {"all_reduce", "all_gather"} <= set(summary["collectives"])


def test_ranks_agree_on_their_collectives(quickstart: Path) -> None:
    """Every number of every group names one operation, met by both ranks or, of a group of one, by one."""
    first, second = load_ranks(quickstart)
    for mine, theirs in zip(first.steps, second.steps, strict=True):
        calls = [{(c.group, c.number): c.name for c in record.collectives} for record in (mine, theirs)]
        shared = calls[0].keys() & calls[1].keys()
        assert len(shared) > 50 and all(calls[0][key] == calls[1][key] for key in shared)
        for record in (mine, theirs):
            spans = [record.spans[c.span] for c in record.collectives if c.span >= 0]
            inside = [c for c in record.collectives if c.span >= 0]
            assert all(s.start <= c.start <= c.end <= s.end for s, c in zip(spans, inside, strict=True))
    assert first.clock_offset == second.clock_offset == 0.0  # one machine


def test_one_trace_a_rank(quickstart: Path) -> None:
    for rank in range(2):
        with gzip.open(quickstart / "traces" / f"rank{rank}.json.gz", "rt") as file:
            events = json.load(file)["traceEvents"]
        names = {event["name"] for event in events}
        assert {"rollout", "reward", "old_logprobs", "forward_backward", "optimizer", "gloo:all_reduce"} <= names
    count, seconds = trace_collectives(quickstart / "traces" / "rank0.json.gz")["gloo:all_reduce"]
    assert count > 10 and seconds > 0


def test_the_runs_own_folder_is_left_alone(quickstart: Path) -> None:
    assert sorted(path.name for path in quickstart.parent.iterdir()) == ["checkpoints", "profile"]
    assert list((quickstart.parent / "checkpoints").iterdir()) == []
    assert not (quickstart / "checkpoints").exists()  # of the profile: timed and removed


def test_compare_prints_the_ratios(quickstart: Path, tmp_path: Path) -> None:
    other = shutil.copytree(quickstart, tmp_path / "other")
    profile = load_profile(other)
    profile["summary"]["step_seconds"] *= 2
    profile["facts"]["layout"] = "tp 1, pp 1, dp 2"
    (other / "profile.json").write_text(json.dumps(profile))
    result = megatron_rl("profile", "compare", str(quickstart), str(other), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.search(r"step, s +\S+ +\S+ +2\.00", result.stdout)
    assert "layout: tp 2, pp 1, dp 1 against tp 1, pp 1, dp 2" in result.stdout
    missing = megatron_rl("profile", "compare", str(tmp_path), str(other), cwd=tmp_path)
    assert missing.returncode == 1 and "no profile.json in it" in missing.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: apt-get install chromium")
def test_the_page_opens_in_a_browser_without_errors(quickstart: Path, tmp_path: Path) -> None:
    """Errors, refused resources included, end in the DOM, which the browser prints once the page has settled."""
    dom = settled(quickstart / "profile.html", tmp_path)
    assert dom.count('class="main-svg"') >= 2  # Plotly drew both figures
    assert dom.count('class="point"') > 100
    for label in ("rank 0 parts", "rank 1 collectives"):
        assert label in dom


def test_the_profiles_run_has_a_folder_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_raw(tmp_path, train={"num_steps": 50, "save_every": 7, "eval_every": 5})))
    config = load_config(path)
    derived = profile_config(config, tmp_path / "a {b}", steps=3, warmup=2)
    assert derived.run_dir == tmp_path / "a {b}"
    train: dict[str, Any] = derived.train.model_dump()
    assert (train["num_steps"], train["eval_every"], train["save_every"], train["save_final"]) == (5, 0, 0, True)
    assert profile_config(derived, tmp_path / "a {b}", steps=3, warmup=2) == derived


def test_a_folder_without_ranks_is_no_profile(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no ranks/rank"):
        load_ranks(tmp_path)


def test_inside_a_world_the_folder_must_be_given(tmp_path: Path) -> None:
    result = megatron_rl("profile", str(QUICKSTART), cwd=tmp_path, RANK="0", WORLD_SIZE="2")
    assert result.returncode == 1 and "give it with --out" in result.stderr
