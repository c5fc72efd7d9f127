"""`megatron-rl shadow` on a tiny run: the batch is the run's next one, the numbers repeat, the run is not touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_rl.config import parse_config
from megatron_rl.errors import ConfigError, UserError
from megatron_rl.lab.commands import _checkpoint, _read_methods, default_methods, shadow_config
from tests.tiny import rows_of, tiny_raw, train_each
from tests.worlds import Worlds, leave_layout

TRAIN = {"prompts_per_step": 4, "prompts_per_minibatch": 2, "micro_batch_tokens": 96}
LOSS = {"type": "kl_cov", "select_fraction": 0.1, "ref_kl_coef": 0.1}


def _replay(checkpoint: Path, losses: dict[str, Any], one_process: bool) -> dict[str, Any]:
    from megatron_rl.lab.shadow import replay
    from megatron_rl.metrics.jsonl import without_non_finite
    from megatron_rl.parallel.groups import init_groups

    config = shadow_config(checkpoint, one_process=one_process)
    try:
        return without_non_finite(replay(config, init_groups(config.parallel, config.seed), checkpoint, losses, 2))
    finally:
        leave_layout()


def test_the_step_of_a_run_that_evaluates_beside_training_is_replayed_without_servers(tmp_path: Path) -> None:
    from tests.eval.test_beside import beside

    raw = beside(tmp_path, train={"keep_best": True}, data={"eval_path": "x"})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(parse_config(raw).model_dump(mode="json")))
    config = shadow_config(tmp_path, one_process=True)
    assert config.rollout.is_embedded and config.eval.beside and not config.train.eval_every


def test_shadow_replays_the_runs_next_step(worlds: Worlds, tmp_path: Path) -> None:
    short, longer = (
        tiny_raw(tmp_path, loss=LOSS, train={"num_steps": steps, "save_final": True, "keep_checkpoints": 9, **TRAIN})
        for steps in (2, 3)
    )
    worlds.run(2, train_each, [short, longer])
    checkpoint = tmp_path / "tiny" / "checkpoints" / "step_00000002"
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "tiny").rglob("*") if path.is_file()}
    methods = default_methods(shadow_config(checkpoint, one_process=True).loss)
    losses = {name: methods[name] for name in ("grpo", "kl_cov", "forking")}
    ranks = worlds.run(2, _replay, checkpoint, losses, False)
    (alone,) = worlds.run(1, _replay, checkpoint, losses, True)
    assert ranks[0] == ranks[1] and json.loads(json.dumps(ranks[0], allow_nan=False)) == ranks[0]
    assert {path: path.stat().st_mtime_ns for path in files} == files

    trained = rows_of(longer)[2]  # the step that the run made after that checkpoint
    assert ranks[0]["step"] == 2 and ranks[0]["accuracy"] == trained["reward/accuracy"]
    assert ranks[0]["entropy"] == pytest.approx(trained["entropy/mean"], rel=1e-6)
    assert sum(m["tokens"] for m in ranks[0]["minibatches"]) == trained["batch/response_tokens"]

    first, second = ranks[0]["minibatches"]
    assert first["methods"]["grpo"]["restrained"] == 0  # on-policy, nothing is clipped
    assert first["cosine"][0][1] == pytest.approx(1)  # nor is there anything for KL-Cov's penalty to push against
    assert second["cosine"][0][1] < 0.9999
    for a, b in zip(ranks[0]["minibatches"], alone["minibatches"], strict=True):
        for name in losses:
            assert a["methods"][name] == pytest.approx(b["methods"][name], rel=1e-3, abs=1e-5), name


def test_what_cannot_be_replayed_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="save some with train.save_every"):
        _checkpoint(tmp_path, None)
    with pytest.raises(ConfigError, match="cannot read the run's config"):
        shadow_config(tmp_path, one_process=False)
    file = tmp_path / "methods.yaml"
    for text in ("[1", "grpo: 3", ""):
        file.write_text(text)
        with pytest.raises(ConfigError, match="methods"):
            _read_methods(file)
    methods = {"grpo": {"type": "ppo_clip"}}
    file.write_text(yaml.safe_dump(methods))
    assert _read_methods(file) == methods

    from megatron_rl.lab.shadow import _loss

    with pytest.raises(ConfigError, match="method x: ref_kl_coef=0.5 has no reference policy here"):
        _loss("x", {"type": "ppo_clip", "ref_kl_coef": 0.5})
    with pytest.raises(ConfigError, match="method x"):
        _loss("x", {"type": "ppo_clip", "kl_coef": 1.0})
