"""The weight stream: whatever the layout and the bucket size, every rank gets the source's tensors bit for bit."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

from megatron_rl.models.mapping import expected_hf_names
from tests.invariance_case import LAYOUTS, MODELS, Case, initial_weights, make_config
from tests.worlds import Worlds

DENSE = ("qwen2", "qwen3", "llama")
BUCKETS = {"tiny": 1, "one_layer": 2**14, "big": 2**30}  # bytes; tiny: each parameter travels alone


def _stream(layout: str) -> list[tuple[str, str, list[str], list[str]]]:
    """(model, bucket, names in the stream's order, names whose bits differ from the source's) of every combination."""
    from megatron_rl.parallel.groups import init_groups
    from megatron_rl.parallel.weights import weight_stream
    from megatron_rl.policy.policy import MegatronPolicy

    groups = init_groups(make_config(Case("ppo_clip"), layout).parallel, seed=1)
    results = []
    for model in DENSE:
        raw = MODELS[model]
        source = initial_weights(model)
        policy = MegatronPolicy(raw, make_config(Case("ppo_clip", model=model), layout), groups, total_updates=1)
        policy.load(source.__getitem__)
        for bucket, size in BUCKETS.items():
            stream = weight_stream(policy.parameters, policy.hf_config, groups, bucket_bytes=size)
            pairs = [(name, tensor.clone()) for name, tensor in stream]
            wrong = [n for n, t in pairs if t.dtype != source[n].dtype or not torch.equal(t, source[n])]
            results.append((model, bucket, [name for name, _ in pairs], wrong))
    return results


@pytest.mark.parametrize("layout", ["tp1", "tp2", "pp2", "pp2_vpp2", "dp2", "tp2_pp2"])
def test_the_stream_is_the_source_bit_for_bit_on_every_rank(worlds: Worlds, layout: str) -> None:
    ranks = worlds.run(LAYOUTS[layout]["world_size"], _stream, layout)
    assert len(ranks[0]) == len(DENSE) * len(BUCKETS)
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


class _Live(TorchDispatchMode):
    """Most bytes that tensors made inside had at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage.data_ptr())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, storage.data_ptr(), storage.nbytes())
        return made

    def freed(self, address: int, nbytes: int) -> None:
        self.known.discard(address)
        self.now -= nbytes


def _peak_of_stream() -> tuple[int, int]:
    """(most bytes alive in a stream of small buckets, those of the embedding)."""
    from megatron_rl.parallel.groups import init_groups
    from megatron_rl.parallel.weights import weight_stream

    groups = init_groups(make_config(Case("ppo_clip"), "tp2").parallel, seed=1)
    hf = AutoConfig.for_model(**MODELS["qwen2"] | {"vocab_size": 4096})
    shards = {
        "embedding.word_embeddings.weight": torch.zeros(2048, hf.hidden_size),
        "decoder.final_layernorm.weight": torch.zeros(hf.hidden_size),
        "output_layer.weight": torch.zeros(2048, hf.hidden_size),
    }
    hf.tie_word_embeddings = False
    with _Live() as live:
        live.known |= {shard.untyped_storage().data_ptr() for shard in shards.values()}
        for name, tensor in weight_stream(list(shards.items()), hf, groups, bucket_bytes=2**10):
            assert tensor.shape[0] in (4096, hf.hidden_size), name
            del tensor
    return live.peak, 4096 * hf.hidden_size * 4


def test_a_large_embedding_is_there_once(worlds: Worlds) -> None:
    """Gathered, and neither joined nor kept while the next is gathered."""
    for peak, embedding in worlds.run(2, _peak_of_stream):
        assert embedding <= peak < 1.1 * embedding


MOE: dict[str, Any] = {
    **MODELS["qwen3"],
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "mlp_only_layers": [1],
}
MOE_LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2_sp": {"world_size": 2, "tp": 2, "sp": True},
    "ep2": {"world_size": 2, "ep": 2},
    "tp2_sp_ep2_pp2": {"world_size": 4, "tp": 2, "sp": True, "ep": 2, "pp": 2},
}


def _expert_stream(parallel: dict[str, Any]) -> list[tuple[list[str], list[str]]]:
    """(names in the stream's order, names whose bits differ from the source's) for each bucket size."""
    from megatron_rl.config import parse_config
    from megatron_rl.convert.hf import random_source
    from megatron_rl.parallel.groups import init_groups
    from megatron_rl.parallel.weights import weight_stream
    from megatron_rl.policy.policy import MegatronPolicy

    raw = make_config(Case("ppo_clip"), "tp1").model_dump(mode="json")
    config = parse_config(raw | {"model": {"hf_config": MOE}, "parallel": parallel})
    groups = init_groups(config.parallel, seed=1)
    policy = MegatronPolicy(MOE, config, groups, total_updates=1)
    source = random_source(policy.hf_config, seed=9)
    policy.load(lambda name: source(name) + 0.1)  # so that norms, which start as 1, are not what they were
    results = []
    for size in BUCKETS.values():
        stream = weight_stream(policy.parameters, policy.hf_config, groups, bucket_bytes=size)
        pairs = [(name, tensor.clone()) for name, tensor in stream]
        results.append(([name for name, _ in pairs], [n for n, t in pairs if not torch.equal(t, source(n) + 0.1)]))
    return results


@pytest.mark.parametrize("layout", [*list(MOE_LAYOUTS)[:2], pytest.param("tp2_sp_ep2_pp2", marks=pytest.mark.slow)])
def test_every_expert_comes_once_to_every_rank(worlds: Worlds, layout: str) -> None:
    ranks = worlds.run(MOE_LAYOUTS[layout]["world_size"], _expert_stream, MOE_LAYOUTS[layout])
    expected = expected_hf_names(AutoConfig.for_model(**MOE))
    assert (
        sum(".experts." in name for name in expected) == 3 * 4 * 3
    )  # three layers of four experts, three tensors each
    for names, wrong in ranks[0]:
        assert wrong == []
        assert len(names) == len(set(names)) and set(names) == expected
    assert all(rank == ranks[0] for rank in ranks)
