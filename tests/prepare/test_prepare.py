from __future__ import annotations

import json
import random
import sys
import time
import types
from pathlib import Path

import pytest

from megatron_rl.data.rows import Row, read_rows
from megatron_rl.errors import DataError, UserError
from megatron_rl.prepare.clean import comparing_answers, remove_near, remove_repeated, spelling_key, text_key
from megatron_rl.prepare.pipeline import Options, prepare, read_source
from megatron_rl.prepare.presets import PRESETS

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
    with comparing_answers() as agree:
        kept, removed = remove_repeated(given, text_key, agree)
    assert ids(kept) == ["0", "1"] and ids(removed.duplicates) == ["2", "4"]  # 1/2 is 0.5
    assert ids(removed.contradictory) == ["3", "5"] and removed.contradictory_problems == 1


def test_spelling_ignores_latex_and_spaces_but_not_operators():
    given = rows(("Find $x + 1$.", "2"), (r"find \(x+1\)", "2"), ("Find $x - 1$.", "2"))
    with comparing_answers() as agree:
        assert ids(remove_repeated(given, spelling_key, agree)[0]) == ["0", "2"]


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


def test_near_duplicates_are_those_of_a_comparison_of_all_pairs():
    draw = random.Random(4)
    texts = [" ".join(draw.choices("abcd", k=draw.randint(1, 12))) for _ in range(150)]
    given = rows(*((text, str(draw.randint(1, 2))) for text in texts))

    def triples(row):
        words = row.problem.split()
        return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}

    for threshold in (0.3, 0.5, 0.7, 0.8, 1.0):
        kept = []
        for row in given:
            of_same_answer = [triples(other) for other in kept if other.answer == row.answer]
            if not any(len(triples(row) & o) / len(triples(row) | o) >= threshold for o in of_same_answer):
                kept.append(row)
        assert ids(remove_near(given, threshold)[0]) == ids(kept), threshold


@needs_data
def test_dapo_math_17k_is_as_known(tmp_path):
    """Cleaned against all sets, no problem of theirs stands in it any more, by letters and digits."""
    names = {"aime24": "aime24", "aime25": "aime25", "amc": "amc", "math500": "math500", "minerva": "minerva",
             "olympiadbench": "olympiadbench", "omni_math": "omni_math_rule"}  # fmt: skip
    against = [f"{preset}={DATA}/eval_{name}.jsonl" for preset, name in names.items()]
    source = f"dapo_math_17k={DATA}/train_dapo_math_17k.jsonl"
    report = prepare([source], tmp_path / "train.jsonl", against, Options())
    assert report["unique_texts"] == 17_255 and report["contradictory_texts"] == 12
    assert [step["left"] for step in report["passes"][:4]] == [17_917, 17_917, 17_255, 17_243]
    found = {overlap["name"].removeprefix("eval_"): overlap for overlap in report["overlap"]}
    assert [found[name]["same"] for name in ("amc", "math500", "olympiadbench")] == [14, 7, 10]
    kept = read_source(str(tmp_path / "train.jsonl"), download=False)
    assert len(kept) == report["contents"]["rows"] and 15_000 < len(kept) < 15_771 - 313
    assert kept[0].prompt.endswith("\n\nPresent the answer in LaTeX format: \\boxed{Your answer}.")

    def letters(text):
        return "".join(filter(str.isalnum, text.lower()))

    everything = "\n".join(letters(row.problem) for row in kept)
    evaluation = [row for path in against for row in read_source(path, download=False)]
    assert len(evaluation) == 4411 and not [row.id for row in evaluation if letters(row.problem) in everything]


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


def source_of(tmp_path, *records):
    path = tmp_path / "source.jsonl"
    path.write_text("".join(json.dumps({"problem": f"{i}?", **record}) + "\n" for i, record in enumerate(records)))
    return str(path)


LONG = "We add and add. " * 30


