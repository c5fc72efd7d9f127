"""Files of problems: JSON lines, JSON lists and Parquet, verl's columns, conversations, and what is refused by name."""

from __future__ import annotations

import builtins
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.data.records import read_records
from megatron_rl.data.rows import answer_text, read_rows
from megatron_rl.errors import DataError

USER = {"role": "user", "content": "2?"}


def rows_of(path: Path) -> list[Any]:
    return [row for _, row in read_rows(path)]


def row_of(tmp_path: Path, record: dict[str, Any]) -> Any:
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(record))
    return rows_of(path)[0]


def write_parquet(path: Path, records: list[dict[str, Any]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


VERL = {
    "data_source": "math_dapo",
    "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": "What is 6 times 7?"}],
    "ability": "MATH",
    "reward_model": {"ground_truth": "42", "style": "rule"},
    "extra_info": {"index": 7, "split": "train"},
}


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_verls_columns_are_read_from_every_format(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"train.{ending}"
    if ending == "parquet":
        write_parquet(path, [VERL, VERL | {"extra_info": {"index": 8, "split": "train"}}])
    else:
        second = VERL | {"reward_model": json.dumps(VERL["reward_model"]), "prompt": json.dumps(VERL["prompt"])}
        records = [VERL, second | {"extra_info": {"index": 8}}]
        path.write_text(json.dumps(records) if ending == "json" else "\n".join(map(json.dumps, records)))
    first, second = rows_of(path)
    assert (first.id, second.id) == ("7", "8")
    for row in (first, second):
        assert (row.problem, row.answer, row.source) == ("What is 6 times 7?", "42", "math_dapo")
        assert (row.system, row.turns, row.suffix) == ("Think.", (), None)


def test_null_columns_count_as_absent(tmp_path: Path) -> None:
    """Where rows of several sets share one table, each has nulls in the columns of the others."""
    path = write_parquet(
        tmp_path / "mixed.parquet",
        [
            {"id": None, "problem": "1?", "prompt": None, "answer": "1", "source": None, "suffix": None, "turns": None},
            {"id": "b", "problem": None, "prompt": "2?", "answer": "2", "source": "s", "suffix": "!", "turns": None},
        ],
    )
    assert [(r.id, r.problem, r.source, r.suffix) for r in rows_of(path)] == [
        ("0", "1?", "mixed", None),
        ("b", "2?", "s", "!"),
    ]


def test_parquet_without_pyarrow_names_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and more")
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "pyarrow":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        DataError, match=r"x\.parquet: Parquet needs pyarrow; .* pip install 'datasets>=5.0,<6' 'pyarrow>=21'"
    ):
        list(read_records(tmp_path / "x.parquet"))


def test_a_byte_order_mark_and_other_line_ends_are_read(tmp_path: Path) -> None:
    text = "\r\n".join(json.dumps({"problem": f"{i}?", "answer": i}) for i in range(2))
    for name, content in {"a.jsonl": text, "b.jsonl": text.replace("\r\n", "\r"), "c.json": f"[{text}]"}.items():
        content = content.replace("}\r\n{", "},\r\n{") if name == "c.json" else content
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert [row.problem for row in rows_of(tmp_path / name)] == ["0?", "1?"], name


GOOD = b'{"problem": "1?", "answer": "1"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", GOOD + b'{"problem": "na\xefve?", "answer": "1"}\n', r"line 2: byte 0xef is not UTF-8"),
        ("a.jsonl", "{}".encode("utf-16"), r"line 1: byte 0xff is not UTF-8.*accepted are UTF-8 JSON lines"),
        ("a.json", b'[{"problem": "1?",\n "answer": "\xff"}]', r"a\.json, line 2: byte 0xff"),
        ("a.jsonl", GOOD + b'{"problem": "\\ud800?", "answer": "1"}', r"line 2: `problem` holds a lone surrogate"),
        ("a.jsonl", GOOD + b'{"problem": "2?", "answer": "\\udc00"}', r"line 2: `answer` holds a lone surrogate"),
        ("a.jsonl", GOOD + b'{"problem": "2?", "answer": {"a": "\\udc00"}}', r"line 2: `answer` holds a lone surr"),
        ("a.jsonl", GOOD + b'{"problem": "2?", "answer": 1, "system": "\\ud83d"}', r"line 2: `system` holds a lone"),
        ("a.jsonl", b'{"problem": "2?", "answer": NaN}', r"line 1: `answer` is nan"),
        ("a.jsonl", b'{"problem": "2?", "answer": [1, 1e999]}', r"line 1: `answer` is inf"),
        ("a.jsonl", b'{"problem": "2?", "answer": ' + b"1" * 5000 + b"}", r"line 1: not JSON \(Exceeds the limit"),
        ("a.jsonl", b"[" * 100_000, r"line 1: not JSON \(maximum recursion"),
        ("a.jsonl", b'{"problem": 2, "answer": 1}', r"line 1: `problem` must be a text"),
        ("a.jsonl", b'{"problem": "2?", "answer": 1, "suffix": 3}', r"line 1: `suffix` must be a text, got 3"),
        (
            "a.jsonl",
            b'{"question": "2?", "answer": 1}',
            r"lacks problem \(or verl's prompt\).*data prepare` reads",
        ),
        ("a.json", b'{"problem": "2?",\n "answer": 1}', r"a\.json, line 1: not JSON"),
        ("a.parquet", b"nothing", r"not a Parquet file.*JSON lines with `problem` and `answer`.*verl's columns"),
        ("a.parquet", b"PAR1nothing", r"a\.parquet: not a Parquet file that pyarrow can read"),
        ("a.jsonl", b"\x1f\x8b\x08 compressed", r"line 1: byte 0x8b is not UTF-8"),
        ("a.jsonl", b"\n \n", "holds no problem"),
    ],
)
def test_unreadable_files_name_the_place_and_what_is_accepted(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    if name == "a.parquet":
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        rows_of(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path}/{name}")


def test_folders_and_missing_files_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a folder, not a file; accepted are UTF-8 JSON lines"):
        rows_of(tmp_path)
    with pytest.raises(DataError, match=r"no such file; accepted"):
        rows_of(tmp_path / "gone.parquet")


def test_parquet_of_bytes_is_text_where_it_is_utf8(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "b.parquet", [{"problem": "é?".encode(), "answer": b"1", "other": b"\xff"}])
    assert [(row.problem, row.answer) for row in rows_of(path)] == [("é?", "1")]
    path = write_parquet(path, [{"problem": b"1?", "answer": b"1"}, {"problem": b"p\xff", "answer": b"1"}])
    with pytest.raises(DataError, match=r"row 2: `problem`: byte 0xff is not UTF-8"):
        rows_of(path)


def test_parquet_text_that_is_no_utf8_names_row_and_column(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    bad = pyarrow.array([b"1?", b"2?", b"p\xff"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"answer": ["1", "2", "3"], "problem": bad}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t\.parquet, row 3: `problem`: byte 0xff is not UTF-8"):
        rows_of(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("27.0", "27.0"),
        (27.0, "27"),
        (-0.0, "0"),
        (0.5, "0.5"),
        (1e22, "1e+22"),
        (12345678901234567890, "12345678901234567890"),
        (True, "true"),
        (Decimal("27.00"), "27"),
        (Decimal("0.25"), "0.25"),
        ({"numbers": [1.0, 2.0], "target": b"3"}, '{"numbers": [1, 2], "target": "3"}'),
    ],
)
def test_answers_as_the_verifiers_get_them(value: Any, text: str) -> None:
    assert answer_text(value, "here") == text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), Decimal("NaN"), {"a": [float("nan")]}, object()])
