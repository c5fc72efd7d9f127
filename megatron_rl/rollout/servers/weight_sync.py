"""The policy's weights into engine servers: size-bounded flat buckets, sent while the next one is gathered.

Every trainer rank walks through the weight stream, which is a collective, and rank 0 speaks to the servers. Three ways:

- colocated: every rank packs the bucket into memory that the machine shares (CUDA IPC on GPUs, a shared-memory file on
  CPUs) and hands its handle to rank 0; worker w of a server reads that of the trainer rank on its own device.
- disaggregated: rank 0 broadcasts the bucket through a process group whose other members are the servers' workers.
- disk: rank 0 writes a Hugging Face folder that the servers load.

While the servers load one bucket, the next is gathered.
"""

from __future__ import annotations

import asyncio
import io
import pickle
import shutil
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.multiprocessing
from torch import Tensor
from typing_extensions import override

from megatron_rl import device
from megatron_rl.convert.disk import clear
from megatron_rl.convert.save_hf import SHARD_BYTES, write_shards
from megatron_rl.convert.weights import expected_weights
from megatron_rl.parallel.engine_group import broadcast_bucket, join_engine_group, leave_engine_group
from megatron_rl.rollout.clocks import GROUP_SECONDS
from megatron_rl.rollout.engine import EngineError
from megatron_rl.rollout.servers.http import Server
from megatron_rl.rollout.servers.protocol import Dialect, Manifest

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_SHARED_MEMORY = Path("/dev/shm")

Submit = Callable[[Coroutine[Any, Any, Any]], "Future[Any]"]  # runs a coroutine on the engine's event loop


class Channel(Protocol):
    """One way of sending. Methods marked rank 0 do nothing elsewhere."""

    def open(self, servers: Sequence[Server]) -> None:
        """Rank 0: connect to `servers`, unless connected to just these."""

    def send(self, stream: Iterable[tuple[str, Tensor]], weight_version: int) -> None:
        """All ranks: exhaust the stream, whatever fails, and send it. Raises: EngineError on rank 0."""

    def close(self) -> None:
        """Rank 0: disconnect."""


def check_same_model(policy: PretrainedConfig, theirs: PretrainedConfig, url: str) -> None:
    """Check that a server has the policy's weights: one that is sent others dies, or serves noise.

    Raises: EngineError naming a weight of another name or shape.
    """
    ours, served = expected_weights(policy), expected_weights(theirs)
    for name in ours.keys() | served.keys():
        if ours.get(name) != served.get(name):
            raise EngineError(
                f"{url} serves another model than the policy: {name} has shape {served.get(name, 'none')} there and "
                f"{ours.get(name, 'none')} here; start it with the policy's config.json"
            )


def pack_buckets(
    stream: Iterable[tuple[str, Tensor]], shapes: dict[str, tuple[int, ...]], buffers: Callable[[int, int], Tensor]
) -> Iterator[tuple[Manifest, Tensor]]:
    """Copy the stream into flat buckets; yield (what a bucket holds, `[bytes]` uint8 view of its buffer).

    `buffers(i, nbytes)` is bucket i's buffer, of `nbytes` at least; it is asked for when the first tensor goes in.
    Raises: EngineError when the stream brings a weight that `shapes` does not have so, twice, or not at all.
    """
    missing, number = dict(shapes), 0
    manifest, used, buffer = Manifest([], [], []), 0, None
    for name, tensor in stream:
        if missing.pop(name, None) != tuple(tensor.shape):
            expected = shapes.get(name, "none of that name")
            raise EngineError(f"the policy sent {name} of shape {tuple(tensor.shape)}, expected {expected}, once")
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        dtype = str(tensor.dtype).removeprefix("torch.")
        # one dtype a bucket keeps every tensor aligned
        if buffer is not None and (used + flat.numel() > buffer.numel() or dtype != manifest.dtypes[-1]):
            yield manifest, buffer[:used]
            number += 1
            manifest, used, buffer = Manifest([], [], []), 0, None
        if buffer is None:
            buffer = buffers(number, flat.numel())
        buffer[used : used + flat.numel()].copy_(flat)
        used += flat.numel()
        manifest.names.append(name)
        manifest.shapes.append(list(tensor.shape))
        manifest.dtypes.append(dtype)
        del tensor, flat  # they hold a gathered bucket, and the next one is gathered now
    if buffer is not None:
        yield manifest, buffer[:used]
    if missing:
        raise EngineError(f"the policy did not send {len(missing)} weights: {', '.join(list(missing)[:3])}")


