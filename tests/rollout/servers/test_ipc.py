"""Handles to GPU memory: each worker of a node's servers opens the memory of the trainer rank on its own device."""

from __future__ import annotations

import ast
import base64
import importlib.util
import io
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing import reductions

from megatron_rl.config import parse_config
from megatron_rl.rollout.servers.fleet import Fleet
from megatron_rl.rollout.servers.protocol import Manifest
from megatron_rl.rollout.servers.sglang import SGLang
from megatron_rl.rollout.servers.vllm import VLLM
from megatron_rl.rollout.servers.weight_sync import share
from tests.rollout.servers.servers_case import lone_place, python_of
from tests.tiny import tiny_raw
from tests.worlds import ROOT

GPUS = 8
MANIFEST = Manifest(["a", "b"], [[2, 3], [4]], ["float32", "float32"])


class Node:
    """A machine of eight GPUs, as one of its processes sees it: `visible` are the devices that it counts from 0."""

    visible = range(GPUS)

    def properties(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(uuid=f"gpu-{self.visible[index]}")

    def reduced(self, number: int) -> Callable[[Tensor], tuple[Any, ...]]:
        """What torch's pickler makes of a tensor on GPU `number` of the trainer, which sees all eight."""

        def reduce(tensor: Tensor) -> tuple[Any, ...]:
            where = (torch.UntypedStorage, tensor.dtype, number, b"handle", tensor.numel(), 0)
            end = (False, b"counter", 0, b"event", True)
            return reductions.rebuild_cuda_tensor, (Tensor, tensor.size(), tensor.stride(), 0, *where, *end)

        return reduce


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Node:
    node = Node()
    monkeypatch.setattr(torch.cuda, "get_device_properties", node.properties)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(node.visible))
    return node


