"""The house rules, read from the source: who may import what, where a word may stand, how long things may be."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megatron_rl"
FILES = {
    path.relative_to(PACKAGE).as_posix(): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if "shims" not in path.parts  # they run in the servers' processes, not in the trainer
}
FILES |= {f"kernels/{path.name}": path for path in sorted((ROOT / "kernels").glob("*.py"))}  # behind a link
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 70
MAX_LOOSE_MODULES = 10
MAX_PARAMETERS = 8
# kernels take each pointer and size as an argument, and so do their twins
MANY_PARAMETERS = ("kernels/vocab_",)
# Messages go through launch.say. These print what a command was asked for,
PRINTS_RESULTS = (
    "convert/commands.py eval/run.py lab/shadow.py launch.py plan/command.py "
    "preflight/run.py prepare/commands.py profiling/commands.py files.py"
).split()
# or silence another library's messages.
SILENCES_OTHERS = ("grading/symbolic.py",)

# A docstring begins with a verb, or with what the thing is; one that begins so is a riddle.
RIDDLES = set(
    "about after around as at before behind beside besides between by during for from how if in into like of on once "
    "out over per since than that through to towards under until what when where whether which while who whose why "
    "with within without".split()
)
# folders and files whose docstrings are written so
PLAIN_PROSE = (
    "algorithms/ cli.py cluster/ config/ conform/ data/ device.py files.py kernels/ lab/ launch.py metrics/ models/ "
    "packing/ parallel/ plan/ policy/ preflight/ prepare/ profiling/ rehearse/ report/ resume.py reward/ rollout/ "
    "run.py train.py types.py warm_start.py"
).split()
# From the ground up. A room (a folder, or a module beside the folders) imports rooms of lower floors and its own files,
# never a floor above or a neighbour on its own.
FLOORS = (
    "errors types",
    "files",
    "launch",
    "kernels",
    "device",
    "models",
    "algorithms",
    "config",
    "parallel",
    "data",
    "convert",
    "packing",
    "metrics",
    "grading",
    "reward",
    "policy",
    "rollout",
    "warm_start",
    "plan",
    "report",
    "eval",
    "run",
    "resume",
    "train",
    "conform lab profiling prepare",
    "rehearse",
    "preflight",
    "cli",
    "cluster __main__",
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}
ALGORITHMS_MAY_IMPORT = {
    "__future__",
    "collections.abc",
    "dataclasses",
    "difflib",
    "heapq",
    "importlib",
    "itertools",
    "math",
    "pydantic",
    "torch",
    "typing",
    "megatron_rl.types",
}
# Megatron's own name for seeding its RNG tracker, which it needs on a CPU too
MEGATRON_NAMES = {"model_parallel_cuda_manual_seed"}
CUDA = re.compile(r"(?<![a-z])cuda(?![a-z])", re.I)


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all that is imported; `from a import b` gives both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            if isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value)


def dotted_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, a.b.c) of each attribute chain."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, ast.unparse(node)


def is_within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def type_checking_blocks(tree: ast.AST) -> set[ast.AST]:
    """All nodes under `if TYPE_CHECKING:`."""
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test).endswith("TYPE_CHECKING")]
    return {inner for block in blocks for statement in block.body for inner in ast.walk(statement)}


def docstrings(tree: ast.AST) -> set[ast.AST]:
    """Constants that stand alone as a statement: docstrings."""
    return {n.value for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}


def words(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of every identifier and every string but docstrings."""
    skipped = docstrings(tree)
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Name):
            yield line, node.id
        elif isinstance(node, ast.Attribute):
            yield line, node.attr
        elif isinstance(node, ast.arg | ast.keyword) and node.arg:
            yield line, node.arg
        elif isinstance(node, ast.alias):
            yield from ((line, text) for text in (node.name, node.asname) if text)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield line, node.name
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield line, node.module
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in skipped:
            yield line, node.value


def collectives(name: str, tree: ast.AST) -> list[str]:
    # device.py chooses the backend of the process group, so it may name the module; a rehearsal stands in for it
    if name.startswith("parallel/") or name in ("device.py", "rehearse/world.py"):
        return []
    found = [
        (line, text) for line, text in [*imports(tree), *dotted_names(tree)] if is_within(text, "torch.distributed")
    ]
    if name.startswith(("convert/", "policy/")):  # reading and writing files is no collective
        found = [(line, text) for line, text in found if not is_within(text, "torch.distributed.checkpoint")]
    return [f"{name}:{line}: {text}" for line, text in found]


def megatron_imports(name: str, tree: ast.AST) -> list[str]:
    if name.startswith("policy/") or name == "parallel/groups.py":
        return []
    return [f"{name}:{line}: {text}" for line, text in imports(tree) if is_within(text, "megatron")]


def cuda_words(name: str, tree: ast.AST) -> list[str]:
    # the latter rewrites what Megatron says of it
    if name in ("device.py", "kernels/megatron_cpu.py"):
        return []
    return [
        f"{name}:{line}: {text!r}" for line, text in words(tree) if CUDA.search(text) and text not in MEGATRON_NAMES
    ]


