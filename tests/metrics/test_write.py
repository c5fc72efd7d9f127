from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import tracemalloc
import types
from pathlib import Path

import pytest
from rich.console import Console

from megatron_rl.config import load_config
from megatron_rl.errors import ConfigError, UserError
from megatron_rl.metrics.jsonl import cut_from_step, read_rows, to_line
from megatron_rl.metrics.write import RunLogger, format_duration
from tests.packing.test_pack import make_config
from tests.worlds import ROOT


def quiet() -> Console:
    return Console(file=io.StringIO())


def test_lines_are_valid_json() -> None:
    line = to_line({"step": 1, "a": float("nan"), "b": 2.5, "c": float("-inf")})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    row = json.loads(line, parse_constant=refuse)
    assert row == {"step": 1, "a": None, "b": 2.5, "c": None, "non_finite": ["a", "c"]}


def test_read_and_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"step": 3, "x"')
    rows, notes = read_rows(path)
    assert [row["step"] for row in rows] == [0, 1, 2] and "incomplete" in notes[0]
    assert cut_from_step(path, 2) == 1
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n'
    assert not list(tmp_path.glob("*.tmp"))
    assert cut_from_step(tmp_path / "absent.jsonl", 0) == 0
    path.write_text('{"step": 0}\nrubbish\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2: expected a JSON object, got 'rubbish'"):
        read_rows(path)
    path.write_text('{"step": 0}\n{"step":\n')
    assert "broken" in read_rows(path)[1][0]


def test_rows_of_other_writers(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "x": NaN, "y": [Infinity]}\n{"step": 2, "é": 1}\n')
    assert read_rows(path)[0][0] == {"step": 0, "x": None, "y": [None], "non_finite": ["x"]}
    assert cut_from_step(path, 2) == 1 and path.read_text() == '{"step": 0, "x": NaN, "y": [Infinity]}\n'
    path.write_text('{"step": 5}\n{"step": 0, "x": -Infinity}\n{"step": 6}\n{"step": 1}\n{"st')  # two runs, say
    assert cut_from_step(path, 5) == 2 and path.read_text() == '{"step": 0, "x": -Infinity}\n{"step": 1}\n'
    for foreign in ('{"x": 1}', '{"step": "1"}', '{"step": 1.5}', '{"step": true}', '{"step": null}'):
        path.write_text('{"step": 0}\n' + foreign + "\n")
        with pytest.raises(UserError, match='line 2: expected an integer "step"'):
            cut_from_step(path, 1)
        assert path.read_text().endswith(foreign + "\n")


def test_a_large_file_is_read_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    with path.open("w") as file:
        file.writelines(to_line({"step": step, "text": "x" * 50_000}) for step in range(200))
    tracemalloc.start()
    try:
        dropped = cut_from_step(path, 150)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert dropped == 50 and len(read_rows(path)[0]) == 150 and peak < 1e6  # of 10 MB


def test_run_and_resume(tmp_path: Path) -> None:
    config, run_dir = make_config(), tmp_path / "run"
    with RunLogger(run_dir, config, console=quiet()) as logger:
        for step in range(3):
            logger.log(step, {"reward/mean": step / 2, "entropy/mean": 0.5})
            # flushed: another process sees the line before the writer is closed
            assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == step + 1
            logger.log_samples(step, [{"text": "é", "score": 1.0}, {"text": "b", "score": float("nan")}])
    console = quiet()
    with RunLogger(run_dir, config, start_step=2, console=console) as logger:
        logger.log(2, {"reward/mean": 9.0})
    rows, _ = read_rows(run_dir / "metrics.jsonl")
    assert [(row["step"], row["reward/mean"]) for row in rows] == [(0, 0.0), (1, 0.5), (2, 9.0)]
    assert [row["step"] for row in read_rows(run_dir / "samples.jsonl")[0]] == [0, 0, 1, 1]
    assert "dropped 1 rows from step 2" in console.file.getvalue()  # type: ignore[attr-defined]
    assert load_config(run_dir / "config.yaml") == config
    assert len(list((run_dir / "tensorboard").glob("events*"))) == 2


def test_late_metrics_join_the_row_of_their_step(tmp_path: Path) -> None:
    with RunLogger(tmp_path, make_config(logging={"tensorboard": False}), console=quiet()) as logger:
        for step in range(3):
            logger.log(step, {"x": float(step)})
        logger.log(1, {"eval/a": 0.5}, late=True)
        logger.log(3, {"x": math.nan})
    rows, notes = read_rows(tmp_path / "metrics.jsonl")
    assert rows == [
        {"step": 0, "x": 0.0},
        {"step": 1, "x": 1.0, "eval/a": 0.5},
        {"step": 2, "x": 2.0},
        {"step": 3, "x": None, "non_finite": ["x"]},
    ]
    assert not notes and sorted(path.name for path in tmp_path.glob("metrics*")) == ["metrics.jsonl"]


def test_the_ledger_names_tokens_and_is_cut_with_the_rest(tmp_path: Path) -> None:
    config, entry = make_config(), {"total": [3.0, 0.123456789], "tokens": [[7, 2.0, float("nan")]], "edges": [None]}
    tokenizer = types.SimpleNamespace(decode=lambda ids: f"<{ids[0]}>")
    with RunLogger(tmp_path, config, console=quiet()) as logger:
        logger.log_ledger(0, entry, tokenizer)
        logger.log_ledger(1, {}, tokenizer)  # a step without tokens
        logger.log_ledger(2, entry, tokenizer)
    with RunLogger(tmp_path, config, start_step=2, console=quiet()):
        pass
    (row,) = read_rows(tmp_path / "ledger.jsonl")[0]
    assert row == {"step": 0, "total": [3, 0.123457], "tokens": [["<7>", 7, 2, None]], "edges": [None]}


def test_a_full_disk_is_named_once_and_hides_nothing(tmp_path: Path) -> None:
    """In a process of its own, whose files take no byte more at one moment."""
    code = f"""
import resource
from pathlib import Path
from megatron_rl.files import refusal
from megatron_rl.metrics.write import RunLogger
from tests.metrics.test_write import make_config, quiet
folder = Path({str(tmp_path)!r})
try:
    with RunLogger(folder, make_config(), console=quiet()) as logger:
        logger.log(0, {{"reward/mean": 1.0}})
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        logger.log_samples(0, [{{"text": "a"}}])
except OSError as error:
    print(error.filename, error.__context__.filename, refusal(error, folder))
"""
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert told.stdout.startswith(
        f"{tmp_path}/samples.jsonl None cannot use {tmp_path}/samples.jsonl: File too large; "
    )
    assert told.stdout.rstrip().endswith("Nothing was saved yet: the same command starts from the beginning")
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")[0]] == [0]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path / "run", make_config(logging={"wandb_project": "absent"}), rank=1)
    logger.log(0, {"x": 1.0})
    logger.log_samples(0, [{}])
    logger.log_ledger(0, {"tokens": []}, None)
    logger.message("hello")
    logger.close()
    assert not (tmp_path / "run").exists()


def test_plain_lines_without_a_terminal(tmp_path: Path) -> None:
    console = quiet()
    with RunLogger(
        tmp_path,
        make_config(train={"prompts_per_step": 6, "prompts_per_minibatch": 3, "num_steps": 8}),
        console=console,
    ) as logger:
        logger.log(0, {"reward/mean": 0.25, "entropy/mean": 0.7, "throughput/tokens_per_second": 12345.6})
    (line,) = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert line.startswith("run  step 1/8  reward 0.250  entropy 0.700  tokens/s 12,346  left 0:0")


def test_terminal_bar(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    with RunLogger(tmp_path, make_config(), console=console) as logger:
        logger.log(0, {"reward/accuracy": 0.25})
        logger.message("a [note]")
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "1/100" in shown and "accuracy 0.250" in shown and "a [note]" in shown


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(logging={"wandb_project": "p", "tensorboard": False})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install wandb"):
        RunLogger(tmp_path / "a", config, console=quiet())
    logged: list[tuple[dict[str, float], int]] = []
    run = types.SimpleNamespace(log=lambda values, step: logged.append((dict(values), step)), finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **options: run))
    with RunLogger(tmp_path / "b", config, console=quiet()) as logger:
        logger.log(4, {"x": 1.0})
        logger.log(4, {"eval/y": 2.0}, late=True)
    assert logged == [({"x": 1.0}, 4), ({"eval/y": 2.0, "eval/step": 4}, None)]
    assert not (tmp_path / "b" / "tensorboard").exists()


def test_durations() -> None:
    assert [format_duration(s) for s in (0, 59.6, 3661)] == ["0:00", "1:00", "1:01:01"]
