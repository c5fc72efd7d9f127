"""Configs that work and yet hardly do what was meant are told so."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_rl.config.notes import config_notes
from tests.packing.test_pack import make_config

KL_COV: dict[str, Any] = {"type": "kl_cov"}


@pytest.mark.parametrize(
    ("changes", "loss", "words"),
    [
        ({"prompts": 3}, KL_COV, ["one mini-batch per step", "prompts_per_minibatch"]),
        ({"prompts": 3}, {"type": "clip_cov"}, None),
        ({"prompts": 3}, {"type": "ppo_clip"}, None),
        ({"budget": 59}, KL_COV | {"cov_scope": "microbatch"}, ["identically 0", "cov_scope=minibatch"]),
        ({"budget": 60}, KL_COV | {"cov_scope": "microbatch"}, None),
        ({"budget": 59}, KL_COV, None),
        # 3 prompts of 100 samples of at most 20 tokens, of which 0.2 are 1,200
        ({"samples": 100}, KL_COV | {"select_fraction": 0.2}, ["up to 1,200 tokens", "never a percentage"]),
        ({"samples": 100}, KL_COV | {"select_fraction": 0.002}, None),
        ({"samples": 4}, KL_COV | {"select_fraction": 0.2}, None),
    ],
)
def test_a_covariance_method_that_can_do_nothing_is_told_so(
    changes: dict[str, Any], loss: dict[str, Any], words: list[str] | None
) -> None:
    notes = config_notes(make_config(**changes, loss=loss))
    assert len(notes) == (words is not None)
    assert all(word in notes[0] for word in words or [])
