"""The weight stream: whatever the layout and the bucket size, every rank gets the source's tensors bit for bit."""

from __future__ import annotations

import pytest
import torch

from tests.invariance_case import LAYOUTS, MODELS, Case, initial_weights, make_config
from tests.worlds import Worlds

BUCKETS = {"tiny": 1, "one_layer": 2**14, "big": 2**30}  # bytes; tiny: each parameter travels alone


def _stream(layout: str) -> list[tuple[str, str, list[str], list[str]]]:
    """(model, bucket, names in the stream's order, names whose bits differ from the source's) of every combination."""
    from megatron_rl.parallel.groups import init_groups
    from megatron_rl.parallel.weights import weight_stream
    from megatron_rl.policy.policy import MegatronPolicy

    groups = init_groups(make_config(Case("ppo_clip"), layout).parallel, seed=1)
    results = []
    for model, raw in MODELS.items():
        source = initial_weights(model)
        policy = MegatronPolicy(raw, make_config(Case("ppo_clip", model=model), layout), groups, total_updates=1)
        policy.load(source.__getitem__)
        for bucket, size in BUCKETS.items():
            stream = weight_stream(
                policy.parameters, policy.hf_config, groups, layer_offset=policy.layer_offset, bucket_bytes=size
            )
            pairs = [(name, tensor.clone()) for name, tensor in stream]
            wrong = [n for n, t in pairs if t.dtype != source[n].dtype or not torch.equal(t, source[n])]
            results.append((model, bucket, [name for name, _ in pairs], wrong))
    return results


@pytest.mark.parametrize("layout", ["tp1", "tp2", "pp2", "dp2", "tp2_pp2"])
def test_the_stream_is_the_source_bit_for_bit_on_every_rank(worlds: Worlds, layout: str) -> None:
    ranks = worlds.run(LAYOUTS[layout]["world_size"], _stream, layout)
    assert len(ranks[0]) == len(MODELS) * len(BUCKETS)
    for model, bucket, names, wrong in ranks[0]:
        assert wrong == [], (model, bucket)
        # transformers' own list; a tied output layer is the embedding under another name
        expected = set(worlds.run(1, initial_weights, model)[0])
        if MODELS[model]["tie_word_embeddings"]:
            expected.remove("lm_head.weight")
        assert len(names) == len(set(names)) and set(names) == expected, (model, bucket)
    assert all(rank == ranks[0] for rank in ranks)


def test_the_source_can_tell_tensors_apart(worlds: Worlds) -> None:
    """An exchange of two tensors or of two rows would not go unseen."""
    for model in MODELS:
        weights = worlds.run(1, initial_weights, model)[0]
        values = torch.cat([t.flatten() for n, t in weights.items() if n != "lm_head.weight"])
        assert len(values.unique()) > 0.98 * len(values)