def payload_of(dialect: Any, node: Node, gpu: int, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The bytes that the trainer's rank on that GPU sends."""
    from multiprocessing.reduction import ForkingPickler

    monkeypatch.setitem(ForkingPickler._extra_reducers, Tensor, node.reduced(gpu))
    node.visible = range(GPUS)
    return share(dialect.shared_object(MANIFEST, torch.zeros(40, dtype=torch.uint8)))


def opened(
    dialect: Any, node: Node, tp: int, read: Callable[[bytes], None], monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """Let every worker of the node's servers read what it is sent; return the devices that torch is told to open."""
    devices = []
    raw = tiny_raw(Path("unused"), rollout={"engine": dialect.name, "server": {"tp": tp, "count": GPUS // tp}})
    place: Any = lone_place()
    fleet = Fleet(dialect, parse_config(raw), Path(), place, lambda url: None, lambda url: "", lambda url: None)
    facts = [("node", local_rank, [], "", 0) for local_rank in range(GPUS)]
    for server, workers in enumerate(fleet._readers_of("node", GPUS // tp, facts)):
        for worker, rank in enumerate(workers):
            assert rank == server * tp + worker
            payload = payload_of(dialect, node, rank, monkeypatch)
            node.visible = range(server * tp, (server + 1) * tp)  # the server's CUDA_VISIBLE_DEVICES
            with monkeypatch.context() as patch:
                devices += devices_of(lambda: read(payload), patch)  # noqa: B023
    return devices


def devices_of(read: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return what torch is told to open, without opening it."""
    numbers: list[Any] = []
    where = reductions.rebuild_cuda_tensor.__code__.co_varnames.index("storage_device")
    assert where == 6, "the place of the device in a handle, which the trainer and SGLang both count on"

    def rebuild(*arguments: Any) -> Tensor:
        numbers.append(arguments[where])
        return torch.zeros(40, dtype=torch.uint8)

    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", rebuild)
    read()
    return numbers


@pytest.mark.parametrize("dialect", [SGLang(), VLLM()], ids=["sglang", "vllm"])
def test_a_handle_names_its_device_by_uuid(dialect: Any, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    for gpu in range(GPUS):
        payload = payload_of(dialect, node, gpu, monkeypatch)
        with monkeypatch.context() as patch:
            assert devices_of(lambda: pickle.loads(payload), patch) == [f"gpu-{gpu}"]  # noqa: B023


# --- SGLang's own reading ---------------------------------------------------------------------------------------------


def sglang_reader() -> Callable[[bytes], None]:
    """SGLang's unpickler and its functions for handles, read from the installed files: to import them takes SGLang."""
    package = next(python_of("sglang").parent.parent.glob("lib/python*/site-packages")) / "sglang/srt/utils"
    names: dict[str, Any] = {"pickle": pickle, "torch": torch, "reductions": reductions}
    exec("from typing import Callable, Union", names)
    wanted = ("SafeUnpickler", "_modify_tuple", "_device_from_maybe_uuid", "_REDUCE_TENSOR_ARG_DEVICE_INDEX")
    wanted += ("_rebuild_cuda_tensor_modified",)
    for file in ("common.py", "patch_torch.py"):
        for part in ast.parse((package / file).read_text()).body:
            name = getattr(part, "name", None) or ast.unparse(getattr(part, "targets", [ast.Name("")])[0])
            if name in wanted:
                exec(ast.unparse(part), names)

    def read(payload: bytes) -> None:
        original = reductions.rebuild_cuda_tensor
        reductions._rebuild_cuda_tensor_original = original  # type: ignore[attr-defined]
        reductions.rebuild_cuda_tensor = names["_rebuild_cuda_tensor_modified"]
        try:
            bucket = names["SafeUnpickler"](io.BytesIO(payload)).load()
        finally:
            reductions.rebuild_cuda_tensor = original
        assert [entry.name for entry in bucket["metadata"]] == MANIFEST.names
        assert [(entry.start_idx, entry.end_idx) for entry in bucket["metadata"]] == [(0, 24), (24, 40)]

    return read


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_each_sglang_worker_opens_its_own_device(tp: int, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    assert opened(SGLang(), node, tp, sglang_reader(), monkeypatch) == list(range(tp)) * (GPUS // tp)


# --- the extension of vLLM --------------------------------------------------------------------------------------------


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The file that vLLM's workers import, beside a vLLM that is not there."""
    stubs: dict[str, dict[str, Any]] = {
        "vllm.distributed.weight_transfer.base": {
            name: type(name, (), {})
            for name in ("WeightTransferEngine", "WeightTransferInitInfo", "WeightTransferUpdateInfo")
        },
        "vllm.distributed.weight_transfer.factory": {
            "WeightTransferEngineFactory": SimpleNamespace(_registry={"megatron_rl": None})
        },
        "vllm.model_executor.model_loader.reload": {
            "finalize_layerwise_reload": None,
            "initialize_layerwise_reload": None,
        },
    }
    for path, contents in stubs.items():
        for name in (path.rsplit(".", count)[0] for count in range(path.count(".") + 1)):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules[path]).update(contents)
    path = ROOT / "megatron_rl/rollout/servers/shims/vllm/megatron_rl_vllm.py"
    monkeypatch.syspath_prepend(path.parent)
    spec = importlib.util.spec_from_file_location("megatron_rl_vllm", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "megatron_rl_vllm", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_each_vllm_worker_opens_its_own_device(
    tp: int, node: Node, extension: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[list[str]] = []
    receiver = extension.MegatronRlTransfer()
    receiver.model = SimpleNamespace(load_weights=lambda pairs: loaded.append([name for name, _ in pairs]))

    def read(payload: bytes) -> None:
        text = base64.b64encode(payload).decode()
        receiver.receive_weights(extension.BucketInfo(MANIFEST.names, MANIFEST.shapes, MANIFEST.dtypes, text))

    assert opened(VLLM(), node, tp, read, monkeypatch) == list(range(tp)) * (GPUS // tp)
    assert loaded == [MANIFEST.names] * GPUS
