"""What profiling costs: a run whose steps are recorded and not recorded by turns, on the same processes:
python scripts/bench_profile.py --pairs 20."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WARMUP = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.yaml")
    parser.add_argument("--pairs", type=int, default=20, help="of a recorded and an unrecorded step")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="a.b=c")
    options = parser.parse_args()
    from megatron_rl import launch
    from megatron_rl.config import dump_config, load_config

    if options.worker:
        folder = Path(options.worker)
        launch.run_worker(lambda: work(folder), folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        changes = [f"train.num_steps={WARMUP + 2 * options.pairs}", "train.eval_every=0", "train.save_final=false"]
        changes += ["logging.tensorboard=false", f"logging.run_dir={folder}"]
        config = load_config(options.config, [*options.overrides, *changes])
        (folder / "given.yaml").write_text(dump_config(config))
        load = os.getloadavg()[0]
        command = [sys.executable, __file__, "--worker", str(folder)]
        if code := launch.run_world(command, config.parallel.processes, folder, 10):
            sys.exit(code)
        show(json.loads((folder / "steps.json").read_text()), options.pairs, load)


def show(steps: list[tuple[bool, float, float]], pairs: int, load: float) -> None:
    """`steps`: (recorded, wall seconds, processor seconds) in order; the first of a pair is recorded by turns."""
    couples = [sorted(steps[i : i + 2]) for i in range(0, 2 * pairs, 2)]  # unrecorded first
    print(f"{pairs} pairs of steps, load {load:.1f} before the start and {os.getloadavg()[0]:.1f} at the end")
    for name, column in (("wall", 1), ("processor", 2)):
        off, on = ([couple[i][column] for couple in couples] for i in (0, 1))
        ratios = sorted(b / a for a, b in zip(off, on, strict=True))
        quarter = len(ratios) // 4
        print(
            f"{name}: off {statistics.median(off):.4f} s, on {statistics.median(on):.4f} s a step (medians); ratio of "
            f"a pair: median {statistics.median(ratios):.4f}, middle half {ratios[quarter]:.4f} to "
            f"{ratios[-1 - quarter]:.4f}"
        )


def work(folder: Path) -> None:
    """One rank: train, and time each step from outside of the recorder."""
    from megatron_rl import train
    from megatron_rl.config import load_config
    from megatron_rl.metrics.spans import Recorder
    from megatron_rl.parallel.groups import destroy_groups, init_groups
    from megatron_rl.parallel.traffic import watch_collectives

    config = load_config(folder / "given.yaml")
    count = config.train.num_steps
    # on, off, off, on, on, off, ...: a drift of the machine's load favours neither
    recorded = {step for step in range(WARMUP, count) if (step - WARMUP) % 4 in (0, 3)}
    taken: list[tuple[bool, float, float]] = []

    class Timed(Recorder):
        def steps(self, steps: Iterable[int]) -> Iterator[int]:
            clocks = (time.perf_counter(), time.process_time())
            for step in super().steps(steps):
                yield step
                now = (time.perf_counter(), time.process_time())
                taken.append((step in recorded, now[0] - clocks[0], now[1] - clocks[1]))
                clocks = now

    groups = init_groups(config.parallel, config.seed)
    train.train(config, groups, Timed(recorded, watch_collectives))
    if groups.rank == 0:
        result: Any = taken[WARMUP:]
        (folder / "steps.json").write_text(json.dumps(result))
    groups.all_ranks.barrier()
    destroy_groups()


if __name__ == "__main__":
    main()
