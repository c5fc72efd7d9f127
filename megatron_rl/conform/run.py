"""Both layouts, one after the other, in the world that was started, and the answer."""

import gc
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_rl import device
from megatron_rl.config import Config, ParallelConfig
from megatron_rl.config.megatron_options import chunk_layers
from megatron_rl.conform.frozen import frozen_config
from megatron_rl.conform.measure import measure
from megatron_rl.conform.verdicts import KINDS, Verdict, compare
from megatron_rl.convert.disk import remove
from megatron_rl.data.tokenizer import build_tokenizer, vocab_size
from megatron_rl.errors import ConfigError, UserError
from megatron_rl.files import write_atomically
from megatron_rl.models.facts import read_hf_config
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

    reference: Config  # of other sections than `parallel` and `model` nothing is taken
    tokens: int  # of the frozen mini-batch, about
    layers: int | None  # None: as many as the reference has room for
    with_engine: bool


def main(config: Config, question: Question, folder: Path) -> None:
    """Answer on the world of the run's layout, of which the reference takes the first ranks; write folder/conform.json.

    Raises: UserError on rank 0 when a verdict fails; ConfigError for a reference that cannot be laid out here.
    """
    work = folder / "work"
    config = frozen_config(config, question.tokens, question.reference.parallel.token_multiple)
    config = config.model_copy(update={"logging": config.logging.model_copy(update={"run_dir": str(work)})})
    theirs = config.model_copy(update={name: getattr(question.reference, name) for name in ("parallel", "model")})
    groups = join(config)
    rank = groups.rank
    if rank == 0:
        remove(work)
    raw = dict(read_hf_config(config.model))
    raw.setdefault("vocab_size", vocab_size(build_tokenizer(config)))
    full = raw["num_hidden_layers"]
    raw = _first_layers(raw, _depth(raw, config, theirs, question.layers, groups.all_ranks))
    run, reference = work / "run", work / "reference"
    measure(config, raw, groups, run, asks_engine=question.with_engine, resumes=run)
    port = groups.all_ranks.gather_objects(free_port())[0]
    _leave()
    if rank >= theirs.parallel.processes:
        return
    join_smaller_world(port, rank, theirs.parallel.processes, waiting_seconds(theirs))
    groups = join(theirs)
    # Megatron's checkpoints do not go from experts that are dealt out to others
    loads = (config.parallel.ep > 1) == (theirs.parallel.ep > 1)
    measure(theirs, raw, groups, reference, resumes=run if loads else None)
    _leave()
    if rank == 0:
        verdicts = compare(run, reference, config.model.dtype, probe_limit(config))
        remove(work)
        _answer(verdicts, config, question, (raw["num_hidden_layers"], full), folder / "conform.json")


def _leave() -> None:
    """Leave a layout's world, and free its model, which refers to itself, and the threads of its groups."""
    destroy_groups()
    gc.collect()
    device.give_back_memory()


def _depth(raw: dict[str, Any], config: Config, reference: Config, asked: int | None, world: Reducer) -> int:
    """Return the number of layers that both layouts are measured with, the same on every rank.

    Raises: ConfigError when the number asked for cannot be dealt to the stages, UserError when nothing fits.
    """
    full = raw["num_hidden_layers"]
    depths = [n for n in range(1, full + 1) if all(_can_deal(n, each) for each in (config, reference))]
    if asked is not None:
        if asked not in depths:
            raise ConfigError(f"--layers {asked}: the pipeline stages of both layouts can have {depths}")
        return asked
    hardware = hardware_of(world)
    for layers in reversed(depths):
        if memory_of(reference, shape_of(_first_layers(raw, layers)), layout_of(reference), hardware).fits:
            return layers
    raise UserError(
        f"not even {depths[0]} of {full} layers fit the reference layout's ranks; give it more of them, as --against "
        "tp=8, or lower train.micro_batch_tokens"
    )


def _can_deal(layers: int, config: Config) -> bool:
    chunks = chunk_layers(layers, config.parallel, config.model.megatron)
    fewest = config.model.recompute_layers or 1
    return min(map(min, chunks)) >= fewest and sum(map(sum, chunks)) == layers


def _first_layers(raw: dict[str, Any], layers: int) -> dict[str, Any]:
    kinds = {"layer_types": raw["layer_types"][:layers]} if raw.get("layer_types") else {}
    return raw | {"num_hidden_layers": layers} | kinds


def _answer(verdicts: list[Verdict], config: Config, question: Question, depth: tuple[int, int], path: Path) -> None:
    failed = [verdict for verdict in verdicts if not verdict.is_ok]
    reference, (layers, full) = question.reference.parallel, depth
    layouts = {"run": config.parallel.model_dump(), "reference": reference.model_dump()}
    facts = {"ok": not failed, "layouts": layouts, "layers": layers, "of_layers": full, "dtype": config.model.dtype}
    write_atomically(path, json.dumps(facts | {"verdicts": [v.as_json() for v in verdicts]}, indent=1))
    reason = "" if layers == full or question.layers else ", which is what the reference has room for"
    title = f"{_spelled(config.parallel)} against {_spelled(reference)}, {layers} of {full} layers{reason}"
    table = Table(title=title)
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
