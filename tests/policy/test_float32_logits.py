"""model.logits_dtype: given a bfloat16 model's hidden states, statistics are those of an output layer without
rounding."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.policy.tiny import hf_model, make_batch, make_config, policy_of, save, weights_of, worst
from tests.worlds import Worlds

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2": {"tp": 2},
    "tp2_sp": {"tp": 2, "sp": True},
    "cp2": {"cp": 2},
    "pp2_vpp2": {"pp": 2, "vpp": 2},
}


def _outcome(folder: Path, parallel: dict[str, Any], dtype: str, fused: str) -> tuple[float, dict[str, Tensor]]:
    """The largest error of this rank's log-probabilities, nats, given its hidden states; weights after an update."""
    from megatron_rl.policy.schedule import run_schedule

    model = {"dtype": "bfloat16", "activations": "model", "logits_dtype": dtype, "fused_linear_stats": fused}
    config = make_config(folder, parallel=parallel, model=model, optimizer={"lr": 1e-2, "eps": 0.1})
    assert config.float32_logits == (dtype != "model")
    with policy_of(config) as policy:
        mini_batch = make_batch(config, policy.groups).mini_batches[0]
        stats, before = policy.stats(mini_batch), weights_of(policy)
        output_layer = policy.model.chunks[-1].output_layer if policy.groups.is_last_stage else None
        if not policy.model.hands_over_hidden:  # the same layers, asked for their hidden states
            output_layer.forward = lambda hidden, *_, **__: (hidden, None)
        with torch.no_grad():
            hidden = run_schedule(policy.model, mini_batch, lambda output, _: output, forward_only=True)
        if not policy.model.hands_over_hidden:
            del output_layer.forward
        weight = before.get("lm_head.weight", before["model.embed_tokens.weight"]).double()
        error = 0.0
        for output, got, micro_batch in zip(hidden, stats, mini_batch.micro_batches, strict=False):
            exact = (output.double() @ weight.t() / policy.temperature).log_softmax(-1)
            exact = exact.gather(1, micro_batch.labels[:, None])[:, 0]
            error = max(error, float((got.logprobs - exact).abs().max()))
        policy.update(mini_batch, config.loss)
        return error, weights_of(policy)


def _outcomes(folders: list[Path], parallel: dict[str, Any]) -> list[Any]:
    ways = [("float32", "off"), ("auto", "on"), *([("model", "off")] if not parallel else [])]
    return [[_outcome(folder, parallel, *way) for way in ways] for folder in folders]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("logits")
    models = {tied: hf_model(tie_word_embeddings=tied, num_hidden_layers=4) for tied in (False, True)}
    return [save(model, root / f"tied_{tied}") for tied, model in models.items()]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_but_the_hidden_states_is_rounded(worlds: Worlds, folders: list[Path], layout: str) -> None:
    parallel = LAYOUTS[layout]
    size = math.prod(parallel.get(way, 1) for way in ("tp", "pp", "cp"))
    for rank in worlds.run(size, _outcomes, folders, parallel):
        for whole, fused, *rounded in rank:
            assert max(whole[0], fused[0]) < 5e-6
            assert all(error > 2e-3 for error, _ in rounded)
            for _, weights in (fused, *rounded):
                assert worst(whole[1], weights) < 1e-2  # of weights near 1, whose steps are 2^-7


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),  # four updates a step
        ({"model": {"dtype": "float32"}}, False),
        ({"model": {"dtype": "float32", "logits_dtype": "float32"}}, False),  # they are
        ({"model": {"logits_dtype": "model"}}, False),
        ({"train": {"prompts_per_minibatch": 8}}, False),  # one update: every ratio is 1
        ({"train": {"prompts_per_minibatch": 8}, "loss": {"type": "ppo_clip", "ref_kl_coef": 0.1}}, True),
        ({"train": {"prompts_per_minibatch": 8}, "loss": {"type": "ppo_clip", "rollout_correction": {}}}, True),
        ({"train": {"prompts_per_minibatch": 8}, "algorithm": {"old_logprobs": "rollout"}}, True),
        ({"train": {"prompts_per_minibatch": 8}, "model": {"logits_dtype": "float32"}}, True),
    ],
)
def test_where_auto_is_on(changes: dict[str, Any], expected: bool) -> None:
    changes = {**changes, "model": {"dtype": "bfloat16", **changes.get("model", {})}}
    assert make_config(None, **changes).float32_logits == expected


def test_the_plan_counts_four_bytes_a_logit() -> None:
    from megatron_rl.models.hardware import HARDWARE
    from megatron_rl.plan.memory import memory_of
    from megatron_rl.plan.shapes import layout_of, shape_of

    def parts(fused: str, logits: str) -> dict[str, float]:
        config = make_config(
            None,
            model={"dtype": "bfloat16", "activations": "model", "logits_dtype": logits, "fused_linear_stats": fused},
        )
        shape = shape_of(config.model.hf_config or {})
        return memory_of(config, shape, layout_of(config), HARDWARE["h100"]).phases["training"]

    assert parts("off", "float32")["logits"] == 2 * parts("off", "model")["logits"] == 40 * 37 * 4
    # of chunks too, beside their gradient's bfloat16 copy
    assert parts("on", "float32")["fused logits"] == 2 * parts("on", "model")["fused logits"] == 40 * 37 * 4
    assert parts("on", "float32")["activations"] - parts("on", "model")["activations"] == 40 * 37 * 2
