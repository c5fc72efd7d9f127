"""Routing replay: the policy's experts are the given ones, in every pass and layout, weighted by its own router."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rl.config import parse_config
from megatron_rl.convert.hf import hub_views
from megatron_rl.errors import ConfigError
from megatron_rl.models.expert_routes import place_routes, route_dtype, server_routes
from megatron_rl.types import Rollout
from tests.policy.tiny import HF, hf_model, make_advantages, make_batch, make_config, make_rollouts, policy_of, save
from tests.tiny import HF as TINY_HF
from tests.tiny import tiny_raw
from tests.worlds import Worlds

MOE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "head_dim": 8,
    "num_hidden_layers": 4,
    "mlp_only_layers": [1],  # the layers with experts are 0, 2 and 3
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
}
FULL, MOE_ONLY = {"recompute": "full"}, {"recompute": "selective", "recompute_modules": ["moe"]}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tp1": ({}, {}),
    "tp1_recompute": ({}, FULL),
    "tp1_recompute_moe": ({}, MOE_ONLY),
    "ep2": ({"world_size": 2, "ep": 2}, {}),
    "tp2_sp": ({"tp": 2, "sp": True}, FULL),
    "pp2": ({"pp": 2}, {}),
    "pp2_vpp2": ({"pp": 2, "vpp": 2}, FULL),
    "cp2": ({"cp": 2}, {}),
    "cp2_tp2_sp_ep2": ({"cp": 2, "tp": 2, "sp": True, "ep": 2}, FULL),
}
SLOW = ("pp2", "cp2", "cp2_tp2_sp_ep2")


def _with_routes(rollout: Rollout, seed: int) -> Rollout:
    """Experts drawn at random, and none for the last token."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(rollout.token_ids), 3, MOE["num_experts"])
    routes = torch.rand(shape, generator=generator).argsort(-1)[..., :2].to(torch.uint8)
    routes[-1] = 255
    return rollout.replace(routes=routes)


def _routed() -> list[Rollout]:
    return [_with_routes(rollout, i) for i, rollout in enumerate(make_rollouts())]


def _config(
    folder: Path, parallel: dict[str, Any], model: dict[str, Any], replay: bool = True, engine: str = "transformers"
) -> Any:
    return make_config(
        folder,
        parallel=parallel | {"distributed_optimizer": False},
        rollout={"routing_replay": replay, "engine": engine},
        model=model,
        optimizer={"lr": 0.0, "clip_grad": 0.0},
        train={"share_prompts": "auto" if replay else False},  # the same sequences with and without
    )


def _outcome(config: Any, rollouts: list[Rollout]) -> dict[str, Any]:
    """Log-probabilities by global token id and gradients of the first mini-batch."""
    from megatron_rl.algorithms.terms import sft
    from megatron_rl.packing import Layout, pack
    from megatron_rl.parallel.weights import weight_stream

    with policy_of(config) as policy:
        batch = pack(rollouts, make_advantages(), Layout.of(config, policy.groups), step=0).mini_batches[0]
        assert len(batch.micro_batches) > 1
        stats = policy.stats(batch)
        logprobs = {
            i: value
            for mb, s in zip(batch.micro_batches, stats, strict=True)
            for i, value in zip(mb.token_ids_global[mb.loss_mask].tolist(), s.logprobs[mb.loss_mask], strict=True)
        }
        zeros = [torch.zeros_like(mb.advantages) for mb in batch.micro_batches]
        policy.update(batch.replace_each("old_logprobs", zeros), sft)
        main_grads = [(name, parameter.main_grad) for name, parameter in policy.parameters]
        grads = {name: grad.clone() for name, grad in weight_stream(main_grads, policy.hf_config, policy.groups)}
        policy.keep_reference()
        return {"logprobs": logprobs, "grads": grads, "reference": policy.ref_logprobs([batch])[0]}


