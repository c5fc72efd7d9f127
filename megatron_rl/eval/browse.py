"""The samples as pages that need no network: one per set, and an index with the tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from megatron_rl.eval.table import Table
from megatron_rl.files import write_atomically
from megatron_rl.metrics.jsonl import read_rows
from megatron_rl.report.page import ASSETS as REPORT_ASSETS
from megatron_rl.report.page import CONTENT_POLICY

ASSETS = Path(__file__).parent / "assets"
CHOICES = {
    "all": "all problems",
    "wrong": "with a wrong sample",
    "right": "with a right sample",
    "mixed": "with right and wrong samples",
    "cut": "with a sample that was cut",
    "unboxed": "with a sample without box",
    "failed": "whose grading failed",
}


def write_pages(folder: Path, table: Table, sets: Sequence[tuple[str, Path]]) -> None:
    """Write index.html, and browse.html in the folder of each (title, folder) with problems.jsonl and samples.jsonl."""
    links = []
    for title, path in sets:
        write_atomically(path / "browse.html", _browser(title, path))
        href = escape(path.relative_to(folder).as_posix(), quote=True)
        links.append(f'<li><a href="{href}/browse.html">{escape(title)}</a></li>')
    grids = "".join(_grid(head, rows) for head, rows in table.grids)
    notes = "".join(f"<p>{escape(note)}</p>" for note in table.notes)
    body = f"<h1>{escape(table.model)}</h1>{grids}{notes}<h2>Samples</h2><ul>{''.join(links)}</ul>"
    write_atomically(folder / "index.html", _page(table.model, body))


def _browser(title: str, path: Path) -> str:
    problems, samples = (read_rows(path / name)[0] for name in ("problems.jsonl", "samples.jsonl"))
    options = "".join(f'<option value="{key}">{meaning}</option>' for key, meaning in CHOICES.items())
    body = (
        f'<h1>{escape(title)}</h1><div class="bar"><select id="show">{options}</select>'
        '<input id="find" type="search" placeholder="text in problem or response"><span id="count"></span></div>'
        '<div class="panes"><nav id="problems"></nav><div id="view"></div></div>'
    )
    script = f"const PROBLEMS = {_data(problems)};\nconst SAMPLES = {_data(samples)};\n"
    return _page(title, body, script + (ASSETS / "browse.js").read_text(encoding="utf-8"))


def _data(rows: list[dict[str, Any]]) -> str:
    # no "<": a response may hold "</script>" or "<!--"
    return json.dumps(rows, allow_nan=False).replace("<", "\\u003c")


def _grid(head: list[str], rows: list[list[str]]) -> str:
    titles = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = ""
    for name, *cells in rows:
        # intervals below their numbers: the whole table then fits a laptop's screen
        numbers = "".join(f"<td>{escape(cell).replace(' [', '<br>[')}</td>" for cell in cells)
        lines += f'<tr><th scope="row">{escape(name)}</th>{numbers}</tr>'
    table = f'<table class="results"><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def _page(title: str, body: str, script: str = "") -> str:
    style = (REPORT_ASSETS / "report.css").read_text() + (ASSETS / "browse.css").read_text()
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main>{body}</main>"
        f"<script>{script}</script></body></html>\n"
    )