@pytest.mark.parametrize(
    ("record", "answer"),
    [
        ({"solution": r"short \boxed{5}"}, "5"),
        (
            {"solution": LONG + r"So \boxed{(-\infty, \{5\})} or $\fbox{6}$, rather $\boxed{\text{east}}$." + LONG},
            r"\text{east}",
        ),
        ({"solution": r"\boxed{1} and then \boxed{2"}, "1"),
        ({"solution": r"in twice escaped text \\boxed{\\frac{1}{2}}, after a line break\\"}, r"\\frac{1}{2}"),
        ({"solution": r"\boxed{} \boxed 7 is bare"}, "7"),
        ({"solution": "# Step\n#### Step 2\nadd\n#### 1,200"}, "1200"),
        ({"solution": "no box"}, ""),
        ({"solution": "#### Step 1\nno box"}, ""),
        ({"answer": r"the text \boxed{8}"}, "8"),
        ({"answer": "5 apples"}, "5 apples"),
        ({"answer": "#### 1,2 and 3"}, "1,2 and 3"),
        ({"answer": "So.\n#### 1,234,567.50"}, "1234567.50"),
        ({"answer": None, "solution": r"\boxed{9}"}, "9"),
        ({"answer": 27.0}, "27"),
        ({"answer": [1.0, "b "]}, "1,b"),
        ({"reward_model": {"ground_truth": [42]}}, "42"),
    ],
)
def test_golds_of_texts_and_worked_solutions(tmp_path, record, answer):
    (row,) = read_source(source_of(tmp_path, record), download=False)
    assert row.answer == answer


def test_solutions_without_a_box_are_counted_and_left_out_but_compared_with(tmp_path):
    source = source_of(tmp_path, {"solution": "no box"}, {"answer": "5"}, {"solution": r"\boxed{6}"})
    report = prepare([source], tmp_path / "out.jsonl", [], Options())
    assert report["unanswered"] == 1 and report["passes"][1] == {
        "pass": "solution without a boxed answer", "removed": 1, "left": 2}  # fmt: skip
    assert [row.answer for _, row in read_rows(tmp_path / "out.jsonl")] == ["5", "6"]
    (tmp_path / "eval.jsonl").write_text('{"problem": "1?", "solution": "no box"}')
    against = prepare([source], tmp_path / "out.jsonl", [str(tmp_path / "eval.jsonl")], Options())
    assert against["overlap"][0]["same"] == 1 and against["contents"]["rows"] == 1
    (tmp_path / "none.jsonl").write_text('{"problem": "1?", "solution": "no box"}')
    with pytest.raises(DataError, match=r"nothing is left of .*solution without a boxed answer: 1\)"):
        prepare([str(tmp_path / "none.jsonl")], tmp_path / "x.jsonl", [], Options())


def test_a_problem_with_contradictory_answers_goes_in_all_its_spellings(tmp_path):
    path = tmp_path / "s.jsonl"
    pairs = [("What is y?", 1), ("What is y?", 2), ("what is y", 1), ("Else?", 3)]
    path.write_text("".join(json.dumps({"problem": p, "answer": a}) + "\n" for p, a in pairs))
    report = prepare([str(path)], tmp_path / "out.jsonl", [], Options())
    assert [row.problem for _, row in read_rows(tmp_path / "out.jsonl")] == ["Else?"]
    assert report["contradictions"] == [{"problem": "What is y?", "answers": ["1", "2"]}]


def never_done(found, gold):
    time.sleep(60)


def test_answers_that_never_compare_do_not_agree(monkeypatch):
    monkeypatch.setattr("megatron_rl.prepare.clean._SECONDS", 0.3)
    monkeypatch.setattr("megatron_rl.prepare.clean._VERIFIER", "tests.prepare.test_prepare:never_done")
    with comparing_answers() as agree:
        assert agree(["7", "7"]) and agree(["7", "+7"]) and not agree(["7", "8"])
        assert not agree([r"\frac{1}{2}", "0.5"])


def test_repeated_ids_are_numbered_as_evaluation_wants_them(tmp_path):
    source = source_of(tmp_path, *({"answer": "1", "id": name} for name in ("a", "a", "a-2", "a", 3, 3.0, None)))
    report = prepare([source], tmp_path / "out.jsonl", [], Options(near=0))
    assert [row.id for _, row in read_rows(tmp_path / "out.jsonl")] == [
        "a",
        "a-3",
        "a-2",
        "a-4",
        "3",
        "3-2",
        "source-6",
    ]
    assert report["renamed_ids"] == 3


