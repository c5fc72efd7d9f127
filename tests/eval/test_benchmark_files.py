"""The files of evaluation sets: formats, whose words the prompt has, ids, and faults that name their line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config.benchmarks import prompts
from megatron_rl.errors import DataError
from megatron_rl.eval.benchmarks import load_benchmarks
from tests.eval.case import byte_tokenizer, resolved, write_config, write_model

SUFFIX = prompts()["suffix"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_model(folder / "model")
    return folder


def benchmark_of(home: Path, folder: Path, *overrides: str) -> Any:
    path = write_config(folder, model={"path": str(home / "model")})
    config = resolved(path, f"eval.folder={folder}", "eval.sets=[amc]", *overrides, out=folder / "out")
    (benchmark,) = load_benchmarks(config, byte_tokenizer())
    return benchmark


def asked(benchmark: Any) -> list[str]:
    return [byte_tokenizer().decode(list(problem.prompt.token_ids)) for problem in benchmark.problems]


def test_verls_parquet_is_a_set(home: Path, tmp_path: Path) -> None:
    """As the paper's own files are: the prompt brings the suffix, and sometimes the system message."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    user = {"role": "user", "content": "1+1?" + SUFFIX}
    records = [
        {"prompt": [user], "reward_model": {"ground_truth": "2"}, "extra_info": {"index": 5}},
        {"prompt": [{"role": "system", "content": "Own."}, user], "reward_model": {"ground_truth": "2"}, "id": None},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "eval_amc.parquet")
    benchmark = benchmark_of(home, tmp_path)
    preset, ending = prompts()["systems"]["thought_solution"], f"<user>1+1?{SUFFIX}</user><assistant>"
    assert asked(benchmark) == [f"<system>{system}</system>{ending}" for system in (preset, "Own.")]
    assert [(p.id, p.prompt.answer) for p in benchmark.problems] == [("5", "2"), ("1", "2")]


def test_the_configs_words_come_first_then_the_rows_then_the_presets(home: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "0?"}, {"role": "assistant", "content": "0"}]
    own = {"system": "", "suffix": "!", "turns": turns}
    rows = [{"problem": "1? Say", "answer": 1.0}, {"problem": "2?", "answer": 2} | own]
    (tmp_path / "amc.jsonl").write_bytes(b"\xef\xbb\xbf" + "\n".join(map(json.dumps, rows)).encode())
    benchmark = benchmark_of(home, tmp_path)
    said = "<user>0?</user><assistant>0</assistant>"
    assert asked(benchmark)[1] == f"{said}<user>2?!</user><assistant>"
    assert asked(benchmark)[0].endswith(f"</system><user>1? Say{SUFFIX}</user><assistant>")
    assert [p.prompt.answer for p in benchmark.problems] == ["1", "2"]
    options = ("eval.options.amc.system_prompt=Mine", "eval.options.amc.suffix=Say")
    first, second = asked(benchmark_of(home, tmp_path, *options))
    assert first == "<system>Mine</system><user>1? Say</user><assistant>"  # it ends so already
    assert second == f"<system>Mine</system>{said}<user>2?Say</user><assistant>"
    assert benchmark_of(home, tmp_path, "eval.limit=1").num_in_file == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"problem": "1?", "answer": "\xff"}', r"amc\.jsonl, line 2: byte 0xff is not UTF-8"),
        (b'{"problem": "\\ud800", "answer": 1}', r"amc\.jsonl, line 2: `problem` holds a lone surrogate"),
        (b'{"problem": "1?", "answer": NaN}', r"amc\.jsonl, line 2: `answer` is nan"),
        (b'{"problem": "1?", "answer": 1, "id": 7}', r"amc\.jsonl, line 2: the id '7' comes twice; make ids unique"),
        (b'{"prompt": [{"role": "assistant", "content": "a"}], "answer": 1}', r"line 2: the last message of `prompt`"),
    ],
)
def test_faults_of_a_set_name_its_line(home: Path, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "amc.jsonl").write_bytes(b'{"problem": "0?", "answer": 0, "id": 7}\n' + content)
    with pytest.raises(DataError, match=message):
        benchmark_of(home, tmp_path)
