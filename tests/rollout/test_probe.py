"""The probe after a weight update accepts an engine with the policy's weights and refuses one with others, also when a
sequence's tokens are on two ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.policy.tiny import HF, make_config, policy_of
from tests.worlds import Worlds


def _probe(parallel: dict[str, Any]) -> list[str]:
    from megatron_rl.packing import Layout
    from megatron_rl.rollout.engine import EngineError
    from megatron_rl.rollout.probe import probe_engine
    from megatron_rl.rollout.transformers import TransformersEngine
    from megatron_rl.types import Prompt

    answers = []
    with policy_of(make_config(None, parallel=parallel)) as policy:
        engine = TransformersEngine(HF, dtype=torch.float32, device=torch.device("cpu"), batch_size=8)
        stream_of, asked = engine.stream, list[Any]()
        engine.stream = lambda requests: (asked.extend(requests), stream_of(requests))[1]  # type: ignore[method-assign]
        layout = Layout.of(policy.config, policy.groups)
        prompts = [Prompt(i, tuple(range(1, 3 + i)), "", "") for i in range(3)]
        for scale in (1.0, 1.5):
            stream = [(name, tensor * scale) for name, tensor in policy.hf_weights()]
            engine.update_weights(iter(stream), 0)
            try:
                probe_engine(engine, policy, layout, prompts)
                answers.append("accepted")
            except EngineError as error:
                answers.append(str(error))
    assert asked and all(request.at_once for request in asked)  # before what runs ahead of the training
    return answers


@pytest.mark.parametrize("parallel", [{"world_size": 2}, {"cp": 2}], ids=["dp2", "cp2"])
def test_only_the_weights_of_the_policy_are_accepted(worlds: Worlds, parallel: dict[str, Any]) -> None:
    for same, other in worlds.run(2, _probe, parallel):
        assert same == "accepted"
        assert "does not serve the weights that it was sent" in other and "16 probe tokens" in other
