"""Buckets and the check before the first byte; real servers are in test_servers.py."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_rl.convert.hf import hub_views
from megatron_rl.convert.weights import expected_weights
from megatron_rl.rollout.engine import EngineError
from megatron_rl.rollout.servers import weight_sync
from megatron_rl.rollout.servers.weight_sync import (
    Buffers,
    Colocated,
    Sender,
    check_same_model,
    pack_buckets,
    share,
)

QWEN = {"model_type": "qwen2", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
QWEN |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 37}
MOE = QWEN | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}


def stream(**dtypes: torch.dtype) -> list[tuple[str, Tensor]]:
    return [
        ("a", torch.arange(6.0).view(2, 3)),
        ("b", torch.arange(4.0).to(dtypes.get("b", torch.float32))),
        ("big", torch.arange(40.0).view(4, 10)),
        ("c", torch.arange(2.0)),
    ]


SHAPES = {"a": (2, 3), "b": (4,), "big": (4, 10), "c": (2,)}


def unpacked(weights: list[tuple[str, Tensor]], bucket_bytes: int) -> tuple[list[list[str]], dict[str, Tensor]]:
    buffers = Buffers(SHAPES, bucket_bytes, 4)
    names, tensors = [], {}
    for manifest, flat in pack_buckets(iter(weights), SHAPES, buffers):
        start = 0
        for name, shape, dtype in zip(manifest.names, manifest.shapes, manifest.dtypes, strict=True):
            kind = getattr(torch, dtype)
            size = torch.Size(shape).numel() * kind.itemsize
            tensors[name] = flat[start : start + size].clone().view(kind).view(shape)
            start += size
        assert start == flat.numel()
        names.append(manifest.names)
    return names, tensors


@pytest.mark.parametrize(
    ("bucket_bytes", "expected"),
    [
        (10**6, [["a", "b", "big", "c"]]),
        (40, [["a", "b"], ["big"], ["c"]]),  # a buffer holds the largest tensor at least: 160 bytes
    ],
)
def test_buckets_hold_every_bit_within_the_bound(bucket_bytes: int, expected: list[list[str]]) -> None:
    names, tensors = unpacked(stream(), bucket_bytes)
    assert names == expected
    assert all(torch.equal(tensors[name], tensor) for name, tensor in stream())


def test_a_bucket_has_one_dtype() -> None:
    names, tensors = unpacked(stream(b=torch.bfloat16), 10**6)
    assert names == [["a"], ["b"], ["big", "c"]] and tensors["b"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([("a", torch.zeros(3, 2))], r"a of shape \(3, 2\), expected \(2, 3\), once"),
        ([("x", torch.zeros(1))], r"x of shape \(1,\), expected none of that name"),
        ([*stream(), ("c", torch.zeros(2))], r"c of shape \(2,\), expected \(2,\), once"),
        (stream()[:2], "did not send 2 weights: big, c"),
    ],
)
def test_a_stream_of_another_model_is_refused(weights: list[tuple[str, Tensor]], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        unpacked(weights, 10**6)


@pytest.mark.parametrize("raw", [QWEN, QWEN | {"tie_word_embeddings": True}, MOE], ids=["qwen2", "tied", "moe"])
def test_expected_weights_are_those_of_transformers(raw: dict[str, object]) -> None:
    config = AutoConfig.for_model(**raw)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    views = hub_views(dict(model.named_parameters()))
    assert expected_weights(config) == {name: tuple(tensor.shape) for name, tensor in views.items()}


def test_a_server_of_another_model_is_named_with_the_weight() -> None:
    mine = AutoConfig.for_model(**QWEN)
    check_same_model(mine, AutoConfig.for_model(**QWEN), "http://a")
    with pytest.raises(EngineError, match=r"http://a serves another model .*_proj.weight has shape"):
        check_same_model(mine, AutoConfig.for_model(**(QWEN | {"intermediate_size": 32})), "http://a")
    with pytest.raises(EngineError, match="layers.2.*none here"):
        check_same_model(mine, AutoConfig.for_model(**(QWEN | {"num_hidden_layers": 3})), "http://a")


def test_shared_memory_is_a_handle_that_another_reader_sees_change() -> None:
    flat = torch.zeros(1 << 16, dtype=torch.uint8)
    payload = share({"flat": flat[: 1 << 15]})
    assert len(payload) < 2000
    other = pickle.loads(payload)["flat"]
    flat[5] = 7
    assert other[5] == 7 and other.numel() == 1 << 15


def test_too_little_shared_memory_is_an_error_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    buffers = Buffers({"a": (1 << 20,)}, 1 << 30, 4)
    nothing: Any = None

    def channel() -> Colocated:
        return Colocated(Sender(nothing, {}, buffers, nothing, 0), nothing, lambda: [[0], [1]])

    server: Any = object()
    monkeypatch.setattr(weight_sync.shutil, "disk_usage", lambda path: SimpleNamespace(free=(16 << 20) - 1))
    with pytest.raises(EngineError, match=r"needs 16,777,216 bytes of shared memory, /dev/shm has 16,777,215 free"):
        channel().open([server])
    monkeypatch.setattr(weight_sync.shutil, "disk_usage", lambda path: SimpleNamespace(free=16 << 20))
    channel().open([server])
