"""Seconds, bytes per second and memory of a weight update into a real engine server, by way and bucket size, against a
plain broadcast of the same bytes in the same run: python scripts/bench_sync.py --engine sglang --megabytes 500."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HIDDEN, FFN, VOCAB, HEADS = 768, 2304, 97, 12  # heads of width 64; the vocabulary is the countdown task's and no matter
LAYER_PARAMETERS = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=("sglang", "vllm"), default="sglang")
    parser.add_argument("--megabytes", type=float, default=500.0, help="size of the policy in float32")
    parser.add_argument("--buckets", default="16,64,512", help="MiB, comma-separated")
    parser.add_argument("--modes", default="colocated,disaggregated,disk")
    parser.add_argument("--tp", type=int, default=2, help="tensor-parallel size of the trainer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        from megatron_rl import launch

        launch.run_worker(lambda: work(json.loads(options.worker)), Path(json.loads(options.worker)["run_dir"]))
        return
    print(f"float32, trainer tp={options.tp}, {options.engine} tp=1, load {os.getloadavg()[0]:.1f} at the start")
    print(
        f"{'way':14} {'bucket':>8} {'MB':>5} {'seconds':>8} {'MB/s':>6} "
        f"{'wire':>6} {'/plain':>7} {'/fresh':>7} {'extra MB':>9}"
    )
    for mode in options.modes.split(","):
        for bucket in options.buckets.split(",") if mode != "disk" else ["0"]:
            with tempfile.TemporaryDirectory() as folder:
                show(measured(options, mode, int(bucket), Path(folder)))


def measured(options: argparse.Namespace, mode: str, bucket: int, folder: Path) -> dict[str, Any]:
    """What a world and a server of their own find for one way and bucket size."""
    from megatron_rl import launch

    setting = vars(options) | {"run_dir": str(folder), "mode": mode, "bucket": bucket}
    command = [sys.executable, __file__, "--worker", json.dumps(setting)]
    if code := launch.run_world(command, options.tp, folder, grace_seconds=10):
        sys.exit(code)
    row: dict[str, Any] = json.loads((folder / "row.json").read_text())
    return row


def show(row: dict[str, Any]) -> None:
    wire = f"{'':22}"
    if row["wire"]:
        wire = f"{row['wire']:6.2f} {row['wire'] / row['plain']:7.2f} {row['wire'] / row['fresh']:7.2f}"
    bucket = f"{row['bucket']} MiB" if row["bucket"] else ""
    print(
        f"{row['way']:14} {bucket:>8} {row['mb']:5.0f} {row['seconds']:8.2f} {row['mb'] / row['seconds']:6.0f} {wire} "
        f"{row['extra_mb']:9.0f}",
        flush=True,
    )


def work(setting: dict[str, Any]) -> None:
    """One rank: build the policy, and update the server a few times."""
    from megatron_rl import train
    from megatron_rl.config import parse_config
    from megatron_rl.parallel.groups import destroy_groups, init_groups

    config = parse_config(raw_config(setting, setting["mode"], setting["bucket"] or 512))
    groups = init_groups(config.parallel, config.seed)
    run = train.set_up(config, groups)
    row = measure(run, setting, setting["mode"], setting["bucket"])
    run.close()
    if groups.rank == 0:
        (Path(setting["run_dir"]) / "row.json").write_text(json.dumps(row))
    groups.all_ranks.barrier()
    destroy_groups()


def raw_config(setting: dict[str, Any], mode: str, bucket: int) -> dict[str, Any]:
    layers = max(1, round(setting["megabytes"] * 1e6 / 4 / LAYER_PARAMETERS))
    hf = {"model_type": "qwen2", "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": layers}
    hf |= {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "tie_word_embeddings": True}
    hf |= {"max_position_embeddings": 256}
    return {
        "name": f"{mode}_{bucket}",
        "model": {"hf_config": hf},
        "parallel": {"tp": setting["tp"]},
        "data": {"type": "countdown", "num_train": 64, "num_eval": 8},
        "rollout": {
            "engine": setting["engine"],
            "max_response_tokens": 8,
            "server": {"kv_tokens": 2048, "max_concurrency": 4},
            "weight_sync": {"mode": mode, "bucket_mib": bucket},
        },
        "train": {"micro_batch_tokens": 256},
        "logging": {"run_dir": setting["run_dir"] + "/{name}", "tensorboard": False},
    }


def measure(run: Any, setting: dict[str, Any], mode: str, bucket: int) -> dict[str, Any]:
    """Median seconds of a whole update (gather, copy, wire, load, handshake), and the memory that it takes here."""
    from megatron_rl.rollout.servers import weight_sync

    nbytes = sum(tensor.nbytes for _, tensor in run.policy.hf_weights())
    wire = [0.0]
    broadcast = weight_sync.broadcast_bucket

    def timed(*arguments: Any) -> None:
        start = time.perf_counter()
        broadcast(*arguments)
        wire[-1] += time.perf_counter() - start

    setattr(weight_sync, "broadcast_bucket", timed)  # noqa: B010
    try:
        versions = iter(range(1, 1000))
        run.served.engine.update_weights(run.policy.hf_weights(), next(versions))  # connects, and warms up

        def update() -> None:
            wire.append(0.0)
            run.served.engine.update_weights(run.policy.hf_weights(), next(versions))

        wire.clear()
        with PeakMemory() as peak:
            seconds = median_seconds(update, setting["repeats"])
    finally:
        setattr(weight_sync, "broadcast_bucket", broadcast)  # noqa: B010
    plain = median_seconds(lambda: plain_broadcast(run, fresh=False), 5)
    fresh = median_seconds(lambda: plain_broadcast(run, fresh=True), 5)
    row = {"plain": plain, "fresh": fresh, "way": mode, "bucket": bucket, "mb": nbytes / 1e6, "seconds": seconds}
    return row | {"wire": statistics.median(wire), "extra_mb": peak[0] / 1e6}


def plain_broadcast(run: Any, *, fresh: bool) -> None:
    """The policy's bytes from rank 0 to the others, as one tensor: what the wire alone costs, into memory that is there
    or, as in a server, into memory that is asked for when the bytes come."""
    import torch

    from megatron_rl.parallel.engine_group import broadcast_bucket

    if not hasattr(run, "plain"):
        nbytes = sum(tensor.nbytes for _, tensor in run.policy.hf_weights())
        run.plain = torch.zeros(nbytes, dtype=torch.uint8)
    received = torch.empty_like(run.plain) if fresh and run.groups.rank else run.plain
    broadcast_bucket(received, run.groups.all_ranks.group)


def median_seconds(action: Callable[[], None], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


class PeakMemory:
    """Growth of this process's resident memory (shared memory included) while inside, in bytes: `[0]` afterwards."""

    def __enter__(self) -> list[float]:
        import psutil

        self.result, self._stop = [0.0], threading.Event()
        process = psutil.Process()
        rest = process.memory_info().rss

        def watch() -> None:
            while not self._stop.wait(0.005):
                self.result[0] = max(self.result[0], process.memory_info().rss - rest)

        self._thread = threading.Thread(target=watch, daemon=True)
        self._thread.start()
        return self.result

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


if __name__ == "__main__":
    main()
