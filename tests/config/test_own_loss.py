"""A user's own loss, `loss.type: module:Class`: checked like the built-in ones, saved, and refused with what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.algorithms.methods import METHODS
from megatron_rl.algorithms.policy_loss import ClippedLoss
from megatron_rl.config import dump_config, load_config, parse_config
from megatron_rl.lab.commands import default_methods
from tests.config.test_config import raw, refusal, write

OWN = "examples.my_method:UsualLoss"


class Formless(ClippedLoss):
    """Options alone: it forgot to say how the loss is computed."""


def test_it_is_read_checked_and_saved(tmp_path: Path) -> None:
    config = parse_config(raw(loss={"type": OWN, "width": 0.25, "eps_high": 0.28}))
    assert (type(config.loss).__name__, config.loss.type) == ("UsualLoss", OWN)
    assert load_config(write(tmp_path, dump_config(config))) == config
    overridden = load_config(write(tmp_path, dump_config(config)), ["loss.width=0.5", "loss.stats=old"]).loss
    assert (overridden.width, overridden.statistics) == (0.5, "old")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"type": OWN, "widht": 1}, r"loss\.widht: unknown option; did you mean 'width'\?"),
        ({"type": OWN, "kl_coef": 1}, r"loss\.kl_coef: unknown option"),
        ({"type": OWN, "width": -1}, r"loss\.width: .*greater than 0 \(got -1\)"),
        ({"type": OWN, "eps_low": True}, "expected a number, got true"),
        ({"type": "no_such_module:Loss"}, "importing no_such_module failed with ModuleNotFoundError.*PYTHONPATH"),
        ({"type": "examples.my_method:UsualLos"}, "module examples.my_method has no 'UsualLos'; did you mean 'UsualL"),
        (
            {"type": "examples.my_method:mean_entropy"},
            "got <function mean_entropy.*expected a subclass of",
        ),
        ({"type": f"{__name__}:Formless"}, "expected a subclass of .*PolicyLoss with a __call__"),
        ({"type": "kl_covv"}, "expected one of ppo_clip, .*or module:Class such as.*did you mean 'kl_cov'"),
        ({"eps_low": 0.1}, "expected a mapping with type: one of ppo_clip"),
    ],
)
def test_what_is_wrong_with_it_is_said(loss: dict[str, Any], message: str) -> None:
    assert re.search(message, refusal(raw(loss=loss))), refusal(raw(loss=loss))


def test_shadow_compares_every_method_and_a_runs_own() -> None:
    losses = default_methods(parse_config(raw(loss={"type": OWN, "width": 0.25})).loss)
    assert losses["UsualLoss"]["type"] == OWN and losses["UsualLoss"]["width"] == 0.25
    assert {loss["type"] for loss in losses.values()} == {*METHODS, OWN}
    built_in = default_methods(parse_config(raw()).loss)
    assert built_in == {name: loss for name, loss in losses.items() if name != "UsualLoss"}
    for loss in built_in.values():
        parse_config(raw(loss=loss))
