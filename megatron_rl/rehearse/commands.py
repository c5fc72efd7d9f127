"""`megatron-rl rehearse`: its arguments, and what is printed and kept."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from megatron_rl.config import load_config
from megatron_rl.errors import UserError
from megatron_rl.files import write_atomically
from megatron_rl.models.hardware import HARDWARE

_GPUS = [name for name, hardware in HARDWARE.items() if hardware.flops]


def rehearse(
    config: Annotated[Path, typer.Argument(help="YAML file of the run", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(help="a.b=c", show_default=False)] = None,
    rank: Annotated[int, typer.Option(help="the rank that this process stands for")] = 0,
    ranks: Annotated[str | None, typer.Option(help="all-kinds: a rank of each kind of pipeline stage")] = None,
    full: Annotated[bool, typer.Option("--full", help="all layers; else two shallow models, extrapolated")] = False,
    gpu: Annotated[str, typer.Option(help=", ".join(_GPUS))] = "h100",
    output: Annotated[
        Path | None, typer.Option(help="folder of the whole answer; by default RUN_DIR/rehearsal", show_default=False)
    ] = None,
) -> None:
    """Run a step of one rank without a GPU, weights or values, and show its memory, collectives and operations.

    Exit code 1 when a phase does not fit. The verdict is kept beside the config, where `preflight` reads it.
    """
    if gpu not in _GPUS:
        raise UserError(f"--gpu {gpu}: expected one of {', '.join(_GPUS)}")
    if ranks not in (None, "all-kinds"):
        raise UserError(f"--ranks {ranks}: expected all-kinds; a single one is --rank R")
    hardware = HARDWARE[gpu]
    os.environ["MEGATRON_RL_DEVICE"] = f"rehearsal:{int(hardware.memory)}"  # before anything imports torch
    warnings.simplefilter("ignore")  # of Megatron's and torch's, on what is not there
    resolved = load_config(config, overrides or [])
    from megatron_rl.rehearse.result import answer, detail_rows, memory_rows, verdict_text, write
    from megatron_rl.rehearse.run import kinds_of_ranks
    from megatron_rl.rehearse.run import rehearse as run

    chosen = kinds_of_ranks(resolved) if ranks else [rank]
    found = answer(resolved, hardware, [run(resolved, each, full=full) for each in chosen])
    folder = output or resolved.run_dir / "rehearsal"
    folder.mkdir(parents=True, exist_ok=True)
    write(found, folder)
    kept = {name: value for name, value in found.items() if name != "ranks"}
    write_atomically(kept_path(config), json.dumps(kept, indent=1))
    console = Console()
    for each in found["ranks"]:
        title = f"{resolved.name}, rank {each['rank']}: memory at the peak of each phase, GiB"
        console.print(_table(title, memory_rows(each["phases"])))
        for title, rows in detail_rows(each["phases"], 3).items():
            console.print(_table(title, rows))
    for text in found["unseen"]:
        console.print(f"not seen: {text}", highlight=False)
    console.print(verdict_text(found), highlight=False)
    console.print(f"{folder / 'rehearsal.html'}; the verdict: {kept_path(config)}", highlight=False)
    sys.exit(0 if found["fits"] else 1)


def kept_path(config: Path) -> Path:
    """Return where the verdict on a config file is kept."""
    return config.with_name(f"{config.stem}.rehearsal.json")


def _table(title: str, rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for header in rows[0]:
        table.add_column(header, justify="left", overflow="fold")
    for row in rows[1:]:
        table.add_row(*row)
    return table
