"""`megatron-rl profile CONFIG` and `megatron-rl profile compare A B`."""

import itertools
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from megatron_rl import launch
from megatron_rl.config import load_config
from megatron_rl.config.world import in_world
from megatron_rl.errors import UserError


class _RunByDefault(TyperGroup):
    """Takes a word that names no command as the config of `run`, so that `profile CONFIG` needs no further word."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_RunByDefault,
    no_args_is_help=True,
    help="Where a step's time and memory go: `profile CONFIG [a.b=c]`, or `profile compare A B`.",
)


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="YAML file of the run", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(help="a.b=c", show_default=False)] = None,
    steps: Annotated[int, typer.Option(min=1, help="measured steps")] = 5,
    warmup: Annotated[int, typer.Option(min=2, help="steps before them; the last but one is traced")] = 3,
    trace: Annotated[bool, typer.Option(help="write a trace of torch's profiler, one a rank")] = True,
    out: Annotated[
        Path | None,
        typer.Option(help="folder of the profile; by default RUN_DIR/profile, or -2, -3 ... where that exists"),
    ] = None,
) -> None:
    """Train a few steps as CONFIG says, into a folder of their own, and write down where their time goes."""
    resolved = load_config(config, overrides or [])
    is_rank = launch.is_rank()
    if out is None:
        if is_rank:
            raise UserError("the ranks of a world must agree on the profile's folder: give it with --out")
        out = _free_folder(resolved.run_dir / "profile")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler writes to the terminal
    folder = out

    def work() -> None:
        from megatron_rl.profiling import record  # torch and Megatron: seconds

        profiled = record.profile_config(resolved, folder, steps=steps, warmup=warmup)
        record.record(profiled, warmup=warmup, trace=trace)

    options = ["--steps", str(steps), "--warmup", str(warmup), "--trace" if trace else "--no-trace", "--out", str(out)]
    code = in_world(resolved, out / "profiled.yaml", work, "profile", options)
    if code == 0 and not is_rank:
        from rich.console import Console

        from megatron_rl.profiling.tables import summary_table

        Console().print(summary_table(load_profile(out)))
        print(out / "profile.html")
    sys.exit(code)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="folder that `profile` wrote", show_default=False)],
    second: Annotated[Path, typer.Argument(help="another one", show_default=False)],
) -> None:
    """Show two profiles side by side, phase by phase; ratios above 1 mean that the second took longer."""
    from rich.console import Console

    from megatron_rl.profiling.tables import compare_table

    Console().print(compare_table(load_profile(first), load_profile(second), str(first), str(second)))


def load_profile(folder: Path) -> dict[str, Any]:
    """Return the contents of profile.json. Raises: UserError when the folder holds no finished profile."""
    path = folder / "profile.json"
    if not path.is_file():
        raise UserError(f"{folder}: no profile.json in it; expected a folder that `megatron-rl profile` wrote")
    return json.loads(path.read_text())


def _free_folder(wanted: Path) -> Path:
    names = itertools.chain([wanted], (wanted.with_name(f"{wanted.name}-{i}") for i in itertools.count(2)))
    return next(path for path in names if not path.exists())
