"""The command over real servers answers greedily what the embedded engine answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.eval.case import write_config, write_model, write_set
from tests.eval.test_eval import rows_of, start
from tests.rollout.servers.servers_case import ENGINES, HF, python_of

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]


@pytest.mark.parametrize("engine", ENGINES)
def test_servers_answer_as_the_embedded_engine(engine: str, tmp_path: Path) -> None:
    python = python_of(engine)
    write_model(tmp_path / "model", **HF)
    write_set(tmp_path / "sets" / "gsm8k.jsonl", 6)
    config = write_config(
        tmp_path,
        data={"max_prompt_tokens": 120},
        reward={"function": "tests.eval.case:any_text"},
        eval={"sets": ["gsm8k"], "folder": str(tmp_path / "sets"), "options": {"gsm8k": {"suffix": ""}}},
    )
    for name, overrides in {
        "embedded": [],
        "servers": [f"rollout.engine={engine}", f"rollout.server.python={python}"],
    }.items():
        process = start(config, *overrides, "--out", str(tmp_path / name))
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
    assert rows_of(tmp_path / "servers", "gsm8k") == rows_of(tmp_path / "embedded", "gsm8k")
