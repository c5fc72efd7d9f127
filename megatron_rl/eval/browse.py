"""The samples as pages that need no network: one per set, and an index with the tables."""

from collections.abc import Sequence
from pathlib import Path

from megatron_rl.eval.table import Table
from megatron_rl.files import write_atomically
from megatron_rl.metrics.jsonl import read_rows
from megatron_rl.report.page import document

ASSETS = Path(__file__).parent / "assets"


def write_pages(folder: Path, table: Table, sets: Sequence[tuple[str, Path]]) -> None:
    """Write index.html, and browse.html in the folder of each (title, folder) with problems.jsonl and samples.jsonl."""
    for title, path in sets:
        problems, samples = (read_rows(path / name)[0] for name in ("problems.jsonl", "samples.jsonl"))
        page = document(ASSETS / "browse.html", title, problems=problems, samples=samples)
        write_atomically(path / "browse.html", page)
    links = [(title, path.relative_to(folder).as_posix()) for title, path in sets]
    write_atomically(folder / "index.html", document(ASSETS / "index.html", table.model, table=table, sets=links))