def _outcomes(jobs: list[tuple[Any, list[Rollout]]]) -> list[dict[str, Any]]:
    return [_outcome(*job) for job in jobs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(hf_model(**MOE), tmp_path_factory.mktemp("replay") / "moe")


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """transformers, one sequence at a time, its gates overruled; the last token chooses for itself."""
    model = hf_model(**MOE)
    forced: list[Tensor] = []

    def overrule(which: int) -> Any:
        def hook(gate: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            logits, _, own = output
            experts = torch.cat([forced[0][:-1, which].long(), own[-1:]])
            chosen = logits.softmax(-1).gather(1, experts)
            return logits, chosen / chosen.sum(-1, keepdim=True), experts

        return hook

    for which, layer in enumerate((0, 2, 3)):
        model.model.layers[layer].mlp.gate.register_forward_hook(overrule(which))
    logprobs, stride = {}, 24
    for i, rollout in enumerate(_routed()[:8]):
        forced[:] = [rollout.routes]
        logp = model(rollout.token_ids[None]).logits[0, :-1].log_softmax(-1)
        taken = logp.gather(1, rollout.token_ids[1:, None])[:, 0]
        logprobs |= {i * stride + t + 1: taken[t] for t in range(len(taken)) if rollout.sampled[t + 1]}
    (-torch.stack(list(logprobs.values())).mean()).backward()
    grads = hub_views({name: parameter.grad for name, parameter in model.named_parameters()})
    return {"logprobs": {i: x.detach() for i, x in logprobs.items()}, "grads": grads}


@pytest.mark.parametrize("case", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES])
def test_forced_experts_equal_those_of_transformers(
    worlds: Worlds, folder: Path, expected: dict[str, Any], case: str
) -> None:
    """Measured: log-probabilities within 2e-6, gradients within 3e-6 of a tensor's largest entry."""
    parallel, model = CASES[case]
    size = math.prod(parallel.get(way, 1) for way in ("tp", "pp", "cp")) * (2 if case == "ep2" else 1)
    ranks = worlds.run(size, _outcomes, [(_config(folder, parallel, model), _routed())])
    found: dict[int, Tensor] = {}
    for (rank,) in ranks:
        found |= rank["logprobs"]
        for name, grad in expected["grads"].items():
            scale = grad.abs().max().item()
            assert scale > 0 or "experts" in name, f"{name} has no gradient to compare"
            assert (rank["grads"][name] - grad).abs().max().item() <= 1e-5 * scale, name
    assert found.keys() == expected["logprobs"].keys()
    for i, value in expected["logprobs"].items():
        assert abs(float(found[i] - value)) < 1e-5, i


def _replay_itself(folder: Path) -> list[dict[str, Any]]:
    """Without replay; with its own choice replayed; with the choice of other tokens. The engine's is its own."""
    from megatron_rl.rollout.engine import Request, SamplingParams
    from megatron_rl.rollout.transformers import TransformersEngine

    model = hf_model(**MOE)
    engine = TransformersEngine(HF | MOE, dtype=torch.float32, device=torch.device("cpu"), batch_size=16)
    engine.update_weights(hub_views(dict(model.named_parameters())).items(), 0)
    sampling = SamplingParams(1.0, 1.0, 0, 16, (3, 4), seed=1)
    prompts = [tuple(r.token_ids[~r.sampled].tolist()) for r in make_rollouts()[::4]]
    requests = [Request(i, j, prompt, sampling, True) for i, prompt in enumerate(prompts) for j in range(4)]
    rollouts = engine.generate(requests)
    plain = [rollout.replace(routes=None) for rollout in rollouts]
    jobs = [(False, plain), (True, plain), (True, rollouts), (True, [_with_routes(r, 1) for r in rollouts])]
    return [_outcome(_config(folder, {}, {}, replay), given) for replay, given in jobs]


def test_its_own_choice_replayed_changes_no_bit_and_another_does(worlds: Worlds, folder: Path) -> None:
    ((off, none, own, other),) = worlds.run(1, _replay_itself, folder)
    for same in (none, own):
        assert same["logprobs"] == off["logprobs"]
        assert all(torch.equal(same["grads"][name], grad) for name, grad in off["grads"].items())
    differences = [abs(float(other["logprobs"][i] - value)) for i, value in off["logprobs"].items()]
    assert max(differences) > 0.1
    for a, b in zip(other["reference"], off["reference"], strict=True):  # another model: it routes by itself
        assert torch.equal(a, b)


def _trained_on(raw: dict[str, Any]) -> list[bool]:
    """Whether each step's rollouts came with routes."""
    from unittest import mock

    from megatron_rl import train
    from tests.tiny import trained

    seen: list[bool] = []

    def pack(rollouts: list[Rollout], *args: Any, real: Any = train.pack, **options: Any) -> Any:
        seen.append(all(rollout.routes is not None for rollout in rollouts))
        return real(rollouts, *args, **options)

    with mock.patch.object(train, "pack", pack), trained(raw):
        return seen


@pytest.mark.parametrize("replay", [False, True])
def test_a_run_asks_its_engine_for_routes_when_it_replays(worlds: Worlds, tmp_path: Path, replay: bool) -> None:
    hf = TINY_HF | MOE | {"num_hidden_layers": 2}
    raw = tiny_raw(tmp_path, model={"hf_config": hf}, parallel={"tp": 1}, rollout={"routing_replay": replay})
    assert worlds.run(1, _trained_on, raw) == [[replay, replay]]


def test_what_cannot_be_replayed_is_refused_at_load(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"routing_replay=true: qwen2 has no experts.*set it to false"):
        make_config(None, rollout={"routing_replay": True})
    with pytest.raises(ConfigError, match=r"what vLLM reports of its routing was never tried"):
        _config(folder, {}, {}, engine="vllm")
    with pytest.raises(ConfigError, match=r"makes some layers dense, and SGLang gives every layer of qwen3_moe exp"):
        _config(folder, {}, {}, engine="sglang")
    with pytest.raises(ConfigError, match=r"recompute_modules=\[moe\] and parallel.pp=2.*recompute=full"):
        _config(folder, {"pp": 2}, MOE_ONLY)
    assert parse_config(_config(folder, {}, MOE_ONLY).model_dump()).rollout.routing_replay


def test_micro_batches_keep_their_routes_and_mark_the_rest() -> None:
    a, b = (torch.full((length, 3, 2), length, dtype=torch.uint8) for length in (2, 3))
    packed = place_routes([a, b], [0, 4], 9)
    assert packed is not None and packed[:, 1, 0].tolist() == [2, 2, 255, 255, 3, 3, 3, 255, 255]
    assert place_routes([None, None], [0, 4], 9) is None and place_routes([], [], 4) is None
    with pytest.raises(ValueError, match="1 of 2 rollouts"):
        place_routes([a, None], [0, 4], 9)
    batch = make_batch(make_config(None), _LoneGroups())
    assert all(mb.routes is None for mini in batch.mini_batches for mb in mini.micro_batches)


class _LoneGroups:
    """One rank."""

    dp_rank = cp_rank = 0
    dp_ranks = (0,)
    dp_size = cp_size = 1
    pp_size = tp_size = 1


def test_a_servers_answer_is_checked_before_it_is_believed() -> None:
    from megatron_rl.models.architecture import resolve_hf_config

    hf = resolve_hf_config(HF | MOE)
    answer = torch.tensor([[[i, 5 - i]] * 4 for i in (0, 1)], dtype=torch.int32)  # [2 tokens, 4 layers, 2 experts]
    answer[0, 1] = 0  # the dense layer's
    got = server_routes(answer.flatten(), 3, hf)
    assert got.dtype == torch.uint8 and got.shape == (3, 3, 2)
    assert got[:, 2].tolist() == [[0, 5], [1, 4], [255, 255]]
    faults = {
        "start the server with --enable-return-routed-experts": None,
        "are 8 numbers, expected 16: 2 tokens": answer[0].flatten(),
        "are 0 to 6, the model has 0 to 5": (answer + (answer == 5).int()).flatten(),
        "twice for one token": torch.zeros(16, dtype=torch.int32),
    }
    for message, flat in faults.items():
        with pytest.raises(ValueError, match=message):
            server_routes(flat, 3, hf)
    assert route_dtype(255) == torch.uint8 and route_dtype(256) == torch.int16
