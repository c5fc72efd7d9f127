"""The report as one HTML file that needs no network."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from megatron_rl import __version__
from megatron_rl.errors import UserError
from megatron_rl.files import refusal, write_atomically
from megatron_rl.launch import say
from megatron_rl.metrics.write import format_duration
from megatron_rl.report.catalogue import sections
from megatron_rl.report.figures import Figure, build, colour
from megatron_rl.report.panels import config_differences, replay_tables, samples_of
from megatron_rl.report.runs import ENDS, LoggedRun, NotYet, evaluation_tables, load_runs, summary_of

ASSETS = Path(__file__).parent / "assets"
# Map figures would load from these; the report has none, and nothing in it may name a CDN.
CDN_ADDRESSES = ("https://cdn.plot.ly/un/", "https://cdn.jsdelivr.net/npm/")
COLUMNS = dict.fromkeys(
    "entropy_first entropy_last accuracy_first accuracy_last eval_first eval_last".split(), "{:.3f}"
) | {"law_r2": "{:.2f}", "tokens_per_second": "{:,.0f}"}


def build_report(run_dirs: Sequence[Path], out: Path | None = None, reload_seconds: int = 0) -> Path:
    """Write one self-contained HTML file that compares the runs, and return its path.

    `out`: null puts `report.html` into the run's folder, or for several runs into the folder of the first one's parent.
    `reload_seconds`: the page reloads itself this often, at the place where it is read; 0: never.

    Raises: UserError when a folder is not a run or has no complete step yet, or the page cannot be written.
    """
    runs = load_runs(run_dirs)
    out = out or _default_page(run_dirs)
    text = render(runs, reload_seconds)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, text)  # a page that reloads itself never meets half a file
    except OSError as error:
        raise refusal(error) or UserError(f"cannot write {out}: {error}") from error
    return out


def keep_current(run_dirs: Sequence[Path], out: Path | None, seconds: int, tell: Callable[[str], None] = say) -> None:
    """Write the page, and again every `seconds` when a run grew, until Ctrl-C; then once more without reloading.

    Runs that have not begun are waited for: `tell` gets what is missing, and the page shows it where its folder exists.
    Raises: UserError when a folder holds something else than a run.
    """
    seen, said = None, ""
    try:
        while True:
            files = [
                file for path in map(Path, run_dirs) for file in (path / "metrics.jsonl", *evaluation_tables(path))
            ]
            state = [(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
            if state != seen or len(state) < len(files):
                text = _refresh(run_dirs, out, seconds)
                if text != said:
                    tell(text)
                seen, said = state, text
            time.sleep(seconds)
    except KeyboardInterrupt:
        with contextlib.suppress(NotYet):
            build_report(run_dirs, out)


def _refresh(run_dirs: Sequence[Path], out: Path | None, seconds: int) -> str:
    """Write the page or its stand-in; return the page's path, or what is waited for."""
    try:
        return str(build_report(run_dirs, out, seconds))
    except NotYet as missing:
        page, text = out or _default_page(run_dirs), f"waiting for {missing}"
    if page.parent.is_dir():  # a run's folder is the run's to make
        write_atomically(page, document("waiting.html", "waiting", reload_seconds=seconds, waiting_for=text))
        text += f"\n{page}"
    return text


def _default_page(run_dirs: Sequence[Path]) -> Path:
    first = Path(run_dirs[0])
    return (first if len(run_dirs) == 1 else first.resolve().parent) / "report.html"


def render(runs: Sequence[LoggedRun], reload_seconds: int = 0) -> str:
    """Return the whole page as HTML."""
    plots: dict[str, Figure] = {}
    parts = []
    for title, specs in sections(runs):
        figures = [build(spec, runs) for spec in specs]
        shown = numbered([figure for figure in figures if not figure.missing], len(plots))
        plots |= shown
        parts.append((title, shown, [figure for figure in figures if figure.missing]))
    return document(
        "report.html",
        ", ".join(run.label for run in runs),
        plots,
        reload_seconds=reload_seconds,
        runs=runs,
        colour=colour,
        ends=ENDS,
        summary=[_summary(run) for run in runs],
        sections=parts,
        replays=replay_tables(runs),
        samples=samples_of(runs),
        without_tokens=[r.label for r in runs if r.samples and not any("tokens" in row for row in r.samples)],
        differences=config_differences(runs),
    )


def numbered(figures: Sequence[Figure], first: int = 0) -> dict[str, Figure]:
    """Return the figures by the ids of the elements that show them."""
    return {f"figure-{number}": figure for number, figure in enumerate(figures, first)}


def document(template: str | Path, title: str, figures: Mapping[str, Figure] | None = None, **parts: Any) -> str:
    """Return a self-contained page from a template: a file of report/assets, or of a folder that builds on those.

    figures: by the id of the element that shows them. parts: what else the template asks for.
    """
    path = ASSETS / template
    loader = FileSystemLoader([path.parent, ASSETS])
    pages = Environment(loader=loader, autoescape=True, trim_blocks=True)
    pages.policies["json.dumps_kwargs"] = {"allow_nan": False}
    return pages.get_template(path.name).render(
        title=title,
        plots={name: {"traces": figure.traces, "layout": figure.layout} for name, figure in (figures or {}).items()},
        asset=lambda name: Markup(loader.get_source(pages, name)[0]),
        plotly=_plotly,
        version=__version__,
        **parts,
    )


def _plotly() -> Markup:
    source = get_plotlyjs()
    for address in CDN_ADDRESSES:
        source = source.replace(address, "")
    return Markup(source)


def _summary(run: LoggedRun) -> list[str]:
    """Return the run's cells in the table at the top of the page."""
    row = summary_of(run)
    cells = [style.format(row[key]) if row[key] is not None else "–" for key, style in COLUMNS.items()]
    wall = format_duration(row["wall_seconds"]) if row["wall_seconds"] is not None else "–"
    return [str(row["steps"]), *cells, wall]
