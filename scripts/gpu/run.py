"""What this project does on one CUDA GPU, tried in at most ten minutes: `make test-gpu`, docs/install_gpu.md.

    python scripts/gpu/run.py                                  # with the packages of this Python
    python scripts/gpu/run.py --wheels .wheels --output OUT    # with packages that scripts/gpu/pack.py brought along

It needs PyTorch 2.11 or newer, and neither Transformer Engine nor SGLang. Each part is a process with a time limit, so
that a crash or a hang costs that part alone; they run in the order of their value. Without a GPU it is a dry run: parts
that need one are skipped by name. Every part prints PASS, FAIL or SKIP with its figures; results.json has them all. The
exit code is 1 when a part failed.

This file imports nothing but the standard library before the packages are there.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpu_answer import FAIL, SKIP, Answer, Line, Skip, verdict_of
from pack import SGLANG_FOLDER, install

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
MINUTES = 9.5  # of ten, with the installation of carried packages
_LEAST_SECONDS = 15.0  # a part that has less is not started
_WORDS = 3000  # characters of a failed part's output that results.json keeps


@dataclass(frozen=True)
class Part:
    """A part: the function that does it, and how long it may take on a GPU."""

    module: str
    function: str
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """When all parts must have ended, and the factor of each one's time limit."""

    deadline: float
    patience: float

    def seconds(self, part: Part) -> float:
        """Return how long the part may take from now on."""
        return min(part.seconds * self.patience, self.deadline - time.monotonic())


# cuBLAS reads it when it starts; torch asks for it where kernels must be deterministic
_DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
PARTS = {
    "machine": Part("gpu_machine", "machine", 80),
    "kernels": Part("gpu_kernels", "kernels", 70),
    "losses": Part("gpu_losses", "losses", 170),
    "first": Part("gpu_losses", "first", 60),
    "offload": Part("gpu_state", "offload", 80, _DETERMINISTIC),
    "save": Part("gpu_state", "save", 90, _DETERMINISTIC),
    "ipc": Part("gpu_ipc", "ipc", 60),
    "slices": Part("gpu_slices", "slices", 100),
    # compiled functions would hide what waits inside them, and modes of torch do not go with them
    "waits": Part("gpu_waits", "waits", 80, {"TORCHDYNAMO_DISABLE": "1"}),
    "signs": Part("gpu_signs", "signs", 90),
    "memory": Part("gpu_memory", "memory", 90),
}


def main() -> int:
    """Run the parts; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, help="folder of packages that scripts/gpu/pack.py has filled")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "runs" / "test_gpu", help="folder for results.json, log.txt"
    )
    parser.add_argument("--only", action="append", choices=PARTS, help="this part; may be given again; default all")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts together")
    parser.add_argument("--patience", type=float, default=1.0, help="times this, all time limits: for a busy machine")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        work(options.part, options.answer)
        return 0
    limits = Limits(time.monotonic() + 60 * options.minutes * options.patience, options.patience)
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="test_gpu_") as folder:
        environment = shared_environment(options.wheels, Path(folder) / "site")
        environment["TEST_GPU_PATIENCE"] = str(options.patience)
        results: list[dict[str, Any]] = []

        def run(name: str) -> dict[str, Any]:
            return run_part(name, environment, limits, Path(folder), options.output / "log.txt")

        names = list(options.only or PARTS)
        if names[0] == "machine":
            results.append(run(names.pop(0)))
            if results[0]["figures"].get("compiles") is False:
                environment["TORCHDYNAMO_DISABLE"] = "1"
                print("  torch.compile does not work here; the parts that follow run without it", flush=True)
        # in a dry run two at once; on a GPU each would disturb what another one measures
        is_dry = any((line["name"], line["verdict"]) == ("device", SKIP) for r in results for line in r["lines"])
        with ThreadPoolExecutor(2 if is_dry else 1) as threads:
            for result in threads.map(run, names):
                results.append(result)
                write(options.output / "results.json", results)
        write(options.output / "results.json", results)
    failed = [result["part"] for result in results if result["verdict"] == FAIL]
    print(f"{len(results)} parts, failed: {', '.join(failed) or 'none'}; {options.output / 'results.json'}")
    return 1 if failed else 0


def shared_environment(wheels: Path | None, site: Path) -> dict[str, str]:
    """Return the environment of all parts, with carried packages installed into `site`."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    if wheels is not None:
        install(wheels, site)
        paths.insert(0, str(site))
        if (wheels / SGLANG_FOLDER).is_dir():
            environment["TEST_GPU_SGLANG"] = str((wheels / SGLANG_FOLDER).resolve())
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    if sys.platform == "linux":  # a sandbox may resolve no host's name
        environment |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    return environment | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}


def run_part(name: str, environment: dict[str, str], limits: Limits, folder: Path, log: Path) -> dict[str, Any]:
    """Run one part in a process of its own; print and return its result. Its output goes to the end of `log`."""
    part, answer = PARTS[name], folder / f"{name}.json"
    seconds = limits.seconds(part)
    if seconds < _LEAST_SECONDS:
        return said(name, [Line("time", SKIP, "none is left")], {}, 0.0, "")
    print(f"{name} ...", flush=True)
    began = time.monotonic()
    command = [sys.executable, str(HERE / "run.py"), "--part", name, "--answer", str(answer)]
    env = environment | part.environment | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    output = folder / f"{name}.log"
    with output.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
        ending = ""
        try:
            code = process.wait(seconds)
            ending = f"the process ended with code {code}" if code else ""
        except subprocess.TimeoutExpired:
            ending = f"no end after {seconds:.0f} s"
        finally:
            kill(process)
    seconds = time.monotonic() - began
    told = json.loads(answer.read_text()) if answer.exists() else {"lines": [], "figures": {}}
    lines = [Line(**line) for line in told["lines"]]
    words = output.read_text(errors="replace")
    with log.open("a") as file:
        file.write(f"=== {name}, {seconds:.1f} s\n{words}\n")
    if ending:
        lines.append(Line("end", FAIL, ending))
    elif not lines:
        lines.append(Line("end", FAIL, "the part said nothing"))
    return said(name, lines, told["figures"], seconds, words)


def said(name: str, lines: list[Line], figures: dict[str, Any], seconds: float, words: str) -> dict[str, Any]:
    """Print and return the result of a part."""
    verdict = verdict_of(lines)
    text = [f"{verdict} {name} ({seconds:.1f} s)", *(f"  {line.verdict} {line.name}: {line.text}" for line in lines)]
    print("\n".join(text), flush=True)
    result = {"part": name, "verdict": verdict, "seconds": round(seconds, 1)}
    result |= {"lines": [asdict(line) for line in lines], "figures": figures}
    return result | ({"output": words[-_WORDS:]} if verdict == FAIL else {})


def kill(process: subprocess.Popen[bytes]) -> None:
    """End the part's process and all that it started: they are a process group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write(path: Path, results: list[dict[str, Any]]) -> None:
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(results, indent=1))
    draft.replace(path)


def work(name: str, path: Path) -> None:
    """Do a part in this process: whatever it raises is its last line."""
    answer = Answer(path)
    try:
        getattr(importlib.import_module(PARTS[name].module), PARTS[name].function)(answer)
    except Skip as reason:
        answer.skip(name, str(reason))
    except BaseException as error:
        traceback.print_exc()
        answer.check(name, False, f"{type(error).__name__}: {error}"[:800])


if __name__ == "__main__":
    sys.exit(main())
