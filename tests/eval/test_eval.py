"""Whole evaluations: files in, protocol, engine, grader, statistics, tables and samples out."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config.benchmarks import PAPER_SETS, PUBLISHED, prompts
from megatron_rl.errors import ConfigError, DataError
from megatron_rl.eval.store import EvalError
from tests.browser import CHROMIUM
from tests.eval.case import any_text, byte_tokenizer, resolved, run_knowing, write_config, write_model, write_set

ROOT = Path(__file__).resolve().parent.parent.parent
SETS = [*PAPER_SETS, "gsm8k"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and all sets, of 3 problems each."""
    folder = tmp_path_factory.mktemp("eval")
    write_model(folder / "model")
    for name in SETS:
        write_set(folder / "sets" / f"eval_{name}.jsonl", 3, name)
    return folder


def config_of(home: Path, out: Path, *overrides: str) -> Any:
    names = "[" + ",".join(SETS) + "]"
    path = write_config(out.parent, model={"path": str(home / "model")})
    return resolved(path, f"eval.folder={home / 'sets'}", f"eval.sets={names}", *overrides, out=out)


def gold(answer: str, sample: int) -> str:
    return f"By addition \\boxed{{{answer}}}."


def rows_of(out: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "sets" / name / "samples.jsonl").read_text().splitlines()]


def test_an_oracle_scores_1_and_a_fool_0_by_the_papers_protocol(home: Path, tmp_path: Path) -> None:
    results, engine = run_knowing(config_of(home, tmp_path / "right"), gold)
    assert engine is not None and [result.name for result in results] == SETS
    assert all(e.value == 1 for result in results for e in result.estimates.values())
    fool, _ = run_knowing(config_of(home, tmp_path / "wrong"), lambda answer, i: f"\\boxed{{{answer}0}}")
    assert all(e.value == 0 for result in fool for e in result.estimates.values())

    protocol = {result.title: (result.samples, result.temperature) for result in results}
    sampled, greedy = (32, 0.6), (1, 0.0)
    assert protocol == {
        **dict.fromkeys(["AIME24", "AIME25", "AMC"], sampled),
        **dict.fromkeys(["MATH-500", "OMNI-MATH", "OlympiadBench", "Minerva", "GSM8K"], greedy),
    }
    tokenizer, texts = byte_tokenizer(), {}
    for request in engine.requests:
        texts.setdefault(tokenizer.decode(request.token_ids), set()).add(request.sampling.seed)
    user = "<user>What is 1 + 1?\nPresent the answer in LaTeX format: \\boxed{Your answer}.</user><assistant>"
    systems = {f"<system>{system}</system>" for system in prompts()["systems"].values()}
    assert {text.removesuffix(user) for text in texts if text.endswith(user)} == {*systems, ""}
    assert {len(seeds) for text, seeds in texts.items() if "[ASSESS]" in text} == {1}  # OMNI-MATH's own
    assert "lm_head.weight" not in engine.weights and "model.embed_tokens.weight" in engine.weights

    out = tmp_path / "right"
    table = (out / "table.md").read_text()
    assert table.splitlines()[0] == (
        "| model | AIME24 | AIME25 | AMC | MATH-500 | OMNI-MATH | OlympiadBench | Minerva | Avg. | GSM8K |"
    )
    # three of three: the 95% bound is 0.025^(1/3) = 0.292
    assert results[0].accuracy.low == pytest.approx(0.292, abs=0.04) and results[0].accuracy.high == 1
    assert (
        re.search(r"\| model \| 100\.0 \[\d\d\.\d, 100\.0\] \|", table)
        and "| Qwen2.5-32B KL-Cov, published | 36.8 |" in table
    )
    ours, *published = csv.DictReader((out / "table.csv").read_text().splitlines())
    assert ours["model"] == "model" and float(ours["Avg."]) == 100
    assert [row["Avg."] for row in published] == ["38.6", "38.8", "40.4", "40.6", "45.8", "47.2", "50.3", "52.2"]
    summary = json.loads((out / "table.json").read_text())
    assert summary["sets"]["amc"]["estimates"]["pass@32"]["value"] == 1 and summary["average"]["value"] == 1
    assert len(rows_of(out, "amc")) == 96 and rows_of(out, "amc")[33]["id"] == "amc-1"
    page = (out / "sets" / "amc" / "browse.html").read_text()
    assert "By addition" in page and "http" not in page.replace("http-equiv", "")


def test_published_numbers_are_the_papers() -> None:
    """Of Table 2, what the abstract and section 4.4 repeat: gains over GRPO of 15.0 and 14.6 points on AIME."""
    rows = {(row.model, row.method): row for row in PUBLISHED}
    grpo, kl_cov = rows["Qwen2.5-32B", "GRPO"], rows["Qwen2.5-32B", "KL-Cov"]
    assert [round(a - b, 1) for a, b in zip(kl_cov.scores[:2], grpo.scores[:2], strict=True)] == [15.0, 14.6]
    assert round(kl_cov.average - grpo.average, 1) == 6.4 and all(len(row.scores) == 7 for row in PUBLISHED)


