"""`megatron-rl rehearse`: its arguments, and what is printed and kept."""

import json
import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from megatron_rl.config import Config, load_config
from megatron_rl.errors import UserError
from megatron_rl.files import write_atomically
from megatron_rl.models.hardware import HARDWARE
from megatron_rl.rehearse.kept import kept_path

_GPUS = [name for name, hardware in HARDWARE.items() if hardware.flops]


def rehearse(
    config: Annotated[Path, typer.Argument(help="YAML file of the run", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(help="a.b=c", show_default=False)] = None,
    rank: Annotated[int, typer.Option(help="the rank that this process stands for")] = 0,
    ranks: Annotated[str | None, typer.Option(help="all-kinds: a rank of each kind of pipeline stage")] = None,
    full: Annotated[bool, typer.Option("--full", help="all layers; else two shallow models, extrapolated")] = False,
    host: Annotated[bool, typer.Option("--host", help="the host's part of a step, at the true batch")] = False,
    gpu: Annotated[str, typer.Option(help=", ".join(_GPUS))] = "h100",
    output: Annotated[Path | None, typer.Option(help="folder for the whole answer and its page")] = None,
) -> None:
    """Run a step of one rank without a GPU, weights or values, and show its memory, collectives and operations.

    Exit code 1 when a phase does not fit. The verdict is kept beside the config, where `preflight` reads it. With
    --host: collecting, packing, losses and metrics on true numbers, in seconds and memory of this machine.
    """
    if gpu not in _GPUS or ranks not in (None, "all-kinds"):
        raise UserError(
            f"--gpu {gpu}, --ranks {ranks}: expected one of {', '.join(_GPUS)}, and all-kinds or no --ranks"
        )
    resolved = load_config(config, overrides or [])
    if not 0 <= rank < resolved.parallel.processes:
        raise UserError(f"--rank {rank}: the run has the ranks 0 to {resolved.parallel.processes - 1}")
    if ranks and rank:
        raise UserError(f"--rank {rank} is one rank, and --ranks {ranks} are several: leave one of them out")
    if host and (full or ranks):
        raise UserError("--host looks at the host of one rank, at the true batch: leave out --full and --ranks")
    if host:
        _host(resolved, rank, output)
        return
    os.environ["MEGATRON_RL_DEVICE"] = f"rehearsal:{int(HARDWARE[gpu].memory)}"  # read when torch comes
    warnings.simplefilter("ignore")  # Megatron's and torch's, about what is not there
    from megatron_rl.rehearse.result import answer, tables, verdict_text, write
    from megatron_rl.rehearse.run import kinds_of_ranks
    from megatron_rl.rehearse.run import rehearse as run

    chosen = kinds_of_ranks(resolved) if ranks else [rank]
    found = answer(resolved, HARDWARE[gpu], [run(resolved, each, full=full) for each in chosen])
    if output is not None:
        write(found, output)
    write_atomically(kept_path(config), json.dumps({k: v for k, v in found.items() if k != "ranks"}, indent=1))
    console = Console()
    for each in found["ranks"]:
        for what, rows in tables(each["phases"], 3).items():
            console.print(_table(rows, f"{resolved.name}, rank {each['rank']}: {what}"))
    for text in (*(f"not seen: {text}" for text in found["unseen"]), verdict_text(found), kept_path(config)):
        console.print(str(text), highlight=False)
    sys.exit(0 if found["fits"] else 1)


def _host(config: Config, rank: int, output: Path | None) -> None:
    os.environ["MEGATRON_RL_DEVICE"] = "cpu"
    from megatron_rl.rehearse.host import rehearse_host

    book, console = rehearse_host(config, rank), Console()
    console.print(_table(book.rows(), f"{config.name}, rank {rank}: the host's part of a step"))
    facts = (f"{name.replace('_', ' ')}: {value}" for name, value in book.facts.items())
    for text in (", ".join(facts), *(f"left out: {text}" for text in book.left_out)):
        console.print(text, highlight=False)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / "host.json", json.dumps(asdict(book), indent=1))


def _table(rows: list[list[str]], title: str) -> Table:
    table = Table(*rows[0], title=title, title_justify="left")
    for row in rows[1:]:
        table.add_row(*row)
    return table
