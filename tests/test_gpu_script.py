"""The script for one GPU, as far as a machine without one can prove it: its dry run, its processes that hang or crash,
the packages that it carries, and where its parts would mix devices."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from tests.device_book import Book, booked, install
from tests.device_reads import READS
from tests.worlds import ROOT, Worlds, leave_layout

GPU = ROOT / "scripts" / "gpu"
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}
# what a torch of any kind brings along
OF_TORCH = {"numpy", "filelock", "fsspec", "jinja2", "sympy", "networkx", "setuptools", "torch"}
NOT_IMPORTED = {"hf-xet"}  # the hub's faster downloads


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(GPU)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(GPU)):
            del sys.modules[name]


@pytest.fixture
def run(scripts: None) -> ModuleType:
    import run

    return run


# --- the dry run ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_dry_run_tries_all_that_needs_no_gpu(tmp_path: Path) -> None:
    command = [sys.executable, str(GPU / "run.py"), "--output", str(tmp_path), "--patience", "10"]
    env = {**os.environ, **ENVIRONMENT, "MEGATRON_RL_DEVICE": "cpu"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = {result["part"]: result for result in json.loads((tmp_path / "results.json").read_text())}
    verdicts = {name: result["verdict"] for name, result in results.items()}
    expected = dict.fromkeys(("machine", "kernels", "losses", "first", "offload", "save", "ipc"), "PASS")
    assert verdicts == expected | {"slices": "SKIP", "waits": "PASS", "signs": "PASS", "memory": "SKIP"}
    assert list(verdicts)[:3] == ["machine", "kernels", "losses"]  # in the order of their value
    lines = {(name, line["name"]): line for name, result in results.items() for line in result["lines"]}
    assert lines["losses", "kl_cov float32"]["verdict"] == "PASS"
    compared = results["losses"]["figures"]["kl_cov float32"]  # name -> deviation, tolerance, place
    assert {"logprobs", "selected", "gradients", "second update", "checkpoint"} <= compared.keys()
    assert "GPU" in lines["slices", "slices"]["text"]
    assert lines["first", "several micro-batches, bfloat16"]["verdict"] == "PASS"
    assert "=== memory" in (tmp_path / "log.txt").read_text()


# --- processes that fail ----------------------------------------------------------------------------------------------

# stands for run.py --part: says something and then does what its part is called
STUB = """
import json, os, subprocess, sys, time
part, answer = sys.argv[2], sys.argv[4]
line = {"name": "a", "verdict": "PASS", "text": "well"}
if part != "silent":
    open(answer, "w").write(json.dumps({"lines": [line], "figures": {"x": 1}}))
print("the last words of", part, flush=True)
if part == "hang":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open(os.path.join(os.path.dirname(answer), "child"), "w").write(str(child.pid))
    time.sleep(600)
if part == "crash":
    os.abort()
"""


def result_of(run: ModuleType, part: str, seconds: float, tmp_path: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    (tmp_path / "run.py").write_text(STUB)
    patch.setattr(run, "HERE", tmp_path)
    patch.setitem(run.PARTS, part, run.Part("none", "none", seconds))
    patch.setattr(run, "_LEAST_SECONDS", 0.5)
    limits = run.Limits(time.monotonic() + 100, 1.0)
    result: dict[str, Any] = run.run_part(part, dict(os.environ), limits, tmp_path, tmp_path / "log.txt")
    return result


@pytest.mark.parametrize(
    ("part", "ending"),
    [("crash", "ended with code -6"), ("hang", "no end after 12 s"), ("silent", "said nothing"), ("well", "")],
)
def test_a_part_that_fails_costs_itself_alone(
    run: ModuleType, part: str, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = result_of(run, part, 12.0, tmp_path, monkeypatch)
    assert result["verdict"] == ("FAIL" if ending else "PASS")
    assert ending in result["lines"][-1]["text"]
    if part != "silent":
        assert result["lines"][0] == {"name": "a", "verdict": "PASS", "text": "well"} and result["figures"] == {"x": 1}
    assert f"the last words of {part}" in (result["output"] if ending else (tmp_path / "log.txt").read_text())
    if part == "hang":
        child = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat")
        assert not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_part_without_time_is_skipped(run: ModuleType, tmp_path: Path) -> None:
    limits = run.Limits(time.monotonic() + 1, 1.0)
    result = run.run_part("kernels", {}, limits, tmp_path, tmp_path / "log.txt")
    assert (result["verdict"], result["lines"][0]["text"]) == ("SKIP", "none is left")


def test_what_a_part_raises_is_its_last_line(run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_answer import Skip

    def broken(answer: Any) -> None:
        answer.check("before", True, "told")
        raise ValueError("the reason")

    def skipping(answer: Any) -> None:
        raise Skip("no such device")

    for name, function in (("broken", broken), ("skipping", skipping)):
        module = ModuleType(f"stub_{name}")
        vars(module)["act"] = function
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(run.PARTS, name, run.Part(module.__name__, "act", 1.0))
        run.work(name, tmp_path / f"{name}.json")
    told = json.loads((tmp_path / "broken.json").read_text())["lines"]
    assert [line["verdict"] for line in told] == ["PASS", "FAIL"] and told[1]["text"] == "ValueError: the reason"
    (line,) = json.loads((tmp_path / "skipping.json").read_text())["lines"]
    assert line == {"name": "skipping", "verdict": "SKIP", "text": "no such device"}


# --- the packages that it carries -------------------------------------------------------------------------------------


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_carried_packages_need_no_others(scripts: None) -> None:
    import pack

    carried = {normal(name) for name in pack.NAMES}
    assert len(pack.pinned(pack.NAMES)) == len(carried)
    missing = set()
    for name in pack.NAMES:
        for text in importlib.metadata.requires(name) or []:
            need = Requirement(text)
            for python in pack.PYTHONS:
                environment = {"python_version": python, "python_full_version": f"{python}.1", "extra": ""}
                if need.marker is None or need.marker.evaluate(environment):
                    missing.add(normal(need.name))
    assert missing - carried - OF_TORCH == NOT_IMPORTED


def test_a_folder_that_was_not_filled_is_refused(scripts: None, tmp_path: Path) -> None:
    import pack

    with pytest.raises(SystemExit, match="fill the folder with"):
        pack.install(tmp_path, tmp_path / "site")
    with pytest.raises(SystemExit, match="has no nonesuch"):
        pack.pinned(["torch", "nonesuch"])


# --- what a GPU would say ---------------------------------------------------------------------------------------------


def test_the_names_of_torch_exist() -> None:
    """What only a GPU runs is at least there."""
    roots = {"torch.cuda": torch.cuda, "dist": torch.distributed}
    seen = 0
    for path in GPU.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in roots:
                assert hasattr(roots[ast.unparse(node.value)], node.attr), f"{path.name}:{node.lineno} {node.attr}"
                seen += 1
    assert seen > 20


def test_waits_are_named_as_in_the_list(scripts: None) -> None:
    """Of a step alone, by the function of the project that waited, a read apart from an upload."""
    import gpu_waits

    assert gpu_waits.known_reads() == READS.keys()
    source = """
