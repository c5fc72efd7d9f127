"""Vocabulary statistics, forward and backward: seconds, CPU seconds, peak extra memory, collectives and bytes a token,
against megatron-core's cross entropy beside a vocab-parallel entropy that takes the maximum first and the sums after.

    python scripts/bench_vocab.py                       # T 4096, V 32768 and 152064, TP 1 and 2, float32 and bfloat16
    python scripts/bench_vocab.py --hidden 1024         # the output layer included: statistics fused with it or not

The largest case wants four times its logits: 10 GB in float32 for T 4096, V 152064.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_rl import device, launch
from megatron_rl.config import ParallelConfig
from megatron_rl.parallel.fused_linear import linear_stats
from megatron_rl.parallel.groups import Groups, destroy_groups, init_groups
from megatron_rl.parallel.vocab import VocabShard, vocab_parallel_stats

Way = Callable[[Any, Tensor, dict[str, Any], Groups], tuple[Tensor, Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", default="32768,152064", help="comma-separated")
    parser.add_argument("--tp", default="1,2", help="comma-separated")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="comma-separated")
    parser.add_argument("--ways", default="", help="comma-separated; empty: all that can run")
    parser.add_argument("--hidden", type=int, default=0, help="width of the hidden states; 0: from logits on")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        setting = json.loads(options.worker)
        launch.run_worker(lambda: work(setting), Path(setting["folder"]))
        return
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)  # what is freed leaves the process, so that peaks are comparable
    print(f"T={options.tokens}, median of {options.repeats}, load {os.getloadavg()[0]:.1f} at the start")
    print(f"{'V':>7} {'tp':>2} {'dtype':9} {'way':11} {'s':>7} {'CPU s':>7} {'/ first':>7} {'memory':>7}  collectives")
    for vocab in options.vocab.split(","):
        for tp in options.tp.split(","):
            for dtype in options.dtypes.split(","):
                with tempfile.TemporaryDirectory() as folder:
                    setting = vars(options) | {"vocab": int(vocab), "tp": int(tp), "dtype": dtype, "folder": folder}
                    command = [sys.executable, __file__, "--worker", json.dumps(setting)]
                    code = launch.run_world(command, int(tp), Path(folder), grace_seconds=10)
                    if code:
                        sys.exit(code)
                    report(setting, [json.loads(path.read_text()) for path in Path(folder).glob("rank*.json")])


def report(setting: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    """One line a way: seconds of the slowest rank, CPU seconds of all, memory of the hungriest in multiples of its
    logits."""
    first = 0.0
    for way in ranks[0]:
        rows = [rank[way] for rank in ranks]
        cpu = sum(row["cpu"] for row in rows)
        first = first or cpu
        print(
            f"{setting['vocab']:7} {setting['tp']:2} {setting['dtype']:9} {way:11} {max(r['wall'] for r in rows):7.2f} "
            f"{cpu:7.2f} {first / cpu:7.2f} {max(r['memory'] for r in rows):7.3f}  "
            f"{rows[0]['collectives']}, {rows[0]['bytes']:.0f} B a token",
            flush=True,
        )


def work(setting: dict[str, Any]) -> None:
    """One rank: every way on the same logits."""
    groups = init_groups(ParallelConfig(tp=setting["tp"]), 1)
    setting["start"] = groups.tp_rank * setting["vocab"] // groups.tp_size
    found = {}
    ways = linear_ways() if setting["hidden"] else logits_ways(groups.tp_size)
    for way, function in ways.items():
        if not setting["ways"] or way in setting["ways"].split(","):
            counter = Collectives()
            with counter:
                run_once(setting | {"tokens": 64}, groups, function)
            runs = [run_once(setting, groups, function) for _ in range(setting["repeats"])]
            found[way] = {
                **{name: statistics.median(run[name] for run in runs) for name in ("wall", "cpu")},
                "memory": max(run["memory"] for run in runs),
                "collectives": counter.text(),
                "bytes": counter.nbytes / 64,
            }
    (Path(setting["folder"]) / f"rank{groups.rank}.json").write_text(json.dumps(found))
    destroy_groups()


def run_once(setting: dict[str, Any], groups: Groups, way: Way) -> dict[str, float]:
    """Forward and backward of a policy-gradient loss with an entropy term, on fresh inputs."""
    inputs, labels = make_inputs(setting)
    device.reset_peak()
    before = device.peak_since_reset()
    groups.all_ranks.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    logprobs, entropy = way(inputs, labels, setting, groups)
    (logprobs * torch.linspace(-1, 1, len(labels), device=labels.device) + 0.01 * entropy).sum().backward()
    device.synchronize()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    shard = setting["tokens"] * setting["vocab"] // setting["tp"] * getattr(torch, setting["dtype"]).itemsize
    return {"wall": wall, "cpu": cpu, "memory": (device.peak_since_reset() - before) / shard}


def make_inputs(setting: dict[str, Any]) -> tuple[Any, Tensor]:
    """Logits `[T, V/tp]` that were computed from something (or hidden states and a weight), and labels. The gradient's
    storage is there already where the way adds to it, as main_grad is in training."""
    tokens, width, where = setting["tokens"], setting["vocab"] // setting["tp"], device.device()
    dtype = getattr(torch, setting["dtype"])
    torch.manual_seed(setting["start"])
    labels = (torch.arange(tokens, device=where) * 37) % setting["vocab"]
    if setting["hidden"]:
        hidden = torch.randn(tokens, setting["hidden"], dtype=dtype, device=where)
        weight = torch.randn(width, setting["hidden"], dtype=dtype, device=where) / setting["hidden"] ** 0.5
        return (hidden.requires_grad_(), weight.requires_grad_()), labels
    few = torch.randn(64, width, device=where) * 3
    logits = torch.empty(tokens, width, dtype=dtype, device=where)
    for start in range(0, tokens, 64):
        logits[start : start + 64] = few[: tokens - start]
    return Source.apply(torch.zeros((), requires_grad=True, device=where), logits), labels


def logits_ways(tp: int) -> dict[str, Way]:
    ways: dict[str, Way] = {"classical": classical, "one pass": one_pass}
    if importlib.util.find_spec("liger_kernel") and device.ON_GPU and tp == 1:
        ways["liger"] = liger
    return ways


def linear_ways() -> dict[str, Way]:
    return {"separate": separate, "fused": fused}


def classical(logits: Tensor, labels: Tensor, setting: dict[str, Any], groups: Groups) -> tuple[Tensor, Tensor]:
    """Two operators, each with softmax and collectives of its own. The cross entropy overwrites what it is given."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy  # noqa: TID251  what is measured against

    upcast = logits.float()
    entropy = MaxThenSumEntropy.apply(upcast, groups.tp)
    return -vocab_parallel_cross_entropy(upcast.clone(), labels), entropy


