"""From sources to one clean file: duplicates, contradictions, overlap, length; the same result every time."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.data.rows import Row
from megatron_rl.errors import DataError
from megatron_rl.files import refusal, write_atomically
from megatron_rl.prepare import clean
from megatron_rl.prepare.overlap import Overlap, find_overlaps
from megatron_rl.prepare.presets import PRESETS
from megatron_rl.prepare.rows import read, with_unique_ids, write
from megatron_rl.prepare.statistics import page, statistics


@dataclass(frozen=True)
class Options:
    """What to do; the defaults clean a training set."""

    near: float = 0.8  # Jaccard threshold of near duplicates; 0: only texts and spellings are compared
    remove_overlap: bool = True
    max_prompt_tokens: int | None = None  # needs a tokenizer
    tokenizer: Path | None = None
    download: bool = False


def read_source(source: str, *, download: bool) -> list[Row]:
    """Return the rows of PRESET=FILE, FILE, or (from the hub) PRESET. Raises: DataError."""
    name, separator, file = source.partition("=")
    if name not in PRESETS and (not separator or Path(source).is_file()):
        name, file = "plain", source
    if name not in PRESETS:
        raise DataError(f"{source}: no preset {name!r}; known are {', '.join(PRESETS)}")
    return read(
        Path(file).stem if name == "plain" else name, PRESETS[name], Path(file) if file else None, download=download
    )


def prepare(sources: Sequence[str], out: Path, against: Sequence[str], options: Options) -> dict[str, Any]:
    """Write `out` (JSON lines), and beside it the report as .stats.json and .stats.md; return the report.

    Raises: DataError for an unreadable source, a missing tokenizer, or no row left; UserError for an unwritable `out`.
    """
    if options.max_prompt_tokens is not None and options.tokenizer is None:
        raise DataError("--max-prompt-tokens needs --tokenizer, the folder of the model's tokenizer")
    if os.path.isdir(out):  # unlike Path.is_dir it takes names that are too long
        raise DataError(f"--out {out} is a folder; name the file to write in it")
    evaluations = [(Path(s.partition("=")[2] or s).stem, read_source(s, download=options.download)) for s in against]
    rows = [row for source in sources for row in read_source(source, download=options.download)]
    steps: list[dict[str, Any]] = [{"pass": "read", "removed": 0, "left": len(rows)}]

    def left(name: str, count: int) -> None:
        steps.append({"pass": name, "removed": steps[-1]["left"] - count, "left": count})

    answered = [row for row in rows if row.answer]
    unanswered = len(rows) - len(answered)
    left("solution without a boxed answer", len(answered))
    rows, removed, counts = _distinct(answered, options.near, left)
    overlaps = find_overlaps(rows, evaluations, options.near)
    report_overlap = [_overlap_report(o, rows, dict(evaluations)[o.name]) for o in overlaps]
    if options.remove_overlap and overlaps:
        leaked = frozenset[int]().union(*(overlap.training for overlap in overlaps))
        rows = [row for i, row in enumerate(rows) if i not in leaked]
        left("in an evaluation set", len(rows))
    lengths = None
    if options.tokenizer is not None:
        rows, lengths = _within(rows, options.tokenizer, options.max_prompt_tokens)
        left("too long", len(rows))
    if not rows:
        taken = "; ".join(f"{step['pass']}: {step['removed']}" for step in steps if step["removed"])
        raise DataError(f"nothing is left of {', '.join(sources)} (removed: {taken})")
    rows, renamed = with_unique_ids(rows)
    report = {
        "output": out.name,
        "sources": list(sources),
        "passes": steps,
        "unanswered": unanswered,
        "renamed_ids": renamed,
        **counts,
        "contradictions": _contradictions(removed),
        "overlap": report_overlap,
        "overlap_removed": options.remove_overlap,
        "contents": statistics(rows, lengths),
    }
    try:
        write(out, rows)
        write_atomically(out.with_suffix(".stats.json"), json.dumps(report, indent=1, ensure_ascii=False))
        write_atomically(out.with_suffix(".stats.md"), page(report, rows))
    except OSError as error:
        raise refusal(error) or DataError(f"--out {out} cannot be written: {error}; name another file") from error
    return report


def _distinct(
    rows: list[Row], threshold: float, left: Callable[[str, int], None]
) -> tuple[list[Row], tuple[Row, ...], dict[str, int]]:
    """Return (the rows without duplicates and contradictions, the contradictory rows, counts for the report). `left`
    notes how many rows a pass leaves."""
    unique = len({clean.text_key(row) for row in rows})
    left("same text", unique)
    with clean.comparing_answers() as agree:
        rows, by_text = clean.remove_repeated(rows, clean.text_key, agree)
        left("same text, different answers", len(rows))
        counts = {"unique_texts": unique, "contradictory_texts": by_text.contradictory_problems}
        if not threshold:
            return rows, by_text.contradictory, counts | {"contradictory_spellings": 0, "near_duplicates": 0}
        # other spellings of a problem with contradictory answers go with it
        known = {clean.spelling_key(row) for row in by_text.contradictory}
        rows, by_spelling = clean.remove_repeated(rows, clean.spelling_key, agree, known)
    left("same spelling (or then different answers)", len(rows))
    rows, near = clean.remove_near(rows, threshold)
    left(f"near, {threshold:g} of the word triples", len(rows))
    counts |= {"contradictory_spellings": by_spelling.contradictory_problems, "near_duplicates": len(near)}
    return rows, (*by_text.contradictory, *by_spelling.contradictory), counts


def _overlap_report(overlap: Overlap, rows: Sequence[Row], evaluation: Sequence[Row]) -> dict[str, Any]:
    degrees = {name: len(getattr(overlap, name)) for name in ("same", "contained", "near")}
    partial = [
        {"evaluation": evaluation[i].id, "training": rows[j].id, "shared": round(share, 3)}
        for i, (j, share) in overlap.partial.items()
        if j not in overlap.training
    ]
    return {
        "name": overlap.name,
        "size": overlap.size,
        **degrees,
        "training_rows": len(overlap.training),
        "partial": sorted(partial, key=lambda pair: -pair["shared"]),
    }


def _contradictions(rows: Sequence[Row]) -> list[dict[str, Any]]:
    answers: dict[str, list[Row]] = {}
    for row in rows:
        answers.setdefault(clean.spelling_key(row), []).append(row)
    return [
        {"problem": same[0].problem, "answers": list(dict.fromkeys(row.answer for row in same))}
        for same in answers.values()
    ]


def prompt_lengths(rows: Sequence[Row], folder: Path) -> list[int]:
    """Return the tokens of each prompt under the chat template of a tokenizer folder. Raises: DataError without one."""
    from megatron_rl.data.tokenizer import encode_prompt, pretrained_tokenizer

    tokenizer = pretrained_tokenizer(folder)
    return [len(encode_prompt(row.prompt, row.system, tokenizer, row.turns, f"row {row.id}")) for row in rows]


def _within(rows: list[Row], folder: Path, limit: int | None) -> tuple[list[Row], list[int]]:
    pairs = list(zip(rows, prompt_lengths(rows, folder), strict=True))
    if limit is not None:
        pairs = [(row, length) for row, length in pairs if length <= limit]
    return [row for row, _ in pairs], [length for _, length in pairs]
