"""The prose: the README is short, tables can be read, and what the pages name exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.test_layering import FLOORS, PACKAGE, ROOT

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "kernels/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
MAX_README_LINES = 200
MAX_CELL = 200  # characters
# Where a path must lie to be one of this repository: what a run writes (checkpoints/...) is not in it.
TOP = {"configs", "docs", "kernels", "megatron_rl", "requirements", "scripts", "slurm", "tests"}
ROOMS = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
NAMES = {path.name for folder in TOP for path in (ROOT / folder).rglob("*.py")}
BRACES = re.compile(r"(.*)\{([^{}]*,[^{}]*)\}(.*)")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
MODULE = re.compile(r"\bmegatron_rl(?:\.[A-Za-z_]\w*)+")
PATH = re.compile(r"[\w.{},-]+(?:/[\w.{},*-]+)*/?")
PLACEHOLDER = re.compile(r"\b(?:NAME|[A-Z]{4,})\b")


def prose(text: str) -> str:
    """Return the page without its code blocks, line numbers kept."""
    return re.sub(r"^( *)```.*?^\1```", lambda block: "\n" * block[0].count("\n"), text, flags=re.M | re.S)


def alternatives(path: str) -> list[str]:
    """Return the paths that `a/{b,c}.d` stands for."""
    if not (match := BRACES.fullmatch(path)):
        return [path]
    head, choices, tail = match.groups()
    return [full for choice in choices.split(",") for full in alternatives(head + choice + tail)]


def long_cells(text: str) -> list[str]:
    rows = [line.strip() for line in prose(text).splitlines() if line.lstrip().startswith("|")]
    cells = [cell.strip() for row in rows for cell in re.split(r"(?<!\\)\|", row)]
    return [cell for cell in cells if len(cell) > MAX_CELL]


def anchors(page: Path) -> set[str]:
    """Return the names that a page's headings can be linked by, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page.read_text()), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(text: str, page: Path) -> list[str]:
    broken = []
    for link in LINK.findall(prose(text)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def missing_paths(text: str) -> list[str]:
    """Return the files in backticks, and in commands, that look like files of this repository and are not there."""
    words = [word for span in re.findall(r"`([^`\n]+)`", prose(text)) for word in span.split()]
    for block in re.findall(r"^ *```[^\n]*\n(.*?)^ *```", text, flags=re.M | re.S):
        words += [word for line in block.splitlines() for word in line.partition("#")[0].split()]
    paths = [path for word in words if PATH.fullmatch(word) for path in alternatives(word.partition("::")[0])]
    return [path for path in paths if not PLACEHOLDER.search(path) and is_missing(path)]


def is_missing(path: str) -> bool:
    """Say whether it looks like a path of this repository, from its root or from the package, and is not there."""
    first, slash, _ = path.partition("/")
    if not slash:
        return path.endswith(".py") and path not in NAMES
    if first in TOP:
        return not any(ROOT.glob(path.rstrip("/")))
    # a metric (reward/mean) and a user's file (data/train.jsonl) look alike
    return first in ROOMS and path.endswith((".py", ".csv", "/")) and not any(PACKAGE.glob(path.rstrip("/")))


def missing_modules(text: str) -> list[str]:
    """Return the dotted names under megatron_rl that are neither a module nor a name that a module defines."""
    return sorted({name for name in MODULE.findall(text) if not _exists(name)})


def _exists(name: str) -> bool:
    folder, *rest = ROOT, *name.split(".")
    for depth, part in enumerate(rest):
        if (folder / part).is_dir():
            folder = folder / part
            continue
        module, left = folder / f"{part}.py", rest[depth + 1 :]
        if not module.is_file():
            module, left = folder / "__init__.py", rest[depth:]
        return not left or left[0] in _names_in(module)
    return True


def _names_in(module: Path) -> set[str]:
    """Return what a module defines or imports at its top level."""
    names: set[str] = set()
    for node in ast.parse(module.read_text()).body if module.is_file() else ():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README_LINES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    assert long_cells(text) == []
    assert broken_links(text, page) == []
    assert missing_paths(text) == []
    assert missing_modules(text) == []


def test_comments_name_files_and_modules_that_exist() -> None:
    """Those of configs, job scripts and code; tests write files of their own and name Megatron's."""
    files = [path for folder in ("configs", "slurm", "scripts") for path in (ROOT / folder).iterdir() if path.is_file()]
    files += [*PACKAGE.rglob("*.py"), ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / ".ci" / "run"]
    faults = []
    for path in files:
        text = path.read_text()
        named = re.findall(r"(?<![\w/$.])[a-z_]+/[\w./-]*\w\.[a-z]+\b", text)
        missing = [name for name in named if is_missing(name) and not (path.parent / name).exists()]
        faults += [f"{path.relative_to(ROOT)}: {name}" for name in [*missing, *missing_modules(text)]]
    assert faults == []


def test_the_readmes_step_is_that_of_train() -> None:
    """All that the snippet calls, `run_step` calls in the same order, among its timers."""
    (snippet,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    functions = ast.parse((PACKAGE / "train.py").read_text()).body
    (step,) = [node for node in functions if isinstance(node, ast.FunctionDef) and node.name == "run_step"]
    told, real = calls(ast.parse(snippet)), iter(calls(step))
    assert len(told) > 10 and [name for name in told if name not in real] == []  # `in` reads `real` up to the name


def calls(tree: ast.AST) -> list[str]:
    """Return what is called, in the order of the text."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [ast.unparse(node.func) for node in sorted(found, key=lambda node: (node.lineno, node.col_offset))]


def test_contributing_tells_the_floors() -> None:
    floors = [", ".join(f"`{room}`" for room in rooms.split()) for rooms in FLOORS]
    wanted = "\n".join(f"{number}. {rooms}" for number, rooms in enumerate(floors, start=1))
    assert f"\n\n{wanted}\n\n" in (ROOT / "CONTRIBUTING.md").read_text(), f"the list should be\n{wanted}"


def test_each_fault_is_seen() -> None:
    """Every check against a page with its fault, beside the same page without it."""
    page = ROOT / "docs" / "x.md"
    assert broken_links("[a](nowhere.md) [b](../README.md) [c](https://a.org/b)", page) == ["nowhere.md"]
    assert broken_links("[a](../README.md#two-commands) [b](../README.md#no-such)", page) == ["../README.md#no-such"]
    named = "`megatron_rl/train.py` `megatron_rl/no.py` `configs/{quickstart,no}.yaml` `make x` `runs/NAME/no`"
    assert missing_paths(named) == ["megatron_rl/no.py", "configs/no.yaml"]
    assert missing_paths("```\npython scripts/no.py --x  # scripts/comment.py\n```\n`docs/`") == ["scripts/no.py"]
    modules = "`megatron_rl.train` megatron_rl.config.load_config megatron_rl.types.Prompt megatron_rl.law."
    assert missing_modules(modules) == ["megatron_rl.law"]
    assert missing_modules("megatron_rl.types.Nobody megatron_rl.config.no") == [
        "megatron_rl.config.no",
        "megatron_rl.types.Nobody",
    ]
    row = f"| a | {'b' * (MAX_CELL + 1)} |"
    assert long_cells(row) and not long_cells(row.replace("b", "", 1)) and not long_cells(f"```\n{row}\n```")
