"""Every architecture from its Hugging Face folder to Megatron's shards and back, bit for bit.

The quick test deals the tensors out to simulated ranks; the slow ones load real policies, under real process groups.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from megatron_rl.convert.hf import hub_views, random_source
from megatron_rl.convert.to_hf import megatron_to_hf
from megatron_rl.convert.to_megatron import hf_to_megatron
from megatron_rl.convert.weights import open_weights
from megatron_rl.errors import ConfigError
from megatron_rl.models.mapping import (
    Row,
    expected_hf_names,
    experts_per_rank,
    find_row,
    from_shards,
    full_shapes,
    global_name,
    model_rows,
    split_of,
    to_shard,
)
from tests.policy.tiny import same_bits
from tests.worlds import Worlds

_COMMON = {
    "vocab_size": 37,  # padded at TP 2 and 4
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # fewer than the ranks at TP 4
    "max_position_embeddings": 64,
    "head_dim": 6,
    "tie_word_embeddings": False,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "norm_topk_prob": True}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2", "head_dim": 4},
    "qwen2_tied": {"model_type": "qwen2", "head_dim": 4, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3"},
    "qwen3_tied": {"model_type": "qwen3", "tie_word_embeddings": True},
    "llama": {"model_type": "llama", "num_key_value_heads": 4},
    "llama_one_group_tied": {"model_type": "llama", "num_key_value_heads": 1, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "moe": {"model_type": "qwen3_moe", **_MOE},
    "moe_and_dense_tied": {"model_type": "qwen3_moe", **_MOE, "mlp_only_layers": [2], "tie_word_embeddings": True},
}


def _config(model: str) -> PretrainedConfig:
    return AutoConfig.for_model(**(_COMMON | MODELS[model]))


def _weights(model: str) -> dict[str, Tensor]:
    """Under the names on disk; no two elements alike, so that an exchange of any two shows."""
    with torch.device("meta"):
        hf_model = AutoModelForCausalLM.from_config(_config(model))
    shapes = {name: tensor.shape for name, tensor in hub_views(dict(hf_model.named_parameters())).items()}
    values = torch.randperm(sum(shape.numel() for shape in shapes.values()), generator=torch.Generator().manual_seed(1))
    pieces = (values.float() - len(values) / 2).split([shape.numel() for shape in shapes.values()])
    return {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}


def _local_name(row: Row, hf: PretrainedConfig, layers: int, experts: int) -> tuple[str, int, int]:
    """(name on the rank that holds it, its stage, its expert-parallel rank): written by hand, not by the table."""
    parts, stage, ep_rank = row.megatron.split("."), 0, 0
    if "layers" in parts:
        index = parts.index("layers") + 1
        stage, local = divmod(int(parts[index]), layers)
        parts[index] = str(local)
    if "local_experts" in parts:
        index = parts.index("local_experts") + 1
        ep_rank, local = divmod(int(parts[index]), experts)
        parts[index] = str(local)
    return ".".join(parts), stage, ep_rank


@pytest.mark.parametrize("ep", [1, 2, 4])
@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_simulated_ranks_give_back_every_tensor(tp: int, pp: int, ep: int) -> None:
    for model, changes in MODELS.items():
        if ep > 1 and changes["model_type"] != "qwen3_moe":
            continue
        hf, weights = _config(model), _weights(model)
        assert expected_hf_names(hf) == set(weights), model
        padded, layers = -(-hf.vocab_size // (8 * tp)) * 8 * tp, hf.num_hidden_layers // pp
        experts = experts_per_rank(hf, ep)
        ranks: dict[tuple[int, int, int], dict[str, Tensor]] = defaultdict(dict)  # (stage, tp rank, ep rank)
        for row in model_rows(hf):
            local, stage, ep_rank = _local_name(row, hf, layers, experts)
            for tp_rank in range(tp):
                shard = to_shard(row, [weights[n] for n in row.hf], hf, *split_of(row, tp_rank, tp, ep), padded)
                ranks[stage, tp_rank, ep_rank][local] = shard
        back: dict[str, Tensor] = {}
        for (stage, tp_rank, ep_rank), shards in ranks.items():
            for local, shard in shards.items():
                row = find_row(global_name(local, stage * layers), hf.tie_word_embeddings, ep_rank * experts)
                rank, size = split_of(row, tp_rank, tp, ep)
                if rank == 0:
                    of_row = [ranks[stage, tp_rank + i, ep_rank][local] for i in range(size)]
                    assert full_shapes(row, shard.shape, hf, size) == [tuple(weights[n].shape) for n in row.hf]
                    back.update(zip(row.hf, from_shards(row, of_row, hf), strict=True))
        assert back.keys() == weights.keys(), model
        assert [name for name in back if not torch.equal(back[name], weights[name])] == [], model


LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2_sp": {"tp": 2, "sp": True},
    "pp2": {"pp": 2},
    "tp2_sp_ep2": {"tp": 2, "sp": True, "ep": 2},
    "ep2_pp2": {"world_size": 4, "ep": 2, "pp": 2},
    "tp2_sp_pp2": {"tp": 2, "sp": True, "pp": 2},
    "tp4_sp": {"tp": 4, "sp": True},
    "tp4_sp_pp2": {"tp": 4, "sp": True, "pp": 2},
    "tp2_sp_ep4": {"world_size": 4, "tp": 2, "sp": True, "ep": 4},
    "tp4_sp_ep4_pp2": {"tp": 4, "sp": True, "ep": 4, "pp": 2},
}
QUICK = ("tp2_sp", "tp2_sp_ep2")


def _policies_stream(folders: dict[str, Path], parallel: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    from tests.policy.tiny import make_config, policy_of, weights_of

    found = {}
    for model, folder in folders.items():
        with policy_of(make_config(folder, parallel=parallel)) as policy:
            found[model] = weights_of(policy)
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("round_trip")
    for model in MODELS:
        _config(model).save_pretrained(root / model)
        save_file(_weights(model), root / model / "model.safetensors", {"format": "pt"})
    return {model: root / model for model in MODELS}


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in LAYOUTS]
)
def test_a_policy_streams_the_folder_that_it_loaded(worlds: Worlds, folders: dict[str, Path], layout: str) -> None:
    parallel = LAYOUTS[layout]
    chosen = {m: f for m, f in folders.items() if "ep" not in parallel or MODELS[m]["model_type"] == "qwen3_moe"}
    size = parallel.get("world_size") or parallel.get("tp", 1) * parallel.get("pp", 1)
    for rank in worlds.run(size, _policies_stream, chosen, parallel, timeout=280):
        for model, folder in chosen.items():
            weights, got = load_file(folder / "model.safetensors"), rank[model]
            assert got.keys() == weights.keys(), model
            assert [name for name in got if not torch.equal(got[name], weights[name])] == [], model


# (model.path, a checkpoint to load over it or None, the folder to save to or None)
_HandOver = tuple[Path, Path | None, Path | None]


def _hand_over(cases: list[_HandOver], parallel: dict[str, Any]) -> list[list[dict[str, Tensor]]]:
    """What each policy streams after loading model.path, and after Megatron filled its zeros from the checkpoint."""
    from megatron_rl.policy.checkpoint import CheckpointStore
    from tests.policy.tiny import make_config, policy_of, weights_of

    found = []
    for path, checkpoint, target in cases:
        with policy_of(make_config(path, parallel=parallel)) as policy:
            streams = [weights_of(policy)]
            if checkpoint is not None:
                for _, parameter in policy.parameters:
                    parameter.data.zero_()
                CheckpointStore(checkpoint.parent, policy, policy.groups).load(checkpoint)
                streams.append(weights_of(policy))
            if target is not None:
                CheckpointStore(target, policy, policy.groups).save(1, {})
            found.append(streams)
    return found


@pytest.mark.slow
def test_checkpoints_cross_layouts(worlds: Worlds, folders: dict[str, Path], tmp_path: Path) -> None:
    """A conversion to PP2; its checkpoint to TP4xPP2; its checkpoint to TP2; and from each checkpoint back."""

    def run(size: int, parallel: dict[str, Any], cases: dict[str, _HandOver]) -> None:
        for rank in worlds.run(size, _hand_over, list(cases.values()), parallel, timeout=280):
            for (model, (_, checkpoint, _)), streams in zip(cases.items(), rank, strict=True):
                assert len(streams) == 1 + (checkpoint is not None)
                assert all(same_bits(stream, weights[model]) for stream in streams), (model, parallel)

    def saved(layout: str) -> Path:
        return tmp_path / model / layout / "step_00000001"

    weights = {model: load_file(folder / "model.safetensors") for model, folder in folders.items()}
    narrow: dict[str, _HandOver] = {}
    wide: dict[str, _HandOver] = {}
    tp2: dict[str, _HandOver] = {}
    for model, folder in folders.items():
        converted = tmp_path / model / "converted"
        hf_to_megatron(folder, converted)
        narrow[model] = converted, None, saved("narrow").parent
        wide[model] = converted, saved("narrow"), saved("wide").parent
        tp2[model] = saved("wide"), saved("wide"), None
    run(2, {"pp": 2}, narrow)
    run(8, {"tp": 4, "sp": True, "pp": 2}, wide)
    run(2, {"tp": 2, "sp": True}, tp2)
    for model in folders:
        for layout in ("narrow", "wide"):
            megatron_to_hf(saved(layout), tmp_path / model / f"{layout}_hf")
            back = load_file(tmp_path / model / f"{layout}_hf" / "model.safetensors")
            assert same_bits(back, weights[model]), (model, layout)


def test_transformers_reads_and_writes_the_same_names_and_values(folders: dict[str, Path], tmp_path: Path) -> None:
    """Its own conversion of stacked experts, both ways."""
    model = AutoModelForCausalLM.from_pretrained(folders["moe"], dtype=torch.float32)
    model.save_pretrained(tmp_path)
    ours, theirs = load_file(folders["moe"] / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    views = hub_views(model.state_dict())
    assert ours.keys() == theirs.keys() == views.keys()
    assert all(torch.equal(ours[name], theirs[name]) and torch.equal(ours[name], views[name]) for name in ours)
    source = random_source(_config("moe"), seed=1)
    assert {source(name).shape for name in ours} == {tensor.shape for tensor in ours.values()}


def test_a_folder_with_other_tensors_is_refused(tmp_path: Path) -> None:
    weights, hf = _weights("qwen2_tied"), _config("qwen2_tied")
    embedding = weights["model.embed_tokens.weight"]
    hf.save_pretrained(tmp_path)

    def source_with(extra: dict[str, Tensor]) -> Any:
        save_file(weights | extra, tmp_path / "model.safetensors", {"format": "pt"})
        return open_weights(tmp_path, hf).read

    source = source_with({"lm_head.weight": embedding.clone()})  # as Qwen3-0.6B has it
    assert torch.equal(source("model.norm.weight"), weights["model.norm.weight"])
    with pytest.raises(ConfigError, match=r"lm_head.weight and model.embed_tokens.weight differ; .*remove lm_head"):
        source_with({"lm_head.weight": -embedding})
    with pytest.raises(ConfigError, match="1 unknown: score.weight$"):
        source_with({"score.weight": torch.zeros(1)})
