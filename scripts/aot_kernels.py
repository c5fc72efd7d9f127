"""Compile the Triton kernels ahead of time for an H100, on a machine without one, and say what they need of it.

python scripts/aot_kernels.py
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from megatron_rl.kernels import vocab_triton

ARCHITECTURE = 90
# of one streaming multiprocessor, CUDA C++ Programming Guide, compute capability 9.0
_REGISTERS, _WARPS, _BLOCKS, _REGISTER_UNIT = 65536, 64, 32, 256
_KERNELS = {
    "stats": (vocab_triton.stats_kernel, {"WITH_SUM_P2": False}),
    "stats with sum_p2": (vocab_triton.stats_kernel, {"WITH_SUM_P2": True}),
    "gradient": (vocab_triton.gradient_kernel, {"HAS_B": True, "HAS_TARGET": True}),
}
_TYPES = {"logits": "*{}", "columns": "*i64", "width": "i32", "real_columns": "i32"}


@dataclass(frozen=True)
class Figures:
    """The numbers of one kernel, as ptxas and the PTX tell them."""

    registers: int  # a thread
    spill_bytes: int  # a thread, stores and loads
    shared_bytes: int  # a block
    loads: tuple[str, ...]  # of logits, as PTX vector and element width: v4.b32 is 128 bits
    stores: tuple[str, ...]
    occupancy: float  # fraction of the resident warps that registers and block limits allow


def compile_kernel(name: str, dtype: str = "bf16", *, divisible: bool = True) -> Figures:
    """Return the figures of `stats`, `stats with sum_p2` or `gradient` for logits of fp32, bf16 or fp16.

    divisible: whether V and the addresses are multiples of 16, which Triton's launcher sees for itself.
    Raises: subprocess.CalledProcessError when ptxas refuses the code.
    """
    kernel, switches = _KERNELS[name]
    constants: dict[str, Any] = {"SCALE": vocab_triton._scale(1.0), "BLOCK": vocab_triton.BLOCK, **switches}
    arguments = [argument for argument in kernel.arg_names if argument not in constants]
    signature = {a: _TYPES.get(a, "*fp32").format(dtype) for a in arguments} | dict.fromkeys(constants, "constexpr")
    aligned = {
        (kernel.arg_names.index(a),): [["tt.divisibility", 16]]
        for a in arguments
        if signature[a].startswith("*") or (divisible and a == "width")
    }
    source = ASTSource(kernel, signature, constants, aligned)
    target = GPUTarget("cuda", ARCHITECTURE, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": vocab_triton.WARPS})
    ptx = compiled.asm["ptx"]
    registers, spills = _assemble(ptx)
    wide = {way: tuple(re.findall(rf"{way}\.global\S*?\.((?:v\d\.)?b\d+)", ptx)) for way in ("ld", "st")}
    return Figures(
        registers, spills, compiled.metadata.shared, wide["ld"], wide["st"], occupancy(registers, vocab_triton.WARPS)
    )


def occupancy(registers: int, warps: int) -> float:
    """Return the fraction of a multiprocessor's warps that can be resident, by registers a thread and warps a block."""
    of_a_warp = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    blocks = min(_REGISTERS // of_a_warp // warps, _WARPS // warps, _BLOCKS)
    return blocks * warps / _WARPS


def _assemble(ptx: str) -> tuple[int, int]:
    """Return registers a thread and spilled bytes, as ptxas counts them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [
            get_ptxas(ARCHITECTURE).path,
            "-v",
            f"--gpu-name=sm_{ARCHITECTURE}a",
            str(path),
            "-o",
            str(path.with_suffix(".cubin")),
        ]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
    registers = re.search(r"Used (\d+) registers", said)
    if registers is None:
        raise RuntimeError(f"ptxas names no register count: {said}")
    return int(registers[1]), spills


def main() -> None:
    """Print the figures of every kernel as JSON."""
    figures = {
        f"{name}, {dtype}": compile_kernel(name, dtype) for name in _KERNELS for dtype in ("bf16", "fp16", "fp32")
    }
    figures["gradient, bf16, odd"] = compile_kernel("gradient", divisible=False)
    print(json.dumps({name: asdict(kernel) for name, kernel in figures.items()}, indent=1))


if __name__ == "__main__":
    main()