def waits_on_numbers(name: str, tree: ast.AST) -> list[str]:
    """Waits that may be in NCCL, where ranks spin and are given up: torch's own, and worlds of another timeout."""
    if name == "parallel/reduce.py":
        return []
    faults = [
        f"{name}:{line}: {text}, use Reducer's"
        for line, text in dotted_names(tree)
        if re.fullmatch(r"(torch\.)?dist(ributed)?\.(\w*barrier|\w+_object(_list|s)?)", text)
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "init_groups" and len(node.args) < 3:
            faults.append(f"{name}:{node.lineno}: init_groups without waiting_seconds(config)")
    return faults


def algorithm_imports(name: str, tree: ast.AST) -> list[str]:
    if not name.startswith("algorithms/"):
        return []
    lazy, found = type_checking_blocks(tree), []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom) or node in lazy:
            continue
        modules = (
            [a.name for a in node.names] if isinstance(node, ast.Import) else ["." * node.level + (node.module or "")]
        )
        allowed = {m for m in modules if m in ALGORITHMS_MAY_IMPORT or is_within(m, "megatron_rl.algorithms")}
        found += [f"{name}:{node.lineno}: {module}" for module in set(modules) - allowed]
    return found


def upward_imports(name: str, tree: ast.AST) -> list[str]:
    room = Path(name).parts[0].removesuffix(".py")
    if room == "__init__":
        return []
    faults = []
    for line, text in imports(tree):
        parts = text.split(".")
        if parts[0] != "megatron_rl" or len(parts) < 2 or parts[1] not in FLOOR_OF or parts[1] == room:
            continue
        if FLOOR_OF[parts[1]] >= FLOOR_OF[room]:
            faults.append(f"{name}:{line}: {room} imports {parts[1]}, which is not below it")
    return faults


def long_things(name: str, tree: ast.AST) -> list[str]:
    faults = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                faults.append(f"{name}:{node.lineno}: {node.name} has {lines} lines, at most {MAX_FUNCTION_LINES}")
    return faults


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def many_parameters(name: str, tree: ast.AST) -> list[str]:
    if name.startswith(MANY_PARAMETERS):
        return []
    faults = []
    for function in functions(tree):
        arguments = function.args
        names = [a.arg for a in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]]
        count = len([n for n in names if n not in ("self", "cls")])
        if count > MAX_PARAMETERS:
            faults.append(f"{name}:{function.lineno}: {function.name} has {count} parameters, at most {MAX_PARAMETERS}")
    return faults


def riddles(name: str, tree: ast.AST) -> list[str]:
    if not name.startswith(tuple(PLAIN_PROSE)):
        return []
    faults = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):  # a class and a file are things, not acts
            continue
        text = ast.get_docstring(node) or ""
        first = re.match(r"[\w']*", text.lower())
        if (first is not None and first[0] in RIDDLES) or re.match(r"See `", text):
            faults.append(f"{name}:{getattr(node, 'lineno', 1)}: {text.splitlines()[0]!r}")
    return faults


def other_channels(name: str, tree: ast.AST) -> list[str]:
    if name in (*PRINTS_RESULTS, *SILENCES_OTHERS):
        return []
    calls = [(node.lineno, ast.unparse(node.func)) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    channels = re.compile(r"print|logging\.\w+|warnings\.warn|sys\.std(out|err)\.write")
    return [f"{name}:{line}: {call}, use launch.say" for line, call in calls if channels.fullmatch(call)]


RULES = (
    collectives,
    megatron_imports,
    cuda_words,
    waits_on_numbers,
    algorithm_imports,
    upward_imports,
    long_things,
    many_parameters,
    riddles,
    other_channels,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps(rule) -> None:
    faults = [fault for name, path in FILES.items() for fault in rule(name, ast.parse(path.read_text()))]
    assert not faults, "\n" + "\n".join(faults)


def import_circles(graph: dict[str, set[str]]) -> list[str]:
    """Files that import each other, at load or later, for a type or for a value: what is left when files without
    imports are taken away again and again."""
    left = {module: set(needed) for module, needed in graph.items()}
    while free := {module for module, needed in left.items() if not needed & left.keys()}:
        left = {module: needed for module, needed in left.items() if module not in free}
    while used := {module for module in left if any(module in needed for needed in left.values())}:
        if len(used) == len(left):
            break
        left = {module: needed for module, needed in left.items() if module in used}
    return sorted(left)


def import_graph() -> dict[str, set[str]]:
    modules = {
        f"megatron_rl/{name}".removesuffix(".py").removesuffix("/__init__").replace("/", "."): path
        for name, path in FILES.items()
    }
    graph = {}
    for module, path in modules.items():
        needed = {text for _, text in imports(ast.parse(path.read_text())) if text in modules}
        # `from package import module` needs the module; the package's own face comes along only for what it exports
        graph[module] = {text for text in needed if text != module and not module.startswith(f"{text}.")}
    return graph


def test_no_files_import_in_a_circle() -> None:
    assert import_circles(import_graph()) == []
    assert import_circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b", "c"]


def test_every_room_has_a_floor_and_few_modules_lie_loose() -> None:
    rooms = {Path(name).parts[0].removesuffix(".py") for name in FILES} - {"__init__"}
    assert rooms == FLOOR_OF.keys()
    loose = [name for name in FILES if "/" not in name and not name.startswith("__")]
    assert len(loose) <= MAX_LOOSE_MODULES, loose


def test_the_step_reads_at_one_glance() -> None:
    source = (PACKAGE / "train.py").read_text()
    (step,) = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "run_step"]
    assert (step.end_lineno or 0) - step.lineno + 1 <= 30 and len(source.splitlines()) < 250


def test_files_are_short() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in FILES.items()}
    assert not {name: length for name, length in lengths.items() if length > MAX_FILE_LINES}


