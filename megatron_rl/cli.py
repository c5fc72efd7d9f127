"""The command line: `megatron-rl --help` lists the commands.

What is slow to import (torch, Megatron) is imported where it is needed: `--help` and the plan of `--check`
answer at once.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from megatron_rl import launch
from megatron_rl.config import Config, dump_config, load_config
from megatron_rl.config.environment import for_libraries
from megatron_rl.conform.commands import conform
from megatron_rl.convert.commands import app as convert_app
from megatron_rl.errors import ConfigError, UserError
from megatron_rl.eval.commands import evaluate
from megatron_rl.files import refusal, write_atomically
from megatron_rl.lab.commands import shadow
from megatron_rl.plan.command import PlanCommand, plan
from megatron_rl.preflight.run import preflight
from megatron_rl.prepare.commands import app as data_app
from megatron_rl.profiling.commands import app as profile_app
from megatron_rl.rehearse.commands import rehearse

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Reinforcement learning on Megatron-Core.",
)
app.add_typer(convert_app, name="convert")
app.command()(shadow)
app.add_typer(profile_app, name="profile")
app.command()(preflight)
app.command()(rehearse)
app.command()(conform)
app.add_typer(data_app, name="data")
app.command(cls=PlanCommand)(plan)
app.command("eval")(evaluate)

REPORT_SECONDS = 5  # between the rewrites of a live page


def main(command: Callable[[], None] | None = None) -> None:
    """Run the command line, or another command that reports errors its way.

    What the user can mend ends in a message and a code (2: the config, 1: the rest, a full disk or a folder without
    permission among it).
    """
    sys.argv[1:] = map(_expand_home, sys.argv[1:])
    try:
        (command or app)()
    except ConfigError as error:
        _fail(error, 2)
    except UserError as error:
        _fail(error, 1)
    except OSError as error:
        if (reason := refusal(error)) is None:
            raise
        _fail(reason, 1)


def _expand_home(argument: str) -> str:
    """Return --out=~/x as the shell would expand `--out ~/x`: it leaves a `~` behind `=` alone."""
    option, separator, path = argument.partition("=")
    is_home = option.startswith("--") and path.startswith("~/")
    return option + separator + os.path.expanduser(path) if is_home else argument


def _fail(error: UserError, code: int) -> None:
    launch.say(f"error: {error}", error=True)
    sys.exit(code)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the run", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="a.b=c, for example loss.select_fraction=0.1", show_default=False)
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Validate, print the plan and the first prompt, and exit.")
    ] = False,
) -> None:
    """Train a policy. Starts its own processes, unless torchrun or Slurm did (RANK and WORLD_SIZE are set)."""
    resolved = load_config(config, overrides or [])
    if check:
        from rich.console import Console

        from megatron_rl.config.checks import run_notes
        from megatron_rl.plan.check import check_table, plan_rows, preview_rows

        console = Console()
        console.print(check_table(f"plan of {resolved.name}", plan_rows(resolved)))
        for note in run_notes(resolved):
            console.print(f"note: {note}", highlight=False)
        if resolved.data.type != "countdown":  # its prompts are no one's to get wrong
            console.print(check_table("what the policy is asked", preview_rows(resolved)))
        return
    sys.exit(run_training(resolved))


@app.command()
def report(
    run_dirs: Annotated[
        list[Path], typer.Argument(help="run folders to compare", metavar="RUN_DIR...", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="the page to write; by default report.html in the run's folder, or beside several"),
    ] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Wait for the runs, and rewrite the page while they go on, until Ctrl-C.")
    ] = False,
) -> None:
    """Write one self-contained HTML page on one or more runs."""
    from megatron_rl.report import build_report, keep_current

    if live:
        keep_current(run_dirs, out, REPORT_SECONDS)
    else:
        launch.say(str(build_report(run_dirs, out)))


def run_training(config: Config) -> int:
    """Train with a resolved config: as this rank inside a world, else as the parent of a new one.

    Returns: the exit code.
    Raises: UserError when this world is not the config's, or another run holds the folder.
    """
    path = config.run_dir / "config.yaml"

    def work() -> None:
        from megatron_rl import train  # torch and Megatron: seconds

        train.main(config)

    return launch.in_world(
        work,
        ["train", str(path)],
        config.run_dir,
        processes=config.parallel.processes,
        grace_seconds=config.train.grace_seconds,
        prepare=lambda: write_atomically(path, dump_config(config)),
        environment=for_libraries(config),
    )
