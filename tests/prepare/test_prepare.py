from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

from megatron_rl.prepare.clean import Index, remove_near, remove_repeated, spelling_key, text_key
from megatron_rl.prepare.pipeline import Options, prepare, read_source
from megatron_rl.prepare.presets import PRESETS
from megatron_rl.prepare.rows import PrepareError, Row

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} with the problem sets is absent")


def rows(*pairs):
    return [Row(str(i), problem, answer, "test") for i, (problem, answer) in enumerate(pairs)]


def ids(kept):
    return [row.id for row in kept]


def test_the_first_copy_stays_and_contradictions_go_altogether():
    given = rows(
        ("What is 1+1?", "2"), ("Half?", "1/2"), ("What is 1+1?", "2"), ("Odd?", "3"), ("Half?", "0.5"), ("Odd?", "5")
    )
    kept, removed = remove_repeated(given, text_key)
    assert ids(kept) == ["0", "1"] and ids(removed.duplicates) == ["2", "4"]  # 1/2 is 0.5
    assert ids(removed.contradictory) == ["3", "5"] and removed.contradictory_problems == 1


def test_spelling_ignores_latex_and_spaces_but_not_operators():
    given = rows(("Find $x + 1$.", "2"), (r"find \(x+1\)", "2"), ("Find $x - 1$.", "2"))
    assert ids(remove_repeated(given, spelling_key)[0]) == ["0", "2"]


def test_near_duplicates_need_the_same_numbers_and_answer():
    text = "Ann walks {} kilometers to the shop and back again every single day of the week{}. How far does she walk?"
    given = rows(
        (text.format(3, ""), "42"),
        (text.format(3, " alone"), "42"),
        (text.format(4, ""), "42"),
        (text.format(3, "!"), "41"),
    )
    kept, removed = remove_near(given, 0.7)
    assert ids(kept) == ["0", "2", "3"] and ids(removed) == ["1"]
    assert ids(remove_near(given, 0.95)[1]) == []


def test_overlap_tells_the_same_from_the_near():
    text = "How many of the first {} positive integers are divisible by neither two nor three nor five"
    index = Index(rows((text.format(90) + "?", "24"), ("Something else", "1")), 0.7)
    found = index.overlap(
        "e", rows((text.format(90).upper(), "24"), (text.format(90) + " at all?", "24"), (text.format(91), "24"))
    )
    assert (found.same, found.near, found.training) == ({0}, {1}, {0})


@needs_data
def test_dapo_math_17k_is_as_known(tmp_path):
    against = [f"{name}={DATA}/eval_{name}.jsonl" for name in ("amc", "math500", "olympiadbench")]
    report = prepare(
        [f"dapo_math_17k={DATA}/train_dapo_math_17k.jsonl"], tmp_path / "train.jsonl", against, Options(near=0)
    )
    assert report["unique_texts"] == 17_255 and report["contradictory_texts"] == 12
    assert [found["same"] for found in report["overlap"]] == [14, 7, 10]
    kept = read_source(str(tmp_path / "train.jsonl"), download=False)
    assert len(kept) == report["contents"]["rows"] == 17_243 - report["passes"][-1]["removed"]
    assert kept[0].prompt.endswith("\n\nPresent the answer in LaTeX format: \\boxed{Your answer}.")
    again = prepare(
        [f"dapo_math_17k={DATA}/train_dapo_math_17k.jsonl"], tmp_path / "again.jsonl", against, Options(near=0)
    )
    assert again["passes"] == report["passes"]
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "train.jsonl").read_bytes()


@needs_data
def test_the_prompts_are_the_papers():
    paper = json.loads((DATA / "paper_prompts.json").read_text())
    names = {"math_dapo": "dapo_math_17k", "math": "math500", "olympiad_bench": "olympiadbench", "minerva": "minerva",
             "aime": "aime24", "amc": "amc", "aime25": "aime25", "omni-math": "omni_math"}  # fmt: skip
    for theirs, ours in names.items():
        assert (PRESETS[ours].suffix, PRESETS[ours].system) == (paper[theirs]["suffix"], paper[theirs]["system"]), ours


def test_rows_of_other_formats_and_what_is_around_the_problem(tmp_path):
    (before, after), problem = PRESETS["dapo_math_17k"].around[0], "What is 6 times 7?"
    record = {"prompt": [{"role": "user", "content": before + problem + after}], "reward_model": {"ground_truth": "42"}}
    solution = "We add. " * 40 + r"So $\boxed{\frac{1}{2}}$."
    cases = [
        ("dapo_math_17k", record, (problem, "42")),
        ("gsm8k", {"question": "How many?", "answer": "6 * 200 = <<6*200=1200>>\n#### 1,200"}, ("How many?", "1200")),
        ("math", {"problem": "Half?", "solution": solution}, ("Half?", r"\frac{1}{2}")),
        ("olympiadbench", {"question": "Two?", "final_answer": ["1", "2"]}, ("Two?", "1,2")),
    ]
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for name, raw, expected in cases:
        parquet.write_table(pyarrow.Table.from_pylist([raw]), tmp_path / f"{name}.parquet")
        (tmp_path / f"{name}.json").write_text(json.dumps([raw]))
        for ending in ("parquet", "json"):
            (row,) = read_source(f"{name}={tmp_path}/{name}.{ending}", download=False)
            assert (row.problem, row.answer) == expected and row.suffix == PRESETS[name].suffix


def test_what_cannot_be_read_is_told(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"problem": "1?", "answer": "1"}\n{"problem": "2?"}\n')
    for source, message in [
        ("gsm8k", "give a file, as gsm8k=problems.jsonl, or --download to fetch openai/gsm8k"),
        ("gsmk=x.jsonl", "no preset 'gsmk'"),
        ("nowhere.jsonl", "no such file"),
        (str(tmp_path / "bad.jsonl"), "row 2: no answer in any of answer"),
    ]:
        with pytest.raises(PrepareError, match=message):
            read_source(source, download=False)


def test_a_download_without_a_network_names_the_way_without_one(monkeypatch):
    def load_dataset(path, name, *, split):
        raise ConnectionError(f"Couldn't reach '{path}' ({name}, {split}) on the Hub")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(PrepareError) as refused:
        read_source("gsm8k", download=True)
    for part in (
        "ConnectionError: Couldn't reach 'openai/gsm8k' (main, train)",
        "give a file, as gsm8k=",
        "HF_HUB_OFFLINE",
    ):
        assert part in str(refused.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PrepareError, match=r"needs datasets .*; or give a file, as gsm8k=problems\.jsonl"):
        read_source("gsm8k", download=True)
    with pytest.raises(PrepareError, match=r"no split of the 2,821 .* omni_math_rule\.jsonl"):
        read_source("omni_math", download=True)
