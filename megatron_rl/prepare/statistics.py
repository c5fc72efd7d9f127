"""What a problem set is made of, and what preparing it took out: as data, and as a page in Markdown."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from megatron_rl.data.rows import Row
from megatron_rl.grading import latex, numerals
from megatron_rl.prepare.clean import spelling_key, text_key

_PERCENTILES = (0, 10, 50, 90, 99, 100)
_EXAMPLES = 3
_LONG_ANSWER = 1000  # characters


def statistics(rows: Sequence[Row], lengths: Sequence[int] | None = None) -> dict[str, Any]:
    """Return counts of rows, unique problems, sources and kinds of answers, and percentiles of lengths: in characters,
    and of `lengths` in tokens when the prompts were encoded."""
    return {
        "rows": len(rows),
        "unique_texts": len({text_key(row) for row in rows}),
        "unique_spellings": len({spelling_key(row) for row in rows}),
        "sources": dict(Counter(row.source for row in rows).most_common()),
        "answers": dict(Counter(answer_kind(row.answer) for row in rows).most_common()),
        "problem_characters": _percentiles([len(row.problem) for row in rows]),
        "answer_characters": _percentiles([len(row.answer) for row in rows]),
        **({"prompt_tokens": _percentiles(lengths)} if lengths else {}),
    }


def answer_kind(answer: str) -> str:
    """Return what an answer is: an integer, a fraction, a list, an expression, words, or too long to be told."""
    if not answer:
        return "none"
    if len(answer) > _LONG_ANSWER:
        return f"over {_LONG_ANSWER} characters"
    text = latex.clean(answer)
    number = numerals.number(latex.without_degrees(text))
    if number is not None:
        return number.form
    found = latex.parts(text)
    if found.opening or len(found.items) > 1:
        return "list, tuple or interval"
    return "expression" if any(character in text for character in "\\^+-*/=_0123456789") else "words or letter"


def _percentiles(values: Sequence[int]) -> dict[str, int]:
    ordered = sorted(values)
    return {f"p{p}": ordered[round(p / 100 * (len(ordered) - 1))] for p in _PERCENTILES} if ordered else {}


def page(report: dict[str, Any], rows: Sequence[Row]) -> str:
    """Return the page on a prepared set: what each pass removed, overlaps, contents, and the first problems."""
    folder = Path(__file__).parent / "assets"
    pages = Environment(loader=FileSystemLoader(folder), trim_blocks=True, keep_trailing_newline=True)
    parts = report | {"rows": rows[:_EXAMPLES], "contents": contents(report["contents"])}
    return pages.get_template("stats.md").render(parts)


def contents(counts: dict[str, Any]) -> list[str]:
    """Return lines of Markdown on the result of `statistics`."""
    lines = ["| | |", "|---|---|"]
    for name, value in counts.items():
        text = ", ".join(f"{k} {v:,}" for k, v in value.items()) if isinstance(value, dict) else f"{value:,}"
        lines.append(f"| {name.replace('_', ' ')} | {text} |")
    return lines