@pytest.mark.parametrize(
    ("rule", "name", "code"),
    [
        (collectives, "policy/x.py", "import torch.distributed as dist"),
        (collectives, "train.py", "from torch import distributed"),
        (collectives, "train.py", "from torch.distributed import all_reduce"),
        (collectives, "train.py", "import torch\ntorch.distributed.barrier()"),
        (megatron_imports, "parallel/vocab.py", "from megatron.core import parallel_state"),
        (megatron_imports, "device.py", "def f():\n    import megatron.core"),
        (megatron_imports, "train.py", "importlib.import_module('megatron.core')"),
        (cuda_words, "policy/x.py", "x = tensor.cuda()"),
        (cuda_words, "policy/x.py", "x = 'cuda:0'"),
        (cuda_words, "policy/x.py", "f(is_cuda=True)"),
        (cuda_words, "policy/x.py", "from torch import cuda"),
        (waits_on_numbers, "parallel/x.py", "dist.barrier(group=groups.world)"),
        (waits_on_numbers, "policy/x.py", "torch.distributed.all_gather_object(found, mine)"),
        (waits_on_numbers, "train.py", "groups = init_groups(config.parallel, config.seed)"),
        (algorithm_imports, "algorithms/x.py", "from megatron_rl.config import Config"),
        (algorithm_imports, "algorithms/x.py", "import torch.distributed"),
        (algorithm_imports, "algorithms/x.py", "from .. import config"),
        (collectives, "policy/x.py", "import torch.distributed.checkpoint\nfrom torch.distributed import barrier"),
        (upward_imports, "data/x.py", "from megatron_rl.policy.build import build_model"),
        (upward_imports, "parallel/x.py", "def f():\n    from megatron_rl import train"),
        (upward_imports, "lab/x.py", "from megatron_rl.profiling import record"),
        (upward_imports, "device.py", "if TYPE_CHECKING:\n    from megatron_rl.config import Config"),
        (long_things, "train.py", "def f():\n" + "    pass\n" * MAX_FUNCTION_LINES),
        (many_parameters, "train.py", "class A:\n    def f(self, a, b, c, d, e, *, f, g, h, i): ..."),
        (riddles, "launch.py", 'def f():\n    """Of the run: its name."""'),
        (riddles, "report/x.py", 'class A:\n    def f(self):\n        """See `B`, and more."""'),
        (other_channels, "eval/x.py", "print('here')"),
        (other_channels, "data/x.py", "import logging\nlogging.warning('here')"),
        (other_channels, "policy/x.py", "def f():\n    warnings.warn('here')"),
    ],
)
def test_each_rule_finds_its_fault(rule, name: str, code: str) -> None:
    assert rule(name, ast.parse(code))


@pytest.mark.parametrize(
    ("rule", "name", "code"),
    [
        (collectives, "parallel/reduce.py", "import torch.distributed as dist"),
        (collectives, "policy/checkpoint.py", "from torch.distributed.checkpoint.api import CheckpointException"),
        (upward_imports, "policy/x.py", "from megatron_rl.policy.build import Model\nfrom megatron_rl import device"),
        (megatron_imports, "train.py", "from megatron_rl.types import Prompt"),
        (cuda_words, "train.py", '"""Not on cuda."""  # nor on cuda'),
        (waits_on_numbers, "parallel/x.py", "world.barrier()\ndist.all_reduce(x)\nworld.gather_objects(None)"),
        (algorithm_imports, "algorithms/x.py", "if TYPE_CHECKING:\n    from megatron_rl.config import Config"),
        (algorithm_imports, "algorithms/x.py", "from torch import Tensor\nfrom megatron_rl.algorithms.kl import kl"),
        (many_parameters, "train.py", "class A:\n    def f(self, a, b, c, d, *, e, f, g, h): ..."),
        (riddles, "report/x.py", 'def f():\n    """Return what is asked."""\n    "With."'),
        (other_channels, "eval/x.py", "say('here')\nconsole.print(config.logging.run_dir)"),
    ],
)
def test_each_rule_spares_the_rest(rule, name: str, code: str) -> None:
    assert rule(name, ast.parse(code)) == []
