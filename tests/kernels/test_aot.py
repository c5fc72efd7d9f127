"""The kernels compiled for an H100 without one: what ptxas says of registers and spills, what the PTX says of loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.worlds import ROOT

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """In a process of its own, with an empty cache: elsewhere in the suite Triton interprets."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": paths, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "scripts/aot_kernels.py"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# Each bound is what one more resident block of 4 warps would cost: 40 registers leave room for 12 blocks, 48 for 10.
@pytest.mark.parametrize(
    ("kernel", "registers", "occupancy"),
    [
        ("stats, bf16", 40, 0.75),
        ("stats, fp32", 40, 0.75),
        ("stats with sum_p2, bf16", 48, 0.625),
        ("stats with sum_p2, fp32", 48, 0.625),
        ("gradient, bf16", 40, 0.75),
        ("gradient, fp32", 48, 0.625),
    ],
)
def test_registers_spills_occupancy(figures: dict[str, Any], kernel: str, registers: int, occupancy: float) -> None:
    found = figures[kernel]
    assert found["spill_bytes"] == 0
    assert found["registers"] <= registers and found["occupancy"] >= occupancy, found
    assert found["shared_bytes"] <= 1024  # else shared memory would bound the blocks, which `occupancy` leaves out


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp16"])
@pytest.mark.parametrize("kernel", ["stats", "stats with sum_p2", "gradient"])
def test_logits_move_128_bits_at_a_time(figures: dict[str, Any], kernel: str, dtype: str) -> None:
    """A thread's 16 logits of a tile: 2 loads of 8 halves or 4 loads of 4 floats, and as many stores in place."""
    found, wide = figures[f"{kernel}, {dtype}"], 4 if dtype == "fp32" else 2
    assert found["loads"].count("v4.b32") == wide
    assert found["stores"].count("v4.b32") == (wide if kernel == "gradient" else 0)
    assert set(found["loads"]) <= {"v4.b32", "b16", "b32", "b64"}  # the rest are a row's scalars
    assert found["loads"].count("b16") <= 1  # the target's logit


def test_odd_vocabularies_compile_with_narrow_loads(figures: dict[str, Any]) -> None:
    """The other way to read this file: where 128 bits would be misaligned, the loads are not 128 bits wide."""
    found = figures["gradient, bf16, odd"]
    assert found["spill_bytes"] == 0
    assert "v4.b32" not in found["loads"] and "v4.b32" not in found["stores"]


def test_occupancy() -> None:
    """By hand: 40 registers are 5 units of 256 a warp, 12 blocks of 4 warps in 65536; 255 are 32 units, 2 blocks."""
    from scripts.aot_kernels import occupancy

    assert [occupancy(40, 4), occupancy(41, 4), occupancy(255, 4), occupancy(16, 1)] == [0.75, 0.625, 0.125, 0.5]


def test_the_twins_have_one_signature() -> None:
    import inspect

    from megatron_rl.kernels import vocab_torch, vocab_triton

    for name in ("shard_stats", "write_gradient"):
        assert inspect.signature(getattr(vocab_torch, name)) == inspect.signature(getattr(vocab_triton, name))
