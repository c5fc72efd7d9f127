"""The machine: versions, the driver, and what every other part takes for granted."""

from __future__ import annotations

import importlib.metadata
import platform

import torch
from gpu_answer import Answer

from megatron_rl import device
from megatron_rl.parallel.world import all_reduce_bandwidth, join_world

_NAMES = ("torch", "triton", "numpy", "megatron-core", "transformers", "tokenizers", "pydantic")


def machine(answer: Answer) -> None:
    """Look at the device, a world of one process, compiled functions and locked host memory."""
    answer.figure("versions", {"python": platform.python_version()} | versions() | device.gpu_versions())
    faults = device.driver_faults()
    answer.check("driver", not faults, "; ".join(faults) or "none, or torch can use it")
    answer.figure("device", device.name())
    if not device.ON_GPU:
        answer.skip("device", "this process has no GPU; parts that need one are skipped")
        return
    _, free, whole = device.gpu_memory()
    answer.check("device", free > 0.5 * whole, f"{device.name()}, {free / 2**30:.1f} of {whole / 2**30:.1f} GiB free")
    world = join_world(60, 60)
    _, right = all_reduce_bandwidth(world, nbytes=2**24, repeats=3)
    answer.check("NCCL of one process", right, "sums are right" if right else "sums are wrong")
    answer.check("gloo of one process", world.gather_objects("x") == ["x"], "objects come back")
    memory = device.host_memory(2**20)
    memory.copy_(torch.ones(2**20, dtype=torch.uint8, device=device.device()), non_blocking=True)
    device.synchronize()
    answer.check("locked host memory", bool((memory == 1).all()), "the device writes it")
    start = device.mark()
    torch.ones(2**28, device=device.device()).sum().item()
    end = device.mark()
    device.synchronize()
    seconds = device.seconds_between(start, end)
    answer.check("events", 0 < seconds < 60, f"{seconds * 1e3:.1f} ms for a fill and a sum of 1 GiB")
    flash = device.flash_attention(torch.bfloat16)
    answer.figure("attention of packed sequences", "padded SDPA" if flash is None else "varlen_attn")
    compiles(answer)


def versions() -> dict[str, str]:
    """Return the releases of what the parts run on; those that are there."""
    found = {}
    for name in _NAMES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def compiles(answer: Answer) -> None:
    """Look whether torch.compile works, which Megatron's fused functions take. Where it does not, the other parts run
    without it."""
    answer.figure("compiles", False)  # until it did
    x = torch.linspace(-2, 2, 1000, device=device.device())
    try:
        value = torch.compile(lambda x: torch.nn.functional.silu(x) * x)(x)
    except Exception as error:
        reason = str(error).strip().splitlines()
        answer.check("torch.compile", False, f"{type(error).__name__}: {' / '.join(reason[:2])[:300]}")
        return
    wrong = float((value - torch.nn.functional.silu(x) * x).abs().max())
    answer.figure("compiles", True)
    answer.check("torch.compile", wrong < 1e-5, f"largest error {wrong:.1e}")
