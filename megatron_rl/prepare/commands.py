"""`megatron-rl data`: the command line of this package."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Prepare and inspect problem sets.")

_Source = Annotated[
    list[str],
    typer.Argument(
        help="PRESET=FILE, FILE (.jsonl, .json, .parquet), or a PRESET alone with --download; presets: dapo_math_17k, "
        "math, gsm8k, aime24, aime25, amc, math500, olympiadbench, minerva, omni_math, gsm8k_test, plain",
        metavar="SOURCE...",
        show_default=False,
    ),
]
_Tokenizer = Annotated[Path | None, typer.Option(help="Tokenizer folder, to count the prompts' tokens.")]
_Download = Annotated[bool, typer.Option("--download", help="Fetch presets without a file from the Hugging Face hub.")]


@app.command("prepare")
def prepare(
    sources: _Source,
    out: Annotated[Path, typer.Option(help="The file to write; its report goes beside it.", show_default=False)],
    against: Annotated[
        list[str] | None, typer.Option(help="Evaluation set, as a source; may be repeated.", show_default=False)
    ] = None,
    keep_overlap: Annotated[bool, typer.Option("--keep-overlap", help="Report overlap, and leave it in.")] = False,
    near: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of word triples, or of 8-grams, that is near; 0: same texts only."),
    ] = 0.8,
    tokenizer: _Tokenizer = None,
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Drop longer prompts.")] = None,
    download: _Download = False,
) -> None:
    """Clean problem sets into one file for training: duplicates, contradictions, overlap with evaluation, length."""
    from megatron_rl.prepare.pipeline import Options
    from megatron_rl.prepare.pipeline import prepare as run

    options = Options(near, not keep_overlap, max_prompt_tokens, tokenizer, download)
    report = run(sources, out, against or [], options)
    for step in report["passes"]:
        print(f"{step['pass']:<45}{-step['removed']:>9,}{step['left']:>9,}")
    for found in report["overlap"]:
        print(
            f"overlap with {found['name']}, of {found['size']}: {found['same']} the same, "
            f"{found['contained']} contained, {found['near']} near; {len(found['partial'])} in part, which stay"
        )
    if report["renamed_ids"]:
        print(f"ids of another row, which got a number behind them: {report['renamed_ids']}")
    print(f"{out}\n{out.with_suffix('.stats.md')}")


@app.command("inspect")
def inspect(
    sources: _Source,
    show: Annotated[int, typer.Option(min=0, help="Prompts to print of each source.")] = 1,
    tokenizer: _Tokenizer = None,
    download: _Download = False,
) -> None:
    """Tell what problem sets contain, and how they will be asked. Writes nothing."""
    from megatron_rl.prepare.clean import comparing_answers, remove_repeated, text_key
    from megatron_rl.prepare.pipeline import prompt_lengths, read_source
    from megatron_rl.prepare.statistics import contents, statistics

    for source in sources:
        rows = read_source(source, download=download)
        lengths = prompt_lengths(rows, tokenizer) if tokenizer else None
        with comparing_answers() as agree:
            _, removed = remove_repeated([row for row in rows if row.answer], text_key, agree)
        counts = statistics(rows, lengths) | {"contradictory_texts": removed.contradictory_problems}
        print("\n".join([source, *contents(counts), ""]))
        for row in rows[:show]:
            said = [("system", row.system or "none"), *((t["role"], t["content"]) for t in row.turns)]
            asked = "\n".join(f"{role}: {content}" for role, content in said)
            print(f"{row.id} ({row.source}), {asked}\n{row.prompt}\n-> {row.answer or 'no boxed answer'}\n")
