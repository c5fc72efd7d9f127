"""What a run says at its start about a method that its config keeps from working."""

from __future__ import annotations

import re
from typing import Any

import pytest

from megatron_rl.config import parse_config
from megatron_rl.config.checks import run_notes
from tests.config.test_config import raw

MICROBATCH = {"type": "clip_cov", "cov_scope": "microbatch"}  # the longest sequence has 96 tokens


def notes(**changes: Any) -> list[str]:
    config = parse_config(raw(**changes))
    return list(config.loss.notes(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__prompts_per_minibatch": 8}, "one mini-batch per step.*Lower train.prompts_per_minibatch"),
        (
            {"loss": MICROBATCH, "train__micro_batch_tokens": 191},
            "micro_batch_tokens=191.*covariance is 0.*minibatch, or raise micro_batch_tokens to 192 or more",
        ),
        (
            {"loss": MICROBATCH, "train__prompts_per_minibatch": 1, "parallel__world_size": 6},
            "with 4 sequences in a mini-batch.*at least 6 sequences",
        ),
        ({"loss__select_fraction": 0.98, "rollout__samples_per_prompt": 4}, "up to 1003 of 1024 tokens.*fraction"),
    ],
)
def test_each_fault_is_told_with_its_remedy(changes: dict[str, Any], message: str) -> None:
    (note,) = notes(**changes)
    assert re.search(message, note)


def test_servers_of_others_must_give_float32_logits() -> None:
    changes = {"model__dtype": "bfloat16", "rollout__engine": "vllm", "rollout__weight_sync": {"mode": "disk"}}
    changes |= {"loss": {"type": "ppo_clip"}, "rollout__server": {"kv_tokens": 1000}}
    assert run_notes(parse_config(raw(**changes))) == []
    changes["rollout__server"] |= {"urls": ["http://127.0.0.1:1"]}
    (note,) = run_notes(parse_config(raw(**changes)))
    assert "head_dtype" in note


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": {"type": "ppo_clip"}, "train__prompts_per_minibatch": 8},
        {"loss": {"type": "clip_cov"}, "train__prompts_per_minibatch": 8},
        {"loss": MICROBATCH, "train__micro_batch_tokens": 192},
        {"loss": MICROBATCH, "train__prompts_per_minibatch": 1},
        {"loss": {"type": "clip_cov"}, "train__micro_batch_tokens": 96},
        {"loss__select_fraction": 0.97},  # of a toy's 1,024 tokens
        {"loss__select_fraction": 0.0199, "rollout__samples_per_prompt": 800},
    ],
)
def test_what_works_is_not_remarked_on(changes: dict[str, Any]) -> None:
    assert notes(**changes) == []