def test_partial_knowledge_counts_as_worked_out_by_hand(home: Path, tmp_path: Path) -> None:
    """Of 4 samples 1 is right, 2 agree on a wrong answer, spelt in two ways, and one gives none. Of the 6 pairs the
    right one wins beside none, and draws beside either wrong one."""
    said = {1: "", 2: "first \\boxed{1}, or rather \\boxed{ \\dfrac{7}{2} }."}

    def answer(text: str, sample: int) -> str:
        return said.get(sample, "\\boxed{\\frac{7}{2}}") if sample else f"\\boxed{{{text}}}"

    config = config_of(home, tmp_path / "out", "eval.sets=[amc]", "eval.options.amc.samples=4")
    ((result,), _) = run_knowing(config, answer)
    values = {name: estimate.value for name, estimate in result.estimates.items()}
    assert values == pytest.approx({"avg@4": 1 / 4, "pass@2": 1 / 2, "pass@4": 1, "maj@2": 1 / 3, "maj@4": 0})
    assert result.unboxed_fraction == 1 / 4
    assert [row["answer"] for row in rows_of(tmp_path / "out", "amc")[:4]] == [
        "0",
        None,
        "\\dfrac{7}{2}",
        "\\frac{7}{2}",
    ]
    assert "Avg. is the mean of the seven sets, and needs all of them." in (tmp_path / "out" / "table.md").read_text()


