"""Weights through memory that another process opens: CUDA IPC handles that name the device by its UUID, read as an
SGLang worker reads them.

The reader is a process of its own that sees the device under another name. It takes SGLang's unpickler and its patch of
torch's handles from SGLang's files, where they were carried.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import torch
from gpu_answer import Answer
from torch import Tensor

SGLANG_FILES = "TEST_GPU_SGLANG"  # environment: a folder with SGLang's common.py and patch_torch.py
_FILES = ("common.py", "patch_torch.py")
_WANTED = (
    "SafeUnpickler",
    "_modify_tuple",
    "_device_from_maybe_uuid",
    "_REDUCE_TENSOR_ARG_DEVICE_INDEX",
    "_rebuild_cuda_tensor_modified",
)
UPDATES = 3
BUCKET_MIB = 8


def ipc(answer: Answer) -> None:
    """Send three updates in buckets, whose memory is used again at once; compare checksums; look at a wrong UUID, and
    at what is held afterwards."""
    from gpu_cases import config_of, join, larger_model, policy_of

    from megatron_rl import device
    from megatron_rl.convert.weights import expected_weights
    from megatron_rl.rollout.servers.sglang import SGLang
    from megatron_rl.rollout.servers.weight_sync import Buffers, pack_buckets, share

    with TemporaryDirectory() as folder, reader(answer) as ask:
        config = config_of(Path(folder), model={"hf_config": larger_model(), "dtype": "bfloat16"})
        policy = policy_of(config, join(config))
        shapes = expected_weights(policy.hf_config)
        buffers = Buffers(shapes, BUCKET_MIB * 2**20, itemsize=2)
        free, rates = [], []
        for number in range(UPDATES):
            began = time.perf_counter()
            sent = buckets = 0
            for manifest, flat in pack_buckets(policy.hf_weights(), shapes, buffers):
                device.synchronize()
                ask("bucket", share(SGLang().shared_object(manifest, flat)))
                sent, buckets = sent + flat.numel(), buckets + 1
            rates.append(sent / (time.perf_counter() - began))
            theirs = ask("sums", None)
            ours = {name: int(distinct(tensor)) for name, tensor in policy.hf_weights()}
            wrong = [name for name in shapes if ours[name] != theirs.get(name)]
            text = f"{buckets} buckets, {sent / 2**20:.0f} MiB, {rates[-1] / 1e9:.1f} GB/s"
            answer.check(f"update {number + 1}", not wrong, f"{text}; wrong: {', '.join(wrong[:3])}" if wrong else text)
            with torch.no_grad():
                for _, parameter in policy.parameters:
                    parameter.mul_(-0.5)
            free.append(free_after(ask, buffers))
        answer.figure("bytes per second", rates)
        flat = torch.zeros(1024, dtype=torch.uint8, device=device.device())
        if device.ON_GPU:
            refused = ask("refuse", other_device(share(flat), device.device()))
            answer.check("a device that is not there", "uuid" in refused.lower(), refused[:200] or "was opened")
        else:
            answer.skip("a device that is not there", "handles of a CPU name no device")
        if device.ON_GPU:
            lost = free[0] - free[-1]  # what the first update loads for good has been loaded
            answer.figure("bytes free after each update", free)
            answer.check(
                "memory afterwards", lost <= 2 * BUCKET_MIB * 2**20, f"{lost / 2**20:.0f} MiB did not come back"
            )
        else:
            answer.skip("memory afterwards", "looked at on a GPU")


def distinct(values: Tensor) -> Tensor:
    """Return an int64 of the bits of a tensor, which two of other bits share by accident alone."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    bits = values.detach().reshape(-1).view(width).long()
    return (bits * (torch.arange(len(bits), device=bits.device) * 2 + 1)).sum()


def free_after(ask: Callable[[str, Any], Any], buffers: Any) -> int:
    """Return the device's free bytes once both processes have given back what an update took; 0 on a CPU."""
    from megatron_rl import device

    buffers.free()
    ask("forget", None)
    device.collect_shared(give_back=True)
    return device.gpu_memory()[1] if device.ON_GPU else 0


def other_device(payload: bytes, device: torch.device) -> bytes:
    """Return the handle with another UUID of the same length in the place of the device's."""
    uuid = str(torch.cuda.get_device_properties(device).uuid).encode()  # noqa: TID251  no part of the trainer
    assert payload.count(uuid) == 1
    return payload.replace(uuid, b"0" * len(uuid))