class Buffers:
    """Flat buffers of `bucket_bytes`, less for a small model, more for a large tensor.

    On a GPU each bucket has one of its own, never written again: a server may answer before its copies have run, and
    torch reuses the memory only when the reader has let go of it, which waits for them. On a CPU two take turns, and
    stay: fresh pages of shared memory cost much of a bucket's time.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], bucket_bytes: int, itemsize: int) -> None:
        """Set the size. `itemsize`: bytes of an element of the stream's widest dtype."""
        sizes = [torch.Size(shape).numel() * itemsize for shape in shapes.values()]
        self._bucket = min(bucket_bytes, sum(sizes))
        self.nbytes = max(max(sizes), self._bucket)  # of each that takes turns
        self._flats: list[Tensor] = []

    def __call__(self, number: int, nbytes: int) -> Tensor:
        """Return the buffer of bucket `number`, of `nbytes` at least; the bucket before the last must have been
        read."""
        if device.ON_GPU:
            device.collect_shared()
            return torch.empty(max(self._bucket, nbytes), dtype=torch.uint8, device=device.device())
        while len(self._flats) <= min(number, 1):
            self._flats.append(torch.empty(self.nbytes, dtype=torch.uint8))
        return self._flats[number % 2]

    def free(self) -> None:
        """Give the memory back."""
        self._flats.clear()


@dataclass(frozen=True, slots=True)
class Sender:
    """The trainer's side of a channel that sends buckets."""

    dialect: Dialect
    shapes: dict[str, tuple[int, ...]]  # of every weight, by its Hugging Face name
    buffers: Buffers
    submit: Submit
    rank: int  # this process's number in the trainer's world


class Colocated(Channel):
    """Sends through shared memory on one machine, see the module's docstring."""

    def __init__(
        self, sender: Sender, gather: Callable[[Any], Sequence[Any]], readers: Callable[[], list[list[int]]]
    ) -> None:
        """Keep the parts. `gather`: an all-gather of objects over all ranks. `readers()[s][w]`: the trainer rank whose
        buffer worker w of server s reads."""
        self._sender, self._gather, self._readers = sender, gather, readers
        self._servers: Sequence[Server] = ()

    @override
    def open(self, servers: Sequence[Server]) -> None:
        """Check that shared memory is large enough: writing beyond it kills the process. Raises: EngineError."""
        first, self._servers = not self._servers, servers
        if first and not device.ON_GPU:
            ranks = len({rank for workers in self._readers() for rank in workers})
            needed, free = 2 * self._sender.buffers.nbytes * ranks, shutil.disk_usage(_SHARED_MEMORY).free
            if needed > free:
                raise EngineError(
                    f"rollout.weight_sync.mode=colocated needs {needed:,} bytes of shared memory, {_SHARED_MEMORY} has "
                    f"{free:,} free; lower rollout.weight_sync.bucket_mib, or set mode to disaggregated or disk"
                )

    @override
    def send(self, stream: Iterable[tuple[str, Tensor]], weight_version: int) -> None:
        """Send the stream through shared memory.

        A rank lets go of a bucket once it has left the gather of the next one, and rank 0 enters that gather only when
        the servers have loaded the bucket.
        """
        readers = self._readers()
        copies = sum(workers.count(self._sender.rank) for workers in readers)
        loading: Future[None] | None = None
        failure: BaseException | None = None
        for manifest, flat in pack_buckets(stream, self._sender.shapes, self._sender.buffers):
            device.synchronize()  # the copies into the buffer, before another process reads it
            shared = self._sender.dialect.shared_object(manifest, flat)
            failure = failure or _outcome(loading)
            payloads = self._gather([share(shared) for _ in range(copies)])
            if self._sender.rank == 0 and failure is None:
                loading = self._sender.submit(self._receive(manifest, payloads, readers))
        failure = failure or _outcome(loading)
        if failure is not None:
            raise failure

    async def _receive(self, manifest: Manifest, payloads: Sequence[list[bytes]], readers: list[list[int]]) -> None:
        left = [list(payloads_of_rank) for payloads_of_rank in payloads]
        calls = [
            self._sender.dialect.receive_shared(server, manifest, [left[rank].pop() for rank in workers])
            for server, workers in zip(self._servers, readers, strict=True)
        ]
        await asyncio.gather(*calls)

    @override
    def close(self) -> None:
        self._sender.buffers.free()