def test_a_conversation_is_prepared_whole(tmp_path):
    system, user = {"role": "system", "content": "Think."}, {"role": "user", "content": "2?"}
    turns = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "1"}]
    records = [{"prompt": [system, *turns, user]}, {"prompt": [user]}, {"prompt": [system, user]}]
    path = tmp_path / "s.json"
    path.write_text(json.dumps([record | {"reward_model": {"ground_truth": "4"}} for record in records]))
    report = prepare([str(path)], tmp_path / "out.jsonl", [], Options())
    first, second = [row for _, row in read_rows(tmp_path / "out.jsonl")]  # the third asks what the second does
    assert (first.system, list(first.turns), first.problem) == ("Think.", turns, "2?")
    assert (second.system, second.turns) == (None, ()) and report["passes"][2]["removed"] == 1
    (row,) = read_source(f"amc={path}", download=False)[2:]
    assert row.system == "Think." and PRESETS["amc"].system not in (None, "Think.")


@pytest.mark.parametrize("out", ["folder", "file/out.jsonl", "x" * 300, "/proc/nothing/out.jsonl"])
def test_outputs_that_cannot_be_written_are_named(tmp_path, out):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out .*name the file|cannot use .*another place|--out /proc.*another file"):
        prepare([source_of(tmp_path, {"answer": "1"})], tmp_path / out, [], Options())
    assert not [path for path in tmp_path.rglob(".*")]


def hostile_texts(size):
    unclosed = r"\boxed{"
    return {
        "braces": "{" * size,
        "boxes": unclosed * (size // len(unclosed)),
        "boxes before a long end": unclosed * 64 + "x " * (size // 2),
        "bare boxes": r"\boxed " * (size // 7),
        "spaces": r"\boxed" + " " * size,
        "hashes": "#### " * (size // 5) + "\n.",
        "backslashes": "\\" * size,
        "digits": "7" * size,
        "letters": "a" * size,
        "one word": "ab " * (size // 3),
    }


@pytest.mark.parametrize("name", hostile_texts(10))
def test_hostile_texts_take_linear_time(tmp_path, name):
    """As problem, as solution and as answer, beside the same in the evaluation set with another end. The bound is some
    30 times what it takes; quadratic steps would take minutes to hours."""
    text = hostile_texts(300_000)[name]
    source = source_of(tmp_path, {"problem": text + "x?", "answer": "5"}, {"solution": text}, {"answer": text + "6"})
    (tmp_path / "eval.jsonl").write_text(json.dumps({"problem": text + "y?", "answer": text}))
    began = time.process_time()
    report = prepare([source], tmp_path / "out.jsonl", [str(tmp_path / "eval.jsonl")], Options())
    assert time.process_time() - began < 20 and report["passes"][0]["left"] == 3


def test_what_cannot_be_read_is_told(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"problem": "1?", "answer": "1"}\n{"problem": "2?"}\n')
    for source, message in [
        ("gsm8k", "give a file, as gsm8k=problems.jsonl, or --download to fetch openai/gsm8k"),
        ("gsmk=x.jsonl", "no preset 'gsmk'"),
        ("nowhere.jsonl", "no such file"),
        (str(tmp_path / "bad.jsonl"), "line 2: no answer in any of answer"),
    ]:
        with pytest.raises(DataError, match=message):
            read_source(source, download=False)


def test_a_download_without_a_network_names_the_way_without_one(monkeypatch):
    def load_dataset(path, name, *, split):
        raise ConnectionError(f"Couldn't reach '{path}' ({name}, {split}) on the Hub")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError) as refused:
        read_source("gsm8k", download=True)
    for part in (
        "ConnectionError: Couldn't reach 'openai/gsm8k' (main, train)",
        "give a file, as gsm8k=",
        "HF_HUB_OFFLINE",
    ):
        assert part in str(refused.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs datasets .*; or give a file, as gsm8k=problems\.jsonl"):
        read_source("gsm8k", download=True)
    with pytest.raises(DataError, match=r"no split of the 2,821 .* omni_math_rule\.jsonl"):
        read_source("omni_math", download=True)