import warnings
class Shouting(torch.Tensor):
    pass
class Policy:
    def backward(self, x):
        def inner():
            return x.item(), torch.as_tensor(x), x.to("cpu")
        return inner()
def run_step(x):
    return Policy().backward(x)
"""
    scope: dict[str, Any] = {"torch": torch}
    exec(compile(source, f"{ROOT}/megatron_rl/policy/policy.py", "exec"), scope)
    x = torch.ones(1)

    class Warns(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            import warnings

            warnings.warn("called a synchronizing CUDA operation (function warn_or_error_on_sync)", stacklevel=1)
            return func(*args, **(kwargs or {}))

    # entered before, so that it is called after the recorder's own mode, as CUDA is
    with Warns(), gpu_waits.recorded() as seen:
        scope["run_step"](x)
        scope["Policy"]().backward(x)  # outside a step
    place = "policy/policy.py Policy.backward.inner"
    assert seen == {(place, "read"): 1, (place, "upload"): 2}


def test_the_kernels_part_finds_a_wrong_kernel(scripts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_kernels

    from megatron_rl import device
    from megatron_rl.kernels import vocab_torch

    monkeypatch.setattr(gpu_kernels, "ROWS", 4)
    case = (torch.float32, 700, 690, 0.6, 3.0, -150.0)
    assert max(gpu_kernels.errors(case)) <= gpu_kernels.ALLOWED
    broken = ModuleType("broken")
    vars(broken).update(vars(vocab_torch))
    vars(broken)["shard_stats"] = lambda x, columns, real, *rest: vocab_torch.shard_stats(x, columns, real + 1, *rest)
    monkeypatch.setattr(device, "vocab_kernels", lambda logits: broken)
    assert gpu_kernels.errors(case)[0] > 0.1  # a padding column counted


def test_the_kernels_part_runs_tritons_kernels() -> None:
    """In Triton's interpreter, in a process of its own."""
    pytest.importorskip("triton")
    code = """
import torch, gpu_kernels
from megatron_rl import device
from megatron_rl.kernels import vocab_triton
device.vocab_kernels = lambda logits: vocab_triton
vocab_triton.BLOCK = 128  # several tiles a row
gpu_kernels.ROWS = 4
for dtype in (torch.float32, torch.float16):
    print(max(gpu_kernels.errors((dtype, 700, 690, 0.6, 3.0, -5.0))))
"""
    env = {**os.environ, **ENVIRONMENT, "TRITON_INTERPRET": "1", "MEGATRON_RL_DEVICE": "cpu"}
    env["PYTHONPATH"] += f"{os.pathsep}{GPU}"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(float(line) <= 1e-5 for line in done.stdout.split()), done.stdout


def book_of_parts(folder: Path) -> tuple[dict[str, Book], list[dict[str, str]]]:
    """On a rank: what some parts do with tensors, and what they say."""
    install()
    sys.path.insert(0, str(GPU))
    import gpu_losses
    import gpu_state
    from gpu_answer import Answer

    books = {name: Book() for name in ("losses", "first", "offload", "save")}
    answer = Answer(folder / "answer.json")
    with booked(books["losses"]):
        gpu_losses.measure_all(folder, "device", are_all=False)
    for name, part in (("first", gpu_losses.first), ("offload", gpu_state.offload), ("save", gpu_state.save)):
        with booked(books[name]):
            part(answer)
    leave_layout()
    return books, [vars(line) for line in answer.lines]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_part_mixes_devices(tmp_path: Path) -> None:
    pool = Worlds()
    try:
        ((books, lines),) = pool.run(1, book_of_parts, tmp_path, timeout=1000)
    finally:
        pool.close()
    assert {name: dict(book.faults) for name, book in books.items() if book.faults} == {}
    assert {line["verdict"] for line in lines} == {"PASS", "SKIP"}
    assert not list(tmp_path.rglob("error.txt"))
    assert len(list(tmp_path.glob("device/*/numbers.json"))) == 3
