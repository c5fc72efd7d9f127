"""Benchmarks in a training run: logged every `eval_every` steps, kept on disk, the same on every rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config import parse_config
from megatron_rl.errors import ConfigError
from tests.eval.case import write_config, write_model, write_set
from tests.tiny import trained
from tests.worlds import Worlds


def raw_of(folder: Path, **sections: Any) -> dict[str, Any]:
    import yaml

    write_set(folder / "train.jsonl", 8)
    path = write_config(
        folder,
        parallel={"tp": 1, "world_size": 2},
        data={"train_path": str(folder / "train.jsonl"), "max_prompt_tokens": 60},
        rollout={"samples_per_prompt": 2},
        reward={"function": "tests.eval.case:any_text"},
        train={
            "num_steps": 2,
            "prompts_per_step": 2,
            "prompts_per_minibatch": 2,
            "micro_batch_tokens": 256,
            "eval_every": 1,
            "save_final": False,
            "keep_best": True,
        },
        eval={
            "sets": ["mine", "gsm8k"],
            "folder": str(folder / "sets"),
            "options": {
                "mine": {"path": str(folder / "sets" / "mine.jsonl"), "samples": 4, "temperature": 1.0},
                "gsm8k": {"suffix": ""},
            },
        },
    )
    raw = yaml.safe_load(path.read_text())
    for section, changes in sections.items():
        raw[section] |= changes
    return raw


def train_it(raw: dict[str, Any]) -> list[dict[str, Any]]:
    with trained(raw) as run:
        return [json.loads(line) for line in (run.config.run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_evaluates_its_benchmarks(tmp_path: Path, worlds: Worlds) -> None:
    write_model(tmp_path / "model")
    for name in ("mine", "gsm8k"):
        write_set(tmp_path / "sets" / f"{name}.jsonl", 3)
    raw = raw_of(tmp_path)
    rows = worlds.run(2, train_it, raw)[0]
    run_dir = parse_config(raw).run_dir
    for step, row in enumerate(rows, start=1):
        folder = run_dir / "eval" / f"step_{step:06d}"
        samples = [json.loads(line) for line in (folder / "sets" / "mine" / "samples.jsonl").read_text().splitlines()]
        assert len(samples) == 12 and row["eval/mine/accuracy"] == pytest.approx(sum(s["score"] for s in samples) / 12)
        assert row["eval/mine/accuracy_low"] <= row["eval/mine/accuracy"] <= row["eval/mine/accuracy_high"]
        assert row["eval/mine/pass_at_4"] >= row["eval/mine/accuracy"] and "eval/mine/maj_at_4" in row
        assert row["eval/average"] == pytest.approx((row["eval/mine/accuracy"] + row["eval/gsm8k/accuracy"]) / 2)
        assert "eval/accuracy" not in row  # no held-out problems
        assert json.loads((folder / "table.json").read_text())["sets"]["gsm8k"]["problems"] == 3
    assert list((run_dir / "checkpoints").glob("step_*"))  # keep_best goes by the average


def test_what_cannot_be_evaluated_is_refused_before_any_process(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"(?s)mine\.jsonl: no such file.*holds none of gsm8k\.jsonl"):
        parse_config(raw_of(tmp_path))
    with pytest.raises(ConfigError, match=r"neither data\.eval_path nor eval\.sets"):
        parse_config(raw_of(tmp_path, eval={"sets": []}))
    with pytest.raises(ConfigError, match=r"data\.type=countdown brings one for its own characters"):
        parse_config(raw_of(tmp_path, data={}) | {"data": {"type": "countdown"}})