class Disaggregated(Channel):
    """Sends by a broadcast from rank 0, see the module's docstring."""

    def __init__(self, sender: Sender, address: Callable[[Server], tuple[str, int]]) -> None:
        """Keep the parts. `address(server)`: the host and free port at which that server can reach this process."""
        self._sender, self._address = sender, address
        self._servers: Sequence[Server] = ()
        self._group: Any = None
        self._name = ""
        # a thread of its own: a broadcast blocks, and must not stop the event loop that speaks to the servers
        self._thread = ThreadPoolExecutor(1, "weight-broadcast", initializer=device.use_local_device)

    @override
    def open(self, servers: Sequence[Server]) -> None:
        """Make the servers' workers join a new group. Raises: EngineError when they do not join."""
        if self._sender.rank or (self._group is not None and list(servers) == list(self._servers)):
            return
        self.close()
        self._servers = servers
        # a server may still have the group of a trainer that was killed, and an older group's store keys stay
        self._name = f"megatron_rl_{uuid.uuid4().hex[:12]}"
        self._sender.submit(self._join()).result()

    async def _join(self) -> None:
        workers = await asyncio.gather(*(self._sender.dialect.num_workers(server) for server in self._servers))
        host, port = self._address(self._servers[0])
        world_size, offsets = 1 + sum(workers), [1 + sum(workers[:i]) for i in range(len(workers))]

        def join() -> Any:
            return join_engine_group(
                host, port, world_size=world_size, name=self._name, backend=device.BACKEND, seconds=GROUP_SECONDS
            )

        joins = [
            self._sender.dialect.open_group(
                server,
                host=host,
                port=port,
                rank_offset=offset,
                world_size=world_size,
                name=self._name,
                backend=device.BACKEND,
            )
            for server, offset in zip(self._servers, offsets, strict=True)
        ]
        try:
            self._group, *_ = await asyncio.gather(self._in_thread(join), *joins)
        except RuntimeError as error:
            if isinstance(error, EngineError):
                raise
            raise EngineError(f"the servers' workers did not join the trainer at {host}:{port}: {error}") from error

    @override
    def send(self, stream: Iterable[tuple[str, Tensor]], weight_version: int) -> None:
        if self._sender.rank:
            _exhaust(stream)
            return
        loading: Future[None] | None = None
        failure: BaseException | None = None
        stream = iter(stream)
        try:
            for manifest, flat in pack_buckets(stream, self._sender.shapes, self._sender.buffers):
                device.synchronize()
                failure = failure or _outcome(loading)
                if failure is None:
                    loading = self._sender.submit(self._broadcast(manifest, flat))
        finally:
            _exhaust(stream)
            failure = failure or _outcome(loading)
        if failure is not None:
            self._leave()  # its members are out of step
            raise failure if isinstance(failure, EngineError) else EngineError(f"the broadcast failed: {failure}")

    async def _broadcast(self, manifest: Manifest, flat: Tensor) -> None:
        calls = [self._sender.dialect.receive_broadcast(server, manifest, self._name) for server in self._servers]
        await asyncio.gather(self._in_thread(lambda: broadcast_bucket(flat, self._group)), *calls)

    async def _in_thread(self, function: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def _leave(self) -> None:
        """Leave the group and close its connections: a worker that waits for a broadcast then fails instead of
        hanging."""
        group, self._group, self._servers = self._group, None, ()
        if group is not None:
            self._thread.submit(leave_engine_group, group).result()

    @override
    def close(self) -> None:
        if self._group is not None:
            calls = [self._sender.dialect.close_group(server, self._name) for server in self._servers]
            self._sender.submit(_all_settled(calls)).result()
        self._leave()
        self._sender.buffers.free()


class Disk(Channel):
    """Sends through a folder, see the module's docstring."""

    def __init__(self, dialect: Dialect, folder: Path, submit: Submit, rank: int, model_dir: Path | None) -> None:
        """Keep the folder. `model_dir`: config.json and the tokenizer, copied beside the weights; None: the folder has
        all, those of the stream too."""
        self._dialect, self._folder, self._submit = dialect, folder, submit
        self._rank, self._model_dir = rank, model_dir
        self._servers: Sequence[Server] = ()

    @override
    def open(self, servers: Sequence[Server]) -> None:
        self._servers = servers

    @override
    def send(self, stream: Iterable[tuple[str, Tensor]], weight_version: int) -> None:
        if self._rank:
            _exhaust(stream)
            return
        stream = iter(stream)
        try:
            if self._model_dir is not None:
                clear(self._folder)  # a server that still reads the former files may keep them from being removed
                shutil.copytree(self._model_dir, self._folder)
                write_shards(self._folder, stream, SHARD_BYTES)
        except OSError as error:
            free = shutil.disk_usage(self._folder.parent).free
            raise EngineError(f"cannot write weights to {self._folder}: {error}; {free:,} bytes are free") from error
        finally:
            _exhaust(stream)
        # the folder stays: a server reports it as its model from here on
        self._submit(self._load(weight_version)).result()

    async def _load(self, weight_version: int) -> None:
        calls = [self._dialect.load_folder(server, self._folder.resolve(), weight_version) for server in self._servers]
        await asyncio.gather(*calls)

    @override
    def close(self) -> None:
        pass  # nothing is open


def share(value: Any) -> bytes:
    """Return a pickle in which tensors are handles to shared memory: CUDA IPC that names the device by its UUID, or a
    shared-memory file.

    Any process can open the file by its name; torch's default, a file descriptor, reaches relatives alone. Each pickle
    of device memory is for one reader, which must open it: torch counts readers by pickles.
    """
    former = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        buffer = io.BytesIO()
        pickler = ForkingPickler(buffer, pickle.HIGHEST_PROTOCOL)
        reduce: Any = pickler.dispatch_table[Tensor]
        by_name: dict[type, Any] = {Tensor: lambda tensor: device.portable_handle(reduce(tensor))}
        pickler.dispatch_table = {**pickler.dispatch_table, **by_name}
        pickler.dump(value)
        return buffer.getvalue()
    finally:
        torch.multiprocessing.set_sharing_strategy(former)


async def _all_settled(calls: Iterable[Awaitable[None]]) -> None:
    await asyncio.gather(*calls, return_exceptions=True)


def _outcome(loading: Future[None] | None) -> BaseException | None:
    return None if loading is None else loading.exception()


def _exhaust(stream: Iterable[Any]) -> None:
    for _ in stream:
        pass
