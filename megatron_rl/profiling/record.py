"""A profile: a short real training run in a folder of its own, whose steps are recorded on every rank.

The folder holds what a run's folder holds, and `ranks/rank{r}.json` (spans and collectives), `traces/rank{r}.json.gz`
(torch's profiler, for ui.perfetto.dev), on GPUs `memory/rank{r}.pickle` (for pytorch.org/memory_viz), `profile.json`
(the summary) and `profile.html`.
"""

import gzip
import json
import platform
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megatron_rl import device, train
from megatron_rl.config import Config
from megatron_rl.data.tokenizer import build_tokenizer, vocab_size
from megatron_rl.errors import UserError
from megatron_rl.files import write_atomically
from megatron_rl.metrics.jsonl import read_rows
from megatron_rl.metrics.spans import Recorder, from_json, to_json
from megatron_rl.models.architecture import resolve_hf_config
from megatron_rl.models.facts import read_hf_config
from megatron_rl.models.hardware import datasheet_flops
from megatron_rl.parallel.groups import Groups, destroy_groups
from megatron_rl.parallel.traffic import clock_offset, watch_collectives
from megatron_rl.plan.shapes import forward_flops, shape_of
from megatron_rl.policy.build import DTYPES
from megatron_rl.profiling.analysis import RankRecord, Summary, summarise
from megatron_rl.profiling.page import write_page
from megatron_rl.rollout.world import join

_GEMM_SIZE, _GEMM_REPEATS = 1024, 5
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def record(config: Config, *, warmup: int, trace: bool) -> None:
    """Train and record as one rank of the world that torchrun's environment describes.

    `config`: as `profile_config` makes it; its first `warmup` steps (2 at least) are not measured, and the last but one
    of them is traced: writing traces takes the ranks differently long, and they need a step to come together again.
    """
    folder = config.run_dir
    groups = join(config)
    world = groups.all_ranks
    place = f"rank{groups.rank}"
    traced = warmup - 2 if trace else None
    trace_path = folder / "traces" / f"{place}.json.gz"
    recorder = Recorder(range(warmup, config.train.num_steps), watch_collectives, traced=traced, trace_path=trace_path)
    groups.all_ranks.barrier()  # ranks that share cores measure their peak together, as they will work
    if device.ON_GPU:
        peak, peak_source = datasheet_flops(device.name(), bfloat16=config.model.dtype == "bfloat16")
    else:
        peak, peak_source = measured_flops(DTYPES[config.model.dtype])
    offset = clock_offset(world, groups.rank, BOOT_ID.read_text() if BOOT_ID.exists() else platform.node())
    device.record_memory_history()
    train.train(config, groups, recorder)
    device.save_memory_snapshot(folder / "memory" / f"{place}.pickle")
    rank_record = {
        "rank": groups.rank,
        "place": {"tp": groups.tp_rank, "pp": groups.pp_rank, "dp": groups.dp_rank},
        "host": platform.node(),
        "clock_offset": offset,
        "peak_flops": peak,
        "steps": to_json(recorder.records),
    }
    (folder / "ranks").mkdir(exist_ok=True)
    write_atomically(folder / "ranks" / f"{place}.json", json.dumps(rank_record))
    groups.all_ranks.barrier()
    if groups.rank == 0:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # it was saved to be timed
        conclude(config, groups, {"warmup": warmup, "traced_step": traced, "peak_source": peak_source})
    groups.all_ranks.barrier()
    destroy_groups()


def conclude(config: Config, groups: Groups, facts: dict[str, Any]) -> None:
    """Write profile.json and profile.html from the ranks' files."""
    folder = config.run_dir
    ranks = load_ranks(folder)
    if not ranks[0].steps:
        raise UserError("the run was stopped before its first measured step; nothing was measured")
    summary = summarise(ranks, on_gpu=device.ON_GPU)
    add_rates(summary, ranks, config, read_rows(folder / "metrics.jsonl")[0])
    traffic = trace_collectives(folder / "traces" / "rank0.json.gz")
    facts |= {
        "name": config.name,
        "device": device.name(),
        "torch": torch.__version__,
        "processes": groups.world_size,
        "layout": f"tp {groups.tp_size}, pp {groups.pp_size}, dp {groups.dp_size}",
        "on_gpu": device.ON_GPU,
        "trace_collectives": traffic,
    }
    write_atomically(folder / "profile.json", json.dumps({"facts": facts, "summary": asdict(summary)}, indent=1))
    write_page(folder / "profile.html", facts, summary, ranks, (folder / "config.yaml").read_text())


