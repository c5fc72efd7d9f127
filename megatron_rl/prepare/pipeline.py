"""From sources to one clean file: duplicates, contradictions, overlap, length; the same result every time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.files import write_atomically
from megatron_rl.prepare import clean
from megatron_rl.prepare.presets import PRESETS
from megatron_rl.prepare.rows import PrepareError, Row, read, write
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
    """The rows of PRESET=FILE, FILE, or (from the hub) PRESET. Raises: PrepareError."""
    name, separator, file = source.partition("=")
    if not separator and name not in PRESETS:
        name, file = "plain", source
    if name not in PRESETS:
        raise PrepareError(f"{source}: no preset {name!r}; known are {', '.join(PRESETS)}")
    return read(
        Path(file).stem if name == "plain" else name, PRESETS[name], Path(file) if file else None, download=download
    )


def prepare(sources: Sequence[str], out: Path, against: Sequence[str], options: Options) -> dict[str, Any]:
    """Write `out` (JSON lines), and beside it the report as .stats.json and .stats.md; returns the report.

    Raises: PrepareError when a source cannot be read, a tokenizer is missing, or nothing is left.
    """
    if options.max_prompt_tokens is not None and options.tokenizer is None:
        raise PrepareError("--max-prompt-tokens needs --tokenizer, the folder of the model's tokenizer")
    evaluations = [(Path(s.partition("=")[2] or s).stem, read_source(s, download=options.download)) for s in against]
    rows = [row for source in sources for row in read_source(source, download=options.download)]
    steps = [{"pass": "read", "removed": 0, "left": len(rows)}]

    def left(name: str, kept: list[Row]) -> list[Row]:
        steps.append({"pass": name, "removed": steps[-1]["left"] - len(kept), "left": len(kept)})  # type: ignore[operator]
        return kept

    unique = len({clean.text_key(row) for row in rows})
    rows, by_text = clean.remove_repeated(rows, clean.text_key)
    steps.append({"pass": "same text", "removed": steps[0]["left"] - unique, "left": unique})  # type: ignore[operator]
    left("same text, different answers", rows)
    by_spelling = clean.Removed((), (), 0)
    near: tuple[Row, ...] = ()
    if options.near:
        rows, by_spelling = clean.remove_repeated(rows, clean.spelling_key)
        left("same spelling (or then different answers)", rows)
        rows, near = clean.remove_near(rows, options.near)
        left(f"near, {options.near:g} of the word triples", rows)
    index = clean.Index(rows, options.near)
    overlaps = [index.overlap(name, evaluation) for name, evaluation in evaluations]
    if options.remove_overlap and overlaps:
        leaked = frozenset[int]().union(*(found.training for found in overlaps))
        rows = left("in an evaluation set", [row for i, row in enumerate(rows) if i not in leaked])
    lengths = None
    if options.tokenizer is not None:
        rows, lengths = _within(rows, options.tokenizer, options.max_prompt_tokens)
        left("too long", rows)
    if not rows:
        raise PrepareError(f"nothing is left of {', '.join(sources)}")
    report = {
        "output": out.name,
        "sources": list(sources),
        "passes": steps,
        "unique_texts": unique,
        "contradictory_texts": by_text.contradictory_problems,
        "contradictory_spellings": by_spelling.contradictory_problems,
        "near_duplicates": len(near),
        "contradictions": _contradictions((*by_text.contradictory, *by_spelling.contradictory)),
        "overlap": [
            {"name": o.name, "size": o.size, "same": len(o.same), "near": len(o.near), "training_rows": len(o.training)}
            for o in overlaps
        ],
        "overlap_removed": options.remove_overlap,
        "contents": statistics(rows, lengths),
    }
    write(out, rows)
    write_atomically(out.with_suffix(".stats.json"), json.dumps(report, indent=1, ensure_ascii=False))
    write_atomically(out.with_suffix(".stats.md"), page(report, rows))
    return report


def _contradictions(rows: Sequence[Row]) -> list[dict[str, Any]]:
    answers: dict[str, list[Row]] = {}
    for row in rows:
        answers.setdefault(clean.spelling_key(row), []).append(row)
    return [
        {"problem": same[0].problem, "answers": list(dict.fromkeys(row.answer for row in same))}
        for same in answers.values()
    ]


def prompt_lengths(rows: Sequence[Row], folder: Path) -> list[int]:
    """Tokens of each prompt under the chat template of a tokenizer folder. Raises: DataError without a tokenizer."""
    from megatron_rl.data import encode_prompt, pretrained_tokenizer

    tokenizer = pretrained_tokenizer(folder)
    return [len(encode_prompt(row.prompt, row.system, tokenizer)) for row in rows]


def _within(rows: list[Row], folder: Path, limit: int | None) -> tuple[list[Row], list[int]]:
    pairs = list(zip(rows, prompt_lengths(rows, folder), strict=True))
    if limit is not None:
        pairs = [(row, length) for row, length in pairs if length <= limit]
    return [row for row, _ in pairs], [length for _, length in pairs]
