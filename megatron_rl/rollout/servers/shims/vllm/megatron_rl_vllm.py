"""Runs inside vLLM's workers: receives weights from the trainer, as vLLM's weight-transfer backend `megatron_rl`.

Importing it registers the backend; `--worker-extension-cls megatron_rl_vllm.Extension` imports it in every worker. It
may use what a vLLM environment has, and nothing of the trainer's package.
"""

import base64
import io
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from megatron_rl_digest import digest
from safetensors import safe_open
from torch.distributed import PrefixStore, ProcessGroup, broadcast, destroy_process_group
from torch.distributed.distributed_c10d import Backend, _new_process_group_helper, _world, rendezvous
from torch.multiprocessing import reductions
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

_SECONDS = 300  # for the group to stand, and for one broadcast
_received: dict[str, int] = {}  # digests of the weights of the last update, as the model's loader got them


@dataclass
class JoinInfo(WeightTransferInitInfo):
    """The group to join; the trainer is rank 0."""

    host: str = ""
    port: int = 0
    rank_offset: int = 1
    world_size: int = 0
    name: str = ""
    backend: str = ""


@dataclass
class BucketInfo(WeightTransferUpdateInfo):
    """One flat bucket: shared memory (`payload`), or a broadcast in the group."""

    names: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    payload: str | None = None


class MegatronRlTransfer(WeightTransferEngine):
    """Buckets into the model, layer by layer, so that packed and fused parameters are rebuilt."""

    init_info_cls, update_info_cls = JoinInfo, BucketInfo
    group: ProcessGroup | None = None

    def init_transfer_engine(self, info: JoinInfo) -> None:
        """Join; the steps are those of the trainer's side, because both must derive the same store keys."""
        self.shutdown()
        parallel, timeout = self.parallel_config, timedelta(seconds=_SECONDS)
        rank = info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        store, rank, size = next(rendezvous(f"tcp://{info.host}:{info.port}", rank, info.world_size, timeout=timeout))
        store.set_timeout(timeout)
        self.group, _ = _new_process_group_helper(
            size, rank, [], Backend(info.backend), PrefixStore(info.name, store), group_name=info.name, timeout=timeout
        )
        _world.pg_group_ranks[self.group] = {i: i for i in range(size)}

    def start_weight_update(self) -> None:
        """Keep the parameters' loading layout at hand."""
        _received.clear()
        initialize_layerwise_reload(self.model)

    def receive_weights(self, info: BucketInfo) -> None:
        """Load one bucket."""
        sizes = [
            torch.Size(shape).numel() * getattr(torch, dtype).itemsize
            for shape, dtype in zip(info.shapes, info.dtypes, strict=True)
        ]
        if info.payload is not None:
            flat = _SharedUnpickler(io.BytesIO(base64.b64decode(info.payload))).load()
        else:
            device = next(self.model.parameters()).device
            flat = torch.empty(sum(sizes), dtype=torch.uint8, device=device if device.type != "meta" else None)
            broadcast(flat, src=0, group=self.group)
        self.model.load_weights(_tensors(info, flat, sizes))

    def finish_weight_update(self) -> None:
        """Build what the parameters become in use."""
        finalize_layerwise_reload(self.model, self.model_config)
        retie(self.model)

    def shutdown(self) -> None:
        """Leave the group."""
        if self.group is not None:
            destroy_process_group(self.group)
            self.group = None


class _SharedUnpickler(pickle.Unpickler):
    """Reads what the trainer that started this server wrote, whose handles name a GPU by its UUID: its number counts
    among the devices that this process sees."""

    def find_class(self, module: str, name: str) -> Any:
        return _rebuild if name == "rebuild_cuda_tensor" else super().find_class(module, name)


def _rebuild(*arguments: Any) -> torch.Tensor:
    uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    return reductions.rebuild_cuda_tensor(*arguments[:6], uuids.index(arguments[6]), *arguments[7:])


def _tensors(info: BucketInfo, flat: torch.Tensor, sizes: list[int]) -> Iterator[tuple[str, torch.Tensor]]:
    start = 0
    for name, shape, dtype, size in zip(info.names, info.shapes, info.dtypes, sizes, strict=True):
        # a copy: a loader may keep what it is given, and the trainer fills the buffer again
        tensor = flat[start : start + size].view(getattr(torch, dtype)).view(shape).clone()
        _received[name] = digest(tensor)
        yield name, tensor
        start += size


def _stored(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                _received[name] = digest(tensor)
                yield name, tensor


def retie(model: torch.nn.Module) -> None:
    """On a CPU a tied output layer has a packed copy of the embedding of its own, which a reload leaves as it was: no
    weight of its name comes."""
    head, embedding = getattr(model, "lm_head", None), getattr(getattr(model, "model", None), "embed_tokens", None)
    config = getattr(model, "config", None)
    if head is None or embedding is None or not getattr(config, "tie_word_embeddings", False):
        return
    head.weight = embedding.weight
    if embedding.weight.device.type == "cpu":
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        dispatch_cpu_unquantized_gemm(head, remove_weight=False)


class Extension:
    """Methods that every worker gets; called through /collective_rpc."""

    def megatron_rl_hf_config(self) -> dict[str, Any]:
        """The served model's config.json."""
        return self.model_config.hf_config.to_dict()  # type: ignore[attr-defined]

    def megatron_rl_digests(self) -> dict[str, int]:
        """The digests of the weights of the last update."""
        return dict(_received)

    def megatron_rl_load_folder(self, path: str) -> None:
        """Load a Hugging Face folder."""
        _received.clear()
        # by an iterator: with --load-format dummy vLLM reads no folder
        self.reload_weights(weights_iterator=_stored(Path(path)))  # type: ignore[attr-defined]
        retie(self.model_runner.model)  # type: ignore[attr-defined]


if "megatron_rl" not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine("megatron_rl", MegatronRlTransfer)
