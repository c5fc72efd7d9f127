"""What the interpreter and the torch twin compute, in either process: shards of ragged logits, and one gradient."""

from __future__ import annotations

import math
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

ROWS, REAL, CUTS = 6, 300, (0, 128, 256, 320, 335)  # the last 20 columns of the third shard and the fourth are padding
BLOCK = 64  # several tiles a shard, the last one ragged
# dtype, temperature, standard deviation of the logits, offset of the rows
CASES: dict[str, tuple[torch.dtype, float, float, float]] = {
    "fp32": (torch.float32, 1.0, 1.0, 0.0),
    "fp32, offset -150": (torch.float32, 0.6, 3.0, -150.0),
    "fp32, scale 30": (torch.float32, 2.0, 30.0, -150.0),
    "bf16, offset -150": (torch.bfloat16, 0.6, 3.0, -150.0),
    "bf16, scale 30": (torch.bfloat16, 1.0, 30.0, 0.0),
    "fp16": (torch.float16, 2.0, 3.0, -20.0),
    "fp64": (torch.float64, 0.6, 3.0, -150.0),
}
LABELS = torch.tensor([0, 127, 128, 299, 200, 5])  # the shards' edges


def inputs(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits `[ROWS, 335]`, labels, gradients of logprobs and entropy."""
    dtype, _, deviation, offset = CASES[name]
    generator = torch.Generator().manual_seed(7)
    logits = deviation * torch.randn(ROWS, CUTS[-1], generator=generator, dtype=torch.float64) + offset
    logits[1, 128:256] = -math.inf  # the whole second shard
    logits[2, 10:140:3] = -math.inf
    logits[3, :256] = -math.inf
    logits[:, REAL:] = 400.0  # would dominate every sum if padding counted
    upstream = torch.randn(2, ROWS, generator=generator, dtype=torch.float64)
    return logits.to(dtype), LABELS, upstream[0], upstream[1]


def shards(name: str) -> list[tuple[Tensor, Tensor, int]]:
    """(logits `[ROWS, V_local]`, target columns, real columns) of four ranks; the last holds padding alone."""
    logits, labels, _, _ = inputs(name)
    bounds = zip(CUTS, CUTS[1:], strict=False)
    return [(logits[:, a:b].contiguous(), labels - a, min(max(REAL - a, 0), b - a)) for a, b in bounds]


def run(kernels: ModuleType, name: str) -> dict[str, Any]:
    """Statistics of each shard and the gradient over the whole, with `kernels`."""
    from megatron_rl.parallel.vocab import gradient_coefficients, merge_shards

    temperature = CASES[name][1]
    stats = [kernels.shard_stats(*shard, temperature, True) for shard in shards(name)]
    few = [kernels.shard_stats(*shard, temperature, False) for shard in shards(name)]
    whole, labels, grad_logprobs, grad_entropy = inputs(name)
    merged = merge_shards(kernels.shard_stats(whole, labels, REAL, temperature, True), None, temperature)
    maximum, log_s, _, entropy, *_ = merged
    upstream = [grad.to(log_s.dtype) for grad in (grad_logprobs, grad_entropy)]
    gradients = {}
    for used in ("both", "logprobs", "entropy"):
        chosen = [
            grad if used in ("both", which) else None
            for grad, which in zip(upstream, ("logprobs", "entropy"), strict=True)
        ]
        factors = gradient_coefficients(log_s, entropy, *chosen, temperature)
        pieces = []
        for logits, columns, real in shards(name):
            kernels.write_gradient(logits, columns, real, maximum, *factors, temperature)
            pieces.append(logits)
        gradients[used] = torch.cat(pieces, 1)
    return {"stats": torch.stack(stats), "few": torch.stack(few), "gradients": gradients}


def main(path: str) -> None:
    """Write the interpreter's results for all cases."""
    from megatron_rl.kernels import vocab_triton

    vocab_triton.BLOCK = BLOCK
    results: dict[str, Any] = {name: run(vocab_triton, name) for name in CASES}
    poisoned = torch.zeros(2, 100)
    poisoned[1, 70] = math.nan
    results["nan"] = vocab_triton.shard_stats(poisoned, torch.tensor([0, 0]), 100, 1.0, True)
    torch.save(results, path)


if __name__ == "__main__":
    main(sys.argv[1])