def profile_config(config: Config, folder: Path, *, steps: int, warmup: int) -> Config:
    """Return the config of the profile's run: `warmup + steps` steps from the initial weights into `folder`, no
    evaluation, one checkpoint after the last step where the config would ever save one."""
    train_options = config.train
    saves = bool(train_options.save_every or train_options.save_final or train_options.keep_best)
    changes = {
        "num_steps": warmup + steps,
        "eval_every": 0,
        "save_every": 0,
        "save_final": saves,
        "keep_best": False,
        "save_hf": False,
        "resume": "never",
    }
    run_dir = str(folder).replace("{", "{{").replace("}", "}}")
    logging = config.logging.model_copy(update={"run_dir": run_dir, "tensorboard": False, "wandb_project": None})
    return config.model_copy(update={"train": train_options.model_copy(update=changes), "logging": logging})


def load_ranks(folder: Path) -> list[RankRecord]:
    """Read all ranks' records, by rank. Raises: UserError when the folder is no profile."""
    paths = sorted((folder / "ranks").glob("rank*.json"), key=lambda path: int(path.stem.removeprefix("rank")))
    if not paths:
        raise UserError(f"{folder}: no ranks/rank*.json in it; expected a folder that `megatron-rl profile` wrote")
    rows = [json.loads(path.read_text()) for path in paths]
    return [RankRecord(**{**row, "steps": from_json(row["steps"])}) for row in rows]


def add_rates(summary: Summary, ranks: list[RankRecord], config: Config, metrics: list[dict[str, Any]]) -> None:
    """Add tokens/s and model FLOPs utilisation, from the tokens that the measured steps logged.

    `mfu_*`: FLOPs of the model on the tokens that the trainer computes (a shared prompt once), those of recomputation
    and of selection left out, over seconds * the processes' peak.
    `mfu_step` counts the trainer's passes (old log-probabilities, update) against the whole step's time.
    """
    rows = [row for row in metrics if row["step"] in summary.steps]
    names = ("packing/computed_tokens", "packing/attention_pairs", "batch/sequence_tokens", "batch/response_tokens")
    tokens, pairs, sequences, responses = (sum(row[name] for row in rows) / len(rows) for name in names)
    hf = read_hf_config(config.model)
    hf.setdefault("vocab_size", vocab_size(build_tokenizer(config)))
    forward = tokens * sum(forward_flops(shape_of(resolve_hf_config(hf).to_dict()), pairs / tokens))
    peaks = [rank.peak_flops for rank in ranks]
    summary.peak_flops = peak = None if None in peaks else sum(p for p in peaks if p is not None)
    seconds = {name: cost.seconds for name, cost in summary.phases.items()}

    def mfu(flops: float, seconds: float | None) -> float | None:
        return flops / (seconds * peak) if seconds and peak else None

    generation, passes = seconds.get("rollout"), 4 if config.algorithm.old_logprobs == "recompute" else 3
    summary.rates = {
        "tokens_per_second": sequences / summary.step_seconds,
        "tokens_per_second_per_process": sequences / summary.step_seconds / len(ranks),
        "generated_tokens_per_second": responses / generation if generation else None,
        "model_flops_per_step": passes * forward,
        "mfu_old_logprobs": mfu(forward, seconds.get("old_logprobs")) if passes == 4 else None,
        "mfu_forward_backward": mfu(3 * forward, seconds.get("forward_backward")),
        "mfu_step": mfu(passes * forward, summary.step_seconds),
    }


def trace_collectives(path: Path) -> dict[str, tuple[int, float]]:
    """Return {collective: (events, seconds)} of torch's trace: NCCL's kernels or gloo's work; empty without a trace."""
    if not path.is_file():
        return {}
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    totals: dict[str, tuple[int, float]] = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("ph") == "X" and name.startswith(("ncclDevKernel", "ncclKernel", "gloo:")):
            count, seconds = totals.get(name, (0, 0.0))
            totals[name] = (count + 1, seconds + event["dur"] / 1e6)
    return totals


def measured_flops(dtype: torch.dtype) -> tuple[float, str]:
    """Return the FLOP/s that a CPU process reaches, the best of a few matrix products beside whatever else runs on its
    cores at that moment, and a text that says so."""
    a = torch.ones(_GEMM_SIZE, _GEMM_SIZE, dtype=dtype)
    seconds = []
    for _ in range(_GEMM_REPEATS):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return 2 * _GEMM_SIZE**3 / min(seconds), f"best of {_GEMM_REPEATS} matrix products of {_GEMM_SIZE} rows"