def test_what_is_there_is_not_sampled_again_and_nothing_is_mixed(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = config_of(home, out, "eval.sets=[math500,amc]", "eval.options.amc.samples=2")
    first, _ = run_knowing(config, gold)
    again, engine = run_knowing(config, gold)
    assert engine is None and [r.accuracy.low for r in again] == [r.accuracy.low for r in first]
    more = config_of(home, out, "eval.sets=[math500,minerva]")
    _, engine = run_knowing(more, gold)
    assert engine is not None and len(engine.requests) == 3  # Minerva's
    with pytest.raises(EvalError, match=r"another seed \(seed: \d+ there, \d+ here\); give another --out"):
        run_knowing(config_of(home, out, "eval.sets=[math500]", "eval.seed=9"), gold)
    with pytest.raises(EvalError, match="another problems"):
        run_knowing(config_of(home, out, "eval.sets=[math500]", "eval.limit=2"), gold)


def test_a_slice_is_called_one_and_draws_as_the_whole(home: Path, tmp_path: Path) -> None:
    _, whole = run_knowing(config_of(home, tmp_path / "a", "eval.sets=[amc]"), gold)
    _, part = run_knowing(config_of(home, tmp_path / "b", "eval.sets=[amc]", "eval.limit=2"), gold)
    assert whole is not None and part is not None and set(part.requests) < set(whole.requests)
    assert "| AMC | first 2 of 3 | 32 | 0.6 |" in (tmp_path / "b" / "table.md").read_text()


def test_a_grader_that_fails_is_mended_without_sampling_again(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.eval import case

    def broken(response: str, answer: str) -> float:
        raise RuntimeError("out of order")

    config = config_of(home, tmp_path / "out", "eval.sets=[math500]")
    with monkeypatch.context() as patch:
        patch.setattr(case, "boxed_exact", broken)
        with pytest.raises(EvalError, match=r"(?s)grading failed on 3 of 3.*math500-0, sample 0.*out of order"):
            run_knowing(config, gold)
    ((result,), engine) = run_knowing(config, gold)
    assert engine is None and result.accuracy.value == 1 and result.failed_fraction == 0
    assert rows_of(tmp_path / "out", "math500")[0]["error"] == ""


def test_faults_of_files_and_options_come_with_their_remedy(home: Path, tmp_path: Path) -> None:
    def fails(kind: type[Exception], match: str, *overrides: str) -> None:
        with pytest.raises(kind, match=match):
            run_knowing(config_of(home, tmp_path / "out", *overrides), gold)

    fails(ConfigError, r"holds none of .*omni_math_rule\.jsonl.* for the set omni_math", f"eval.folder={tmp_path}")
    fails(ConfigError, r"neither eval\.folder nor eval\.options\.aime24\.path", "eval.folder=null")
    fails(ConfigError, r"'aime23' is none of aime24.*give options\.aime23\.path", "eval.sets=[aime23]")
    fails(ConfigError, r"unknown option; did you mean 'temperature'", "eval.options.amc.temprature=1")
    fails(
        ConfigError,
        "eval.options.mine.path=nowhere: no such file",
        "eval.sets=[mine]",
        "eval.options.mine.path=nowhere",
    )
    fails(DataError, r"problem aime24-0 has \d+ tokens, data\.max_prompt_tokens=30", "data.max_prompt_tokens=30")
    double = tmp_path / "double.jsonl"
    double.write_text('{"id": 1, "problem": "a", "answer": 1}\n' * 2)
    fails(DataError, "the id '1' comes twice", "eval.sets=[mine]", f"eval.options.mine.path={double}")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: apt-get install chromium")
def test_the_pages_run_in_a_browser(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_knowing(
        config_of(home, out, "eval.sets=[amc]", "eval.options.amc.samples=2"), lambda g, i: f"</script><b>{i}</b>"
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    for page, text in {"sets/amc/browse.html": "&lt;/script&gt;&lt;b&gt;1&lt;/b&gt;", "index.html": "52.2"}.items():
        command = [str(CHROMIUM), *options, (out / page).as_uri()]
        found = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert text in found.stdout and "CONSOLE" not in found.stderr, found.stderr


# --- the command, with the real embedded engine -----------------------------------------------------------------------


def start(config: Path, *arguments: str, **env: str) -> subprocess.Popen[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    env = {**clean, "PYTHONPATH": str(ROOT), "MEGATRON_RL_DEVICE": "cpu", "OMP_NUM_THREADS": "1", **env}
    command = [sys.executable, "-m", "megatron_rl", "eval", str(config), *arguments]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


@pytest.mark.slow
def test_a_killed_evaluation_resumes_to_the_same_numbers(home: Path, tmp_path: Path) -> None:
    """Batches of 6; the first attempt dies of SIGKILL once some samples are there, in the middle of writing another."""
    write_set(tmp_path / "sets" / "amc.jsonl", 5)
    config = write_config(
        tmp_path,
        model={"path": str(home / "model")},
        reward={"function": "tests.eval.case:slow_any_text", "workers": 2},
        eval={"sets": ["amc"], "folder": str(tmp_path / "sets"), "options": {"amc": {"samples": 8}}},
    )
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    process = start(config, "--out", str(broken), GRADE_SECONDS="0.5")
    deadline, parts = time.monotonic() + 120, []
    while not parts or sum(part.read_text().count("\n") for part in parts) < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        parts = list((broken / "sets" / "amc").glob("part*.jsonl"))
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    some = sum(part.read_text().count("\n") for part in parts)
    with (parts[0].parent / "part0001.jsonl").open("w") as part:  # of another rank
        part.write(parts[0].read_text().splitlines(keepends=True)[0] + '{"id": "p-0", "sam')
    for out in (broken, whole):
        output, _ = (process := start(config, "--out", str(out))).communicate(timeout=200)
        assert process.returncode == 0, output
    assert 3 <= some < 40 and len(rows_of(broken, "amc")) == 40
    assert rows_of(broken, "amc") == rows_of(whole, "amc")
    assert (broken / "table.json").read_text() == (whole / "table.json").read_text()
    scores = [row["score"] for row in rows_of(whole, "amc")]
    assert 0 < sum(scores) < 40 and len({row["response"] for row in rows_of(whole, "amc")}) > 30


def test_held_out_problems_of_a_file_are_evaluated_with_the_embedded_engine(home: Path, tmp_path: Path) -> None:
    write_set(tmp_path / "train.jsonl", 4, "t")
    held_out = write_set(tmp_path / "held_out.jsonl", 3, "h")
    config = write_config(
        tmp_path,
        model={"path": str(home / "model")},
        data={"train_path": str(tmp_path / "train.jsonl"), "eval_path": str(held_out)},
        reward={"function": "tests.eval.case:any_text"},
        train={"eval_samples": 4, "eval_temperature": 1.0},
    )
    output, _ = (process := start(config, "--out", str(tmp_path / "out"))).communicate(timeout=200)
    assert process.returncode == 0, output
    rows = rows_of(tmp_path / "out", "held_out")
    problems = (tmp_path / "out" / "sets" / "held_out" / "problems.jsonl").read_text().splitlines()
    assert len(rows) == 12 and ["What is 2 + 2?" in line for line in problems] == [False, False, True]
    assert [row["score"] for row in rows] == [any_text(row["response"], "") for row in rows]
    result = json.loads((tmp_path / "out" / "table.json").read_text())["sets"]["held_out"]
    assert (result["problems"], result["samples"], result["temperature"]) == (3, 4, 1.0)
    assert result["estimates"]["avg@4"]["value"] == pytest.approx(sum(row["score"] for row in rows) / 12)
    assert "| held-out | 3 | 4 | 1 |" in (tmp_path / "out" / "table.md").read_text()


def test_without_a_model_the_command_asks_for_one(tmp_path: Path) -> None:
    process = start(ROOT / "configs" / "quickstart.yaml", "--out", str(tmp_path))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and "say which model to evaluate with --model" in output
