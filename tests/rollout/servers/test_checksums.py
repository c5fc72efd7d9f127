"""Checksums after an update: what servers hold against what they were sent."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_rl.rollout.engine import EngineError
from megatron_rl.rollout.servers.checksums import WeightProof, digested
from megatron_rl.rollout.servers.sglang import SGLang
from megatron_rl.rollout.servers.shims.vllm import megatron_rl_digest
from megatron_rl.rollout.servers.shims.vllm.megatron_rl_digest import digest

NAMES = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkvo"]
QKV, OUT = "model.layers.0.self_attn.qkv_proj.weight", NAMES[3]


def held(qkv: str, out: str) -> dict[str, int | str]:
    return {QKV: qkv, OUT: out, "cache": "whatever"}


def sent(*digests: int) -> dict[str, int]:
    return dict(zip(NAMES, digests, strict=True))


def proof_after_one_update() -> WeightProof:
    proof = WeightProof(SGLang().parameter_of, exact=False)
    proof.check(sent(1, 2, 3, 4), {"a": [held("x", "y"), held("x2", "y2")], "b": [held("x", "y"), held("x2", "y2")]})
    return proof


def both(*workers: dict[str, int | str]) -> dict[str, Any]:
    return {"a": list(workers), "b": list(workers)}


def test_what_was_sent_anew_must_change_and_what_was_not_must_stay() -> None:
    proof = proof_after_one_update()
    proof.check(sent(1, 2, 9, 4), both(held("z", "y"), held("x2", "y2")))  # one worker's part of it did not move
    proof.check(sent(1, 2, 9, 4), {"a": [held("z", "y"), held("x2", "y2")]})  # again, to a server that was restarted
    with pytest.raises(EngineError, match=f"a does not hold .*: {OUT} was sent anew, and is as before"):
        proof.check(sent(1, 2, 9, 5), both(held("z", "y"), held("x2", "y2")))
    with pytest.raises(EngineError, match=f"a does not hold .*: {QKV} was sent as before, and is another"):
        proof.check(sent(1, 2, 9, 4), both(held("z", "y"), held("w", "y2")))


def test_servers_of_one_kind_hold_the_same() -> None:
    proof = proof_after_one_update()
    with pytest.raises(EngineError, match=f"b does not hold .*: {OUT} was sent as before, and is another"):
        proof.check(
            sent(1, 2, 3, 5), {"a": [held("x", "z"), held("x2", "y2")], "b": [held("x", "w"), held("x2", "y2")]}
        )
    proof.check(sent(1, 2, 3, 5), {"a": [held("x", "z"), held("x2", "y2")], "c": [held("other", "tp")]})
    with pytest.raises(EngineError, match=f"a does not hold .*: {OUT} was"):
        proof.check(sent(1, 2, 3, 5), {"a": [{QKV: "x"}, {QKV: "x2"}]})


def test_digests_of_an_engine_equal_those_of_the_trainer() -> None:
    proof = WeightProof(lambda name: name, exact=True)
    proof.check({"w": 5}, {"a": [{"w": 5}, {"w": 5}]})
    for lost in ({"w": 4}, {}):
        with pytest.raises(EngineError, match="a does not hold .*: w was sent"):
            proof.check({"w": 5}, {"a": [{"w": 5}, lost]})


@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        ("model.layers.3.self_attn.k_proj.bias", "model.layers.3.self_attn.qkv_proj.bias"),
        ("model.layers.3.mlp.gate_proj.weight", "model.layers.3.mlp.gate_up_proj.weight"),
        ("model.layers.3.mlp.experts.17.up_proj.weight", "model.layers.3.mlp.experts.w13_weight"),
        ("model.layers.3.mlp.experts.17.down_proj.weight", "model.layers.3.mlp.experts.w2_weight"),
        *((name, name) for name in ("model.layers.3.mlp.gate.weight", "model.layers.3.mlp.down_proj.weight")),
        *((name, name) for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight")),
    ],
)
def test_sglang_merges_projections_and_experts(name: str, parameter: str) -> None:
    assert SGLang().parameter_of(name) == parameter


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [1, 7, 70_001, 200_000])
def test_a_digest_sees_one_bit_and_one_exchange(dtype: torch.dtype, count: int) -> None:
    tensor = torch.randn(count + 1).to(dtype)[1:]  # bytes that begin at no multiple of four
    before = digest(tensor)
    assert digest(tensor.clone()) == before == digest(tensor.view(1, -1))
    integers = tensor.view(torch.int16)
    for place in {0, count // 2, count - 1}:
        integers[place] += 1
        assert digest(tensor) != before
        integers[place] -= 1
    if count > 1:
        tensor[[0, -1]] = tensor[[-1, 0]]
        assert digest(tensor) != before


@pytest.mark.parametrize("count", [1, 70_001, 5_000_000])
def test_a_digest_is_the_same_on_a_cpu_and_on_a_gpu(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """A folder's weights are read on a worker's CPU and sent from the trainer's GPU."""
    tensor = torch.randn(count)
    on_cpu = digest(tensor)
    monkeypatch.setattr(megatron_rl_digest, "_CPU_ROWS", megatron_rl_digest._GPU_ROWS)
    assert digest(tensor) == on_cpu


def test_a_stream_is_passed_on_with_its_digests() -> None:
    digests: dict[str, int] = {}
    tensors = {"a": torch.randn(3), "b": torch.randn(2, 2)}
    assert dict(digested(tensors.items(), digests)) == tensors
    assert digests == {name: digest(tensor) for name, tensor in tensors.items()}
