"""`megatron-rl convert`: the command line of this package. torch is imported when a command runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from megatron_rl.convert.folders import Progress

app = typer.Typer(no_args_is_help=True, help="Convert between Hugging Face folders and Megatron checkpoints.")

Dtype = Literal["keep", "float32", "bfloat16", "float16"]
_Force = Annotated[bool, typer.Option("--force", help="Replace an existing target once the new one is complete.")]
_Dtype = Annotated[Dtype, typer.Option(help="Of the tensors in the target.")]


@app.command("hf-to-megatron")
def hf_to_megatron(
    source: Annotated[Path, typer.Argument(help="Hugging Face folder", show_default=False)],
    target: Annotated[Path, typer.Argument(help="Megatron checkpoint to write", show_default=False)],
    dtype: _Dtype = "keep",
    force: _Force = False,
) -> None:
    """Write a Megatron checkpoint that loads under any layout. Needs the memory of two parameters, not of the model."""
    from megatron_rl.convert import to_megatron

    with _progress("to Megatron") as progress:
        to_megatron.hf_to_megatron(source, target, dtype=dtype, force=force, progress=progress)
    print(target)


@app.command("megatron-to-hf")
def megatron_to_hf(
    source: Annotated[Path, typer.Argument(help="converted or training checkpoint", show_default=False)],
    target: Annotated[Path, typer.Argument(help="Hugging Face folder to write", show_default=False)],
    dtype: _Dtype = "keep",
    max_shard_size: Annotated[str, typer.Option(help="Of one safetensors file, such as 500MB.")] = "5GB",
    force: _Force = False,
    quantize: Annotated[
        Literal["fp8", "int8"] | None,
        typer.Option(help="fp8: through nvidia-modelopt, holds the model in memory twice. int8: rounds the weights."),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Texts for --quantize fp8: one a line, or JSONL with problem, prompt or text.")
    ] = None,
) -> None:
    """Write a Hugging Face folder from a checkpoint of any layout."""
    if (quantize == "fp8") != (calibration is not None):
        problem = "--quantize fp8 needs texts to calibrate with, and nothing else does"
        raise typer.BadParameter(problem, param_hint="--calibration")
    if calibration is not None:
        from megatron_rl.convert.quantize import fp8_to_hf

        fp8_to_hf(source, target, calibration=calibration, dtype=dtype, force=force)
    elif quantize == "int8":
        from megatron_rl.convert.quantize import int8_to_hf

        int8_to_hf(source, target, dtype=dtype, max_shard_size=max_shard_size, force=force)
    else:
        from megatron_rl.convert import to_hf

        with _progress("to Hugging Face") as progress:
            to_hf.megatron_to_hf(
                source, target, dtype=dtype, max_shard_size=max_shard_size, force=force, progress=progress
            )
    print(target)


@app.command("check")
def check(
    a: Annotated[Path, typer.Argument(help="model folder of either format", show_default=False)],
    b: Annotated[Path, typer.Argument(help="the other", show_default=False)],
    prompt: Annotated[
        str | None, typer.Option(help="Compare float32 logits on this text too; holds one model in memory.")
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Largest accepted |difference| of a logit.")] = 1e-4,
) -> None:
    """Compare names, shapes, dtypes and bits of all tensors. Exit code 1 when something differs."""
    from megatron_rl.convert.check import compare_logits, compare_tensors

    with _progress("compare") as progress:
        found = compare_tensors(a, b, progress)
    for line in found.differences:
        print(f"differs  {line}")
    same = not found.differences
    print(f"tensors  {found.num_tensors} ({found.num_bytes / 1e9:.3g} GB): {_verdict(same, 'bit for bit')}")
    if prompt is not None:
        largest, argmax, tokens = compare_logits(a, b, prompt)
        close = largest <= tolerance
        print(
            f"logits   {tokens} tokens: max |difference| {largest:.3g}, tolerance {tolerance:.3g}, the likeliest token "
            f"{'agrees everywhere' if argmax else 'differs somewhere'}: {_verdict(close, 'within tolerance')}"
        )
        same = same and close
    sys.exit(0 if same else 1)


def _verdict(same: bool, how: str) -> str:
    return f"equal {how}" if same else "DIFFERENT"


@contextmanager
def _progress(what: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (what, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda count, total: bar.update(task, advance=count, total=total)
