"""Both layouts, one after the other, in the world that was started, and the answer."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_rl.config import Config, ParallelConfig
from megatron_rl.conform.frozen import frozen_config
from megatron_rl.conform.measure import measure
from megatron_rl.conform.verdicts import KINDS, Verdict, compare
from megatron_rl.convert.disk import remove
from megatron_rl.data import build_tokenizer, vocab_size
from megatron_rl.errors import ConfigError, UserError
from megatron_rl.files import write_atomically
from megatron_rl.models.facts import read_hf_config, require_model
from megatron_rl.parallel.groups import destroy_groups
from megatron_rl.parallel.reduce import Reducer
from megatron_rl.parallel.world import join_smaller_world
from megatron_rl.plan.memory import memory_of
from megatron_rl.plan.shapes import layout_of, shape_of
from megatron_rl.rollout.clocks import waiting_seconds
from megatron_rl.rollout.probe import probe_limit
from megatron_rl.rollout.servers.processes import free_port
from megatron_rl.rollout.world import join
from megatron_rl.run import hardware_of


@dataclass(frozen=True, slots=True)
class Question:
    """What is compared with what."""

    reference: ParallelConfig
    tokens: int  # of the frozen mini-batch, about
    layers: int | None  # None: as many as the reference has room for
    with_engine: bool


def main(config: Config, question: Question, folder: Path) -> None:
    """Answer on the world of the run's layout, of which the reference takes the first ranks; write folder/conform.json.

    Raises: UserError on rank 0 when a verdict fails; ConfigError for a reference that cannot be laid out here.
    """
    require_model(config.model)
    work = folder / "work"
    config = frozen_config(config, question.tokens)
    config = config.model_copy(update={"logging": config.logging.model_copy(update={"run_dir": str(work)})})
    theirs = config.model_copy(update={"parallel": question.reference})
    groups = join(config)
    rank = groups.rank
    if rank == 0:
        remove(work)
    raw = dict(read_hf_config(config.model))
    raw.setdefault("vocab_size", vocab_size(build_tokenizer(config)))
    full = raw["num_hidden_layers"]
    raw["num_hidden_layers"] = _depth(raw, config, theirs, question.layers, groups.all_ranks)
    measure(config, raw, groups, work / "run", asks_engine=question.with_engine)
    port = groups.all_ranks.gather_objects(free_port())[0]
    destroy_groups()
    if rank >= question.reference.processes:
        return
    join_smaller_world(port, rank, question.reference.processes, waiting_seconds(theirs))
    groups = join(theirs)
    # Megatron's checkpoints do not go from experts that are dealt out to others
    loads = (config.parallel.ep > 1) == (question.reference.ep > 1)
    measure(theirs, raw, groups, work / "reference", taken_over=work / "run" if loads else None)
    destroy_groups()
    if rank == 0:
        verdicts = compare(work / "run", work / "reference", config.model.dtype, probe_limit(config))
        remove(work)
        _answer(verdicts, config, question, (raw["num_hidden_layers"], full), folder / "conform.json")


def _depth(raw: dict[str, Any], config: Config, reference: Config, asked: int | None, world: Reducer) -> int:
    """Return the number of layers that both layouts are measured with, the same on every rank.

    Raises: ConfigError when the number asked for does not divide over the stages, UserError when nothing fits.
    """
    unit = math.lcm(*(p.pp * p.vpp for p in (config.parallel, reference.parallel)))
    full = raw["num_hidden_layers"]
    if asked is not None:
        if asked % unit or not 0 < asked <= full:
            raise ConfigError(
                f"--layers {asked}: expected a multiple of {unit}, the pipeline's chunks, up to the model's {full}"
            )
        return asked
    hardware = hardware_of(world)
    for layers in range(full, 0, -unit):
        shape = shape_of(raw | {"num_hidden_layers": layers})
        if memory_of(reference, shape, layout_of(reference), hardware).fits:
            return layers
    raise UserError(f"not even {unit} layers fit the reference layout's ranks; give it more of them, as --against tp=8")


def _answer(verdicts: list[Verdict], config: Config, question: Question, depth: tuple[int, int], path: Path) -> None:
    failed = [verdict for verdict in verdicts if not verdict.is_ok]
    layouts = {"run": config.parallel.model_dump(), "reference": question.reference.model_dump()}
    facts = {
        "ok": not failed,
        "layouts": layouts,
        "layers": depth[0],
        "of_layers": depth[1],
        "dtype": config.model.dtype,
    }
    write_atomically(path, json.dumps(facts | {"verdicts": [v.as_json() for v in verdicts]}, indent=1))
    table = Table(
        title=f"{_spelled(config.parallel)} against {_spelled(question.reference)}, {depth[0]} of {depth[1]} layers"
    )
    for header in ("", "what", "deviation", "allowed", "largest at"):
        table.add_column(header, justify="right" if header in ("deviation", "allowed") else "left")
    for verdict in verdicts:
        mark = "ok" if verdict.is_ok else "FAIL"
        table.add_row(mark, verdict.name, f"{verdict.deviation:.2g}", f"{verdict.tolerance:g}", verdict.place)
    console = Console()
    console.print(table)
    for verdict in failed:
        console.print(f"{verdict.name}: usually {KINDS[verdict.name][2]}", highlight=False)
    console.print(str(path), highlight=False)
    if failed:
        raise UserError(
            f"the layout changes the algorithm: {', '.join(dict.fromkeys(v.name for v in failed))} differ by more than "
            f"rounding explains in {config.model.dtype}"
        )


def _spelled(parallel: ParallelConfig) -> str:
    sizes = {name: getattr(parallel, name) for name in ("tp", "pp", "vpp", "cp", "dp", "ep")}
    shown = [f"{name}{size}" for name, size in sizes.items() if size > 1] + (["sp"] if parallel.sp else [])
    return " ".join(shown) or "one process"