def test_answers_that_answer_nothing_are_refused(value: Any) -> None:
    with pytest.raises(DataError, match=r"here: `answer` is "):
        answer_text(value, "here")


def test_conversations_are_kept_whole(tmp_path: Path) -> None:
    part = [{"type": "text", "text": "1"}, {"type": "text", "text": "+1?"}]
    turns = [{"role": "user", "content": part}, {"role": "assistant", "content": "2", "tool_calls": None}]
    kept = ({"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"})
    for record in (
        {"prompt": [{"role": "system", "content": "Be brief."}, *turns, USER]},
        {"prompt": json.dumps([{"role": "system", "content": "Be brief."}, *turns, USER])},
        {"problem": "2?", "system": "Be brief.", "turns": turns},
        {"problem": "2?", "system": [{"type": "text", "text": "Be brief."}], "turns": json.dumps(turns)},
    ):
        row = row_of(tmp_path, record | {"answer": 4})
        assert (row.system, row.turns, row.problem) == ("Be brief.", kept, "2?")
        assert row_of(tmp_path, row.to_json()) == row  # as `data prepare` writes it
    assert row_of(tmp_path, {"prompt": part, "answer": 2}).problem == "1+1?"
    assert row_of(tmp_path, {"prompt": json.dumps(part), "answer": 2}).problem == "1+1?"
    assert row_of(tmp_path, {"problem": "[1, 2] + [3]?", "answer": 2}).problem == "[1, 2] + [3]?"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": [USER, {"role": "assistant", "content": "It is"}]}, r"last message of `prompt` is the assistant's"),
        ({"prompt": [{"role": "system", "content": "s"}]}, r"last message of `prompt` is the system's"),
        ({"prompt": [USER, {"role": "system", "content": "s"}, USER]}, r"system message that is not its first"),
        ({"prompt": [USER | {"role": "human"}]}, r"`prompt\[0\]` must have a `role` of system, user"),
        ({"prompt": [USER, "2?"]}, r"`prompt\[1\]` must have a `role`"),
        ({"prompt": [USER | {"content": None}]}, r"`prompt\[0\]` must be a text"),
        ({"prompt": [USER | {"tool_calls": [1]}]}, r"`prompt\[0\]` has tool_calls, which would be lost"),
        ({"prompt": [{"type": "image", "url": "x"}]}, r"`prompt\[0\]` is 'image', expected a part of type 'text'"),
        ({"prompt": [USER | {"content": [{"type": "image_url"}]}]}, r"`prompt\[0\]\[0\]` is 'image_url'"),
        ({"problem": "[{'role': 'user', 'content': '2?'}]"}, r"looks like messages written as a text"),
        ({"problem": [USER | {"content": " "}]}, r"`problem` must be a text that is not empty"),
        ({"problem": "2?", "turns": [USER | {"role": "robot"}]}, r"`turns\[0\]` must have a `role`"),
        ({"problem": "2?", "turns": {"a": 1}}, r"`turns` must be a list of messages"),
        ({"problem": "2?", "system": 3}, r"`system` must be a text"),
        ({"prompt": [{"role": "system", "content": "a"}, USER], "system": "b"}, r"both in `prompt` and in `system`"),
        ({"prompt": [USER, USER], "turns": [USER]}, r"earlier turns both in `prompt` and in `turns`"),
        ({"problem": "<image> 2?", "images": [{"bytes": "x"}]}, r"the row comes with `images`"),
    ],
)
def test_what_cannot_be_kept_of_a_conversation_is_refused_by_name(
    tmp_path: Path, record: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=r"one\.jsonl, line 1: .*" + message):
        row_of(tmp_path, record | {"answer": 4})
