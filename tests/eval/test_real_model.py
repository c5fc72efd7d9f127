"""SmolLM2-135M-Instruct on a slice of every benchmark, through the command line, the embedded engine and the grader."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config.benchmarks import PAPER_SETS
from megatron_rl.convert.to_megatron import hf_to_megatron
from megatron_rl.data.tokenizer import build_tokenizer
from megatron_rl.eval.benchmarks import load_benchmarks
from tests.convert.smollm import download
from tests.eval.case import resolved, run_knowing, write_config
from tests.eval.test_eval import ROOT, rows_of, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

SETS = [*PAPER_SETS, "gsm8k"]
DATA = Path(os.environ.get("MEGATRON_RL_EVAL_DATA", ROOT.parent / "shared" / "data"))
TOKENS = 48


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not DATA.is_dir():
        pytest.skip(f"no benchmarks in {DATA}; name a folder with eval_*.jsonl in MEGATRON_RL_EVAL_DATA")
    return download(tmp_path_factory.mktemp("smollm2"))


def config_in(folder: Path, model: Path, **options: Any) -> Path:
    few = {name: {"samples": 2} for name in ("aime24", "aime25", "amc")}
    return write_config(
        folder,
        model={"path": str(model)},
        rollout={"max_response_tokens": TOKENS, "batch_size": 8},
        reward={"function": "math", "workers": 2},
        eval={"sets": SETS, "folder": str(DATA), "limit": 2, "options": few} | options,
    )


def run(config: Path, *arguments: str) -> str:
    output, _ = (process := start(config, *arguments, COLUMNS="200")).communicate(timeout=1500)
    assert process.returncode == 0, output
    return output


def test_a_real_model_on_a_slice_of_every_set_in_both_formats(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    output = run(config_in(tmp_path, model), "--out", str(out))
    print(output)
    assert (out / "table.md").read_text() in output and "Qwen2.5-32B KL-Cov, published" in output
    summary = json.loads((out / "table.json").read_text())["sets"]
    assert list(summary) == SETS and all(found["problems"] == 2 for found in summary.values())
    assert summary["omni_math"]["problems_in_file"] > 2000 and summary["math500"]["problems_in_file"] == 500
    for name in SETS:
        rows = rows_of(out, name)
        assert len(rows) == 2 * summary[name]["samples"] and not any(row["error"] for row in rows)
        assert all(0 < row["tokens"] <= TOKENS and row["response"].strip() for row in rows)
    assert len({row["response"] for row in rows_of(out, "aime24")}) == 4  # sampled, so all differ

    hf_to_megatron(model, tmp_path / "megatron")
    again = tmp_path / "again"
    arguments = ("eval.sets=[amc,gsm8k]", "--model", str(tmp_path / "megatron"), "--out", str(again))
    run(config_in(tmp_path, model), *arguments)
    for name in ("amc", "gsm8k"):
        assert rows_of(again, name) == rows_of(out, name)


def test_the_golds_of_every_set_score_1_and_others_0(model: Path, tmp_path: Path) -> None:
    """All problems of all sets, by the chat template and tokenizer of a real model and the grader `math`; a gold that
    is broken (an unbalanced brace, say) may fail against itself, and no set has more than 2% of those."""
    config = config_in(tmp_path, model, limit=None, options={n: {"samples": 1} for n in ("aime24", "aime25", "amc")})
    right, _ = run_knowing(resolved(config, out=tmp_path / "right"), lambda gold, i: f"So it is \\boxed{{{gold}}}.")
    wrong, _ = run_knowing(resolved(config, out=tmp_path / "wrong"), lambda gold, i: "It is \\boxed{-987654321.25}.")
    tokenizer = build_tokenizer(resolved(config, out=tmp_path / "right"))
    sizes = {bench.name: len(bench.problems) for bench in load_benchmarks(resolved(config, out=tmp_path), tokenizer)}
    assert sizes["olympiadbench"] == 675 and sizes["minerva"] == 272
    for oracle, fool in zip(right, wrong, strict=True):
        print(f"{oracle.title}: oracle {oracle.accuracy.value:.4f}, fool {fool.accuracy.value:.4f}")
        failed = [row["id"] for row in rows_of(tmp_path / "right", oracle.name) if row["score"] < 1]
        assert len(failed) <= 0.02 * oracle.problems and fool.accuracy.value == 0, (oracle.name, failed)