@contextlib.contextmanager
def reader(answer: Answer) -> Iterator[Callable[[str, Any], Any]]:
    """Start the other process; give a function that asks it something and returns its answer. Raises: RuntimeError with
    what it raised."""
    from megatron_rl import device

    environment = dict(os.environ)
    if device.ON_GPU:
        uuid = torch.cuda.get_device_properties(device.device()).uuid  # noqa: TID251  no part of the trainer
        environment["CUDA_VISIBLE_DEVICES"] = f"GPU-{uuid}"
    files = environment.get(SGLANG_FILES, "")
    answer.figure(
        "unpickler", "SGLang's" if files else "torch's, by SGLang's rule for UUIDs: its files were not carried"
    )
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    assert process.stdin is not None and process.stdout is not None
    to, of = process.stdin, process.stdout

    def ask(what: str, value: Any) -> Any:
        send(to, (what, value))
        kind, result = receive(of)
        if kind == "error":
            raise RuntimeError(f"the reader: {result}")
        return result

    try:
        yield ask
    finally:
        to.close()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def send(file: IO[bytes], value: Any) -> None:
    data = pickle.dumps(value)
    file.write(len(data).to_bytes(8, "little") + data)
    file.flush()


def receive(file: IO[bytes]) -> Any:
    """Raises: EOFError when the other end is gone."""
    head = file.read(8)
    if len(head) < 8:
        raise EOFError("the other process is gone; its last words are in the log")
    return pickle.loads(file.read(int.from_bytes(head, "little")))


# --- the reader -------------------------------------------------------------------------------------------------------


def unpickler() -> Callable[[bytes], Any]:
    """Return what an SGLang worker does with a payload."""
    from torch.multiprocessing import reductions

    names: dict[str, Any] = {"pickle": pickle, "torch": torch, "reductions": reductions}
    original: Any = reductions.rebuild_cuda_tensor
    folder = os.environ.get(SGLANG_FILES, "")
    if folder:
        exec("from typing import Callable, Union", names)
        for file in _FILES:
            for part in ast.parse((Path(folder) / file).read_text()).body:
                name = getattr(part, "name", None) or ast.unparse(getattr(part, "targets", [ast.Name("")])[0])
                if name in _WANTED:
                    exec(ast.unparse(part), names)
        reductions._rebuild_cuda_tensor_original = original  # type: ignore[attr-defined]
        reductions.rebuild_cuda_tensor = names["_rebuild_cuda_tensor_modified"]
        return lambda payload: names["SafeUnpickler"](io.BytesIO(payload)).load()

    def rebuild(*arguments: Any) -> Any:
        uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]  # noqa: TID251
        if arguments[6] not in uuids:
            raise ValueError(f"no device has the UUID {arguments[6]}")
        return original(*arguments[:6], uuids.index(arguments[6]), *arguments[7:])

    reductions.rebuild_cuda_tensor = rebuild
    return pickle.loads


def read() -> None:
    """Answer the questions of `ipc` until the pipe is closed: keep copies of the weights, as an engine does."""
    to = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever is printed goes to the log
    load = unpickler()
    kept: dict[str, Tensor] = {}
    while True:
        try:
            what, value = receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            send(to, ("ok", answer_to(what, value, load, kept)))
        except Exception as error:
            send(to, ("error", f"{type(error).__name__}: {error}"))


def answer_to(what: str, value: Any, load: Callable[[bytes], Any], kept: dict[str, Tensor]) -> Any:
    """Return the answer to one question."""
    if what == "bucket":
        bucket = load(value)
        flat = bucket["flattened_tensor"]
        for entry in bucket["metadata"]:
            kept[entry.name] = flat[entry.start_idx : entry.end_idx].view(entry.dtype).view(entry.shape).clone()
        return len(bucket["metadata"])  # the copies may still run, as an engine's may
    if what == "sums":
        return {name: int(distinct(tensor)) for name, tensor in kept.items()}
    if what == "refuse":
        try:
            load(value)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""
    kept.clear()
    if torch.cuda.is_available():  # noqa: TID251
        torch.cuda.synchronize()  # noqa: TID251
        torch.cuda.ipc_collect()  # noqa: TID251
        torch.cuda.empty_cache()  # noqa: TID251
    return None


if __name__ == "__main__":
    read()
