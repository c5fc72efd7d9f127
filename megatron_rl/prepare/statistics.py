"""What a problem set is made of, and what preparing it took out: as data, and as a page in Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from megatron_rl.data.rows import Row
from megatron_rl.grading import latex, numerals
from megatron_rl.prepare.clean import spelling_key, text_key

_PERCENTILES = (0, 10, 50, 90, 99, 100)
_EXAMPLES = 3
_PAIRS = 20  # of partial overlap, shown of each set
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
    lines = [f"# {report['output']}", "", "| pass | removed | left |", "|---|---:|---:|"]
    lines += [f"| {step['pass']} | {step['removed']:,} | {step['left']:,} |" for step in report["passes"]]
    lines += _overlap_lines(report) if report["overlap"] else []
    lines += ["", *contents(report["contents"]), "", "## First problems", ""]
    for row in rows[:_EXAMPLES]:
        lines += [f"- **{row.id}** ({row.source}): {' '.join(row.problem.split())} → `{row.answer}`"]
    if report["contradictions"]:
        lines += ["", "## Contradictions", "", "Problems with answers that are not equal; all copies are removed.", ""]
        lines += [
            f"- {' '.join(c['problem'].split())} → `{'` or `'.join(c['answers'])}`" for c in report["contradictions"]
        ]
    return "\n".join(lines) + "\n"


def _overlap_lines(report: dict[str, Any]) -> list[str]:
    lines = ["", "Evaluation problems that training rows contain (these rows are removed: "
             f"{'yes' if report['overlap_removed'] else 'no'}):", "",
             "| evaluation set | problems | same letters and digits | contained | near | training rows | partial |",
             "|---|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    lines += [
        f"| {o['name']} | {o['size']:,} | {o['same']} | {o['contained']} | {o['near']} | {o['training_rows']} "
        f"| {len(o['partial'])} |"
        for o in report["overlap"]
    ]
    lines += [
        "",
        "Partial: 30% or more of the problem's 8-grams of words stand in one training row, but less than half of them, "
        "or beside other numbers; these rows stay.",
        "",
    ]
    for overlap in report["overlap"]:
        pairs = [f"{p['evaluation']} in {p['training']} ({p['shared']:.0%})" for p in overlap["partial"][:_PAIRS]]
        more = len(overlap["partial"]) - len(pairs)
        lines += [f"- {overlap['name']}: {', '.join(pairs)}{f', and {more} more' if more else ''}"] if pairs else []
    return lines


def contents(counts: dict[str, Any]) -> list[str]:
    """Return lines of Markdown on the result of `statistics`."""
    lines = ["| | |", "|---|---|"]
    for name, value in counts.items():
        text = ", ".join(f"{k} {v:,}" for k, v in value.items()) if isinstance(value, dict) else f"{value:,}"
        lines.append(f"| {name.replace('_', ' ')} | {text} |")
    return lines