def one_pass(logits: Tensor, labels: Tensor, setting: dict[str, Any], groups: Groups) -> tuple[Tensor, Tensor]:
    group = groups.tp if groups.tp_size > 1 else None
    stats = vocab_parallel_stats(logits, labels, group=group, vocab_start=setting["start"], vocab_size=setting["vocab"])
    return stats.logprobs, stats.entropy


def separate(inputs: Any, labels: Tensor, setting: dict[str, Any], groups: Groups) -> tuple[Tensor, Tensor]:
    hidden, weight = inputs
    return one_pass(hidden @ weight.t(), labels, setting, groups)


def fused(inputs: Any, labels: Tensor, setting: dict[str, Any], groups: Groups) -> tuple[Tensor, Tensor]:
    group = groups.tp if groups.tp_size > 1 else None
    hidden, weight = inputs
    stats = linear_stats(hidden, weight, labels, VocabShard(group, setting["start"], setting["vocab"]))
    return stats.logprobs, stats.entropy


def liger(logits: Tensor, labels: Tensor, setting: dict[str, Any], groups: Groups) -> tuple[Tensor, Tensor]:
    """Log-probabilities alone: it has no entropy."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    logprobs = -liger_cross_entropy(logits, labels, reduction="none")
    return logprobs, torch.zeros_like(logprobs)


class Source(torch.autograd.Function):
    """Makes logits that something computed, as far as autograd can tell."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, logits: Tensor) -> Tensor:
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


class MaxThenSumEntropy(torch.autograd.Function):
    """Entropy of a sharded softmax with three all-reduces: the maximum, the normaliser, sum pi x. Keeps x and pi."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        import torch.distributed as dist  # noqa: TID251  what is measured against

        maximum = x.max(-1, keepdim=True).values
        dist.all_reduce(maximum, dist.ReduceOp.MAX, group)
        p = (x - maximum).exp_()
        total = p.sum(-1, keepdim=True)
        dist.all_reduce(total, group=group)
        p.div_(total)
        mean = torch.linalg.vecdot(p, x)[:, None]  # one pass, as where this is compiled
        dist.all_reduce(mean, group=group)
        ctx.save_for_backward(x, p, mean)
        return (maximum + total.log() - mean)[:, 0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        x, p, mean = ctx.saved_tensors
        p.mul_(x.sub_(mean)).mul_(-grads[0][:, None])  # in place, so as to hold no third tensor of this size
        x.add_(mean)
        return p, None


class Collectives(TorchDispatchMode):
    """Names of the collectives inside, and the bytes that this rank gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("c10d.") and "barrier" not in name:
            self.names.append(name.split(".")[1].rstrip("_"))
            given = args[1] if "allgather" in name else args[0]
            self.nbytes += sum(t.nbytes for t in torch.utils._pytree.tree_leaves(given) if isinstance(t, Tensor))
        return func(*args, **(kwargs or {}))

    def text(self) -> str:
        return " ".join(f"{self.names.count(name)} {name}" for name in dict.fromkeys(self.names)) or "none"


if __name__ == "__main__":
    main()
