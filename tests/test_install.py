"""Installation on GPU nodes, as far as it goes without one: guards, an interrupted install, locks, and messages."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
LOCKS = sorted((ROOT / "requirements").glob("gpu-*.txt"))
# finds its headers in INCLUDE, "installs" whatever it is asked for unless the file `offline` is there, and tells
PYTHON = """#!/bin/bash
echo "$*" >> {folder}/asked
case "$*" in
    *get_path*) echo {folder}/include ;;
    *py%d%d*) echo py311 ;;
    "-m venv"*) mkdir -p "${{@: -1}}/bin"; cp "$0" "${{@: -1}}/bin/python" ;;
    *"pip --python"*install*) [[ ! -e {folder}/offline ]] ;;
esac
"""
NODES, ENGINES, COMPILERS = "trainer one sglang vllm", "one sglang vllm", "trainer one compiler"
TOOLS = "bash sort sed dirname mkdir rm cp cat touch make".split()


class Machine:
    """Programs of a GPU node that are none: each says what the real one would."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.env = folder, {"PATH": str(folder / "bin"), "PYTHON": str(folder / "bin/python3.11")}
        self.env |= {"CUDA_HOME": str(folder / "cuda")}
        for name in TOOLS:
            self.path(f"bin/{name}").symlink_to(shutil.which(name) or pytest.skip(f"no {name} here"))
        self.says("bin/nvidia-smi", "580.95.05\n580.95.05")
        self.says("bin/ldd", "ldd (Ubuntu GLIBC 2.35-0ubuntu3.8) 2.35\nCopyright (C) 2022")
        self.says("bin/g++", "13.2.0")
        self.says("cuda/bin/nvcc", "Cuda compilation tools, release 13.0, V13.0.88")
        self.path("cuda/include/crt/host_defines.h").touch()
        self.path("include/Python.h").touch()
        self.program("bin/python3.11", PYTHON.format(folder=folder))

    def path(self, name: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def program(self, name: str, text: str) -> None:
        self.path(name).write_text(text)
        self.path(name).chmod(0o755)

    def says(self, name: str, text: str) -> None:
        self.program(name, f"#!/bin/bash\necho '{text}'\n")

    def run(self, *command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=self.env, cwd=cwd, capture_output=True, text=True, timeout=60)

    def asked(self) -> list[str]:
        return self.path("asked").read_text().splitlines()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("kind", ["trainer", "one", "sglang", "vllm", "compiler"])
def test_a_sound_machine_passes(kind: str, machine: Machine) -> None:
    done = machine.run("bash", "requirements/check_gpu.sh", kind)
    assert (done.returncode, done.stderr) == (0, "")


def without(name: str) -> Callable[[Machine], None]:
    return lambda machine: machine.path(name).unlink()


def saying(name: str, text: str) -> Callable[[Machine], None]:
    return lambda machine: machine.says(name, text)


@pytest.mark.parametrize(
    ("change", "stops", "fault", "remedy"),
    [
        (without("bin/nvidia-smi"), NODES, "no NVIDIA driver answers", "DRIVER=unchecked"),
        (saying("bin/nvidia-smi", "570.86.10"), NODES, "'570.86.10'; .* needs 580", "ask for driver"),
        (saying("bin/nvidia-smi", "NVIDIA-SMI has failed"), NODES, "NVIDIA-SMI has failed", "ask for"),
        (saying("bin/ldd", "ldd (GNU libc) 2.28"), ENGINES, r"glibc is '2.28'; \w+'s wheels need 2.3", "RHEL 9"),
        (saying("bin/ldd", "musl libc"), NODES, "glibc is 'libc'", "a container"),
        (without("cuda/bin/nvcc"), COMPILERS, "no .*/cuda/bin/nvcc", "module load cuda/13"),
        (saying("cuda/bin/nvcc", "release 12.8, V12"), COMPILERS, "CUDA '12.8'; torch here", "CUDA_HOME"),
        (without("cuda/include/crt/host_defines.h"), COMPILERS, "no crt/host_defines.h", "cuda-crt-13-0"),
        (without("bin/g++"), COMPILERS, r"g\+\+ is 'missing'; 11 or newer", "module load gcc"),
        (saying("bin/g++", "9.4.0"), COMPILERS, r"g\+\+ is '9.4.0'", "CXX="),
        (without("include/Python.h"), COMPILERS, "no Python.h", "python3-dev"),
    ],
)  # fmt: skip
def test_what_a_machine_lacks_is_said_with_its_remedy(
    change: Callable[[Machine], None], stops: str, fault: str, remedy: str, machine: Machine
) -> None:
    change(machine)
    for kind in ("trainer", "one", "sglang", "vllm", "compiler"):
        done = machine.run("bash", "requirements/check_gpu.sh", kind)
        assert done.returncode == (kind in stops.split()), (kind, done.stderr)
        if done.returncode:
            assert re.search(rf"error: .*{fault}.*\n       .*{re.escape(remedy)}", done.stderr), done.stderr


def test_all_faults_are_said_at_once_and_the_driver_can_wait(machine: Machine) -> None:
    for name in ("bin/nvidia-smi", "bin/g++", "include/Python.h"):
        machine.path(name).unlink()
    said = [machine.run("bash", "requirements/check_gpu.sh", "one").stderr.count("error:")]
    machine.env["DRIVER"] = "unchecked"
    said += [machine.run("bash", "requirements/check_gpu.sh", "one").stderr.count("error:")]
    assert said == [3, 2]


def test_an_interrupted_install_starts_over(machine: Machine, tmp_path: Path) -> None:
    """And a finished one is not made again, until its lock changes or another kind took its folder."""
    project = tmp_path / "project"
    shutil.copytree(ROOT / "requirements", project / "requirements")
    shutil.copy(ROOT / "Makefile", project)
    shutil.copytree(ROOT / "scripts", project / "scripts")
    folder = project / ".engines" / "sglang"
    machine.path("offline").touch()
    done = machine.run("make", "gpu-engine-sglang", cwd=project)
    assert done.returncode and folder.is_dir() and not (folder / ".gpu").exists()
    (folder / "half").touch()
    machine.path("offline").unlink()
    done = machine.run("make", "gpu-engine-sglang", cwd=project)
    assert done.returncode == 0, done.stderr
    assert (folder / ".gpu").exists() and not (folder / "half").exists()
    wanted = "install --quiet --no-deps --requirement requirements/gpu-sglang-engine-py311.txt"
    assert any(line.endswith(wanted) for line in machine.asked())
    count = len(machine.asked())
    assert machine.run("make", "gpu-engine-sglang", cwd=project).returncode == 0 and len(machine.asked()) == count
    os.utime(project / "requirements/gpu-sglang-engine-py311.txt", (2**32, 2**32))
    machine.run("make", "gpu-engine-sglang", cwd=project)
    assert len(machine.asked()) > count


def test_the_binding_is_not_compiled_without_what_it_needs(machine: Machine) -> None:
    """With the compilers there, the stub's answer to `import torch` decides."""
    python = machine.path("bin/python3.11").read_text()
    machine.program("bin/python", python.replace("*get_path*", "*importlib.metadata*) exit 1 ;;\n    *get_path*"))
    done = machine.run("bash", "scripts/install_te.sh")
    assert done.returncode == 1 and "lacks a torch for CUDA or transformer-engine 2.11.0" in done.stderr
    machine.path("cuda/bin/nvcc").unlink()
    done = machine.run("bash", "scripts/install_te.sh")
    assert done.returncode == 1 and "cuda/bin/nvcc" in done.stderr and "lacks a torch" not in done.stderr


def pins(path: Path) -> dict[str, str]:
    return dict(line.split("==") for line in path.read_text().splitlines() if not line.startswith("#"))


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_a_lock_names_releases_alone(lock: Path) -> None:
    """No host, folder or file of the machine that made it; --no-deps takes it as it is."""
    lines = [line for line in lock.read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9._-]+==[a-z0-9.]+", line) for line in lines) and len(lines) > 100
    assert len(set(lines)) == len(lines)


def test_locks_project_and_script_ask_for_the_same() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {name: list(map(Requirement, asked)) for name, asked in project["optional-dependencies"].items()}
    base = list(map(Requirement, project["dependencies"]))
    kinds = {"trainer": [*base, *extras["gpu"], *extras["data"], *extras["wandb"]]}
    kinds["sglang-trainer"] = kinds["trainer"] + extras["sglang"]
    kinds |= {"sglang-engine": extras["sglang"], "vllm-engine": extras["vllm"]}
    assert sorted(path.name for path in LOCKS) == sorted(f"gpu-{k}-py31{v}.txt" for k in kinds for v in (1, 2))
    for lock in LOCKS:
        locked = pins(lock)
        for asked in kinds[lock.stem.removeprefix("gpu-").rsplit("-", 1)[0]]:
            name = asked.name.replace("_", "-")
            if name == "transformer-engine-torch":  # compiled by scripts/install_te.sh
                continue
            assert asked.specifier.contains(locked[name], prereleases=True), (lock.name, str(asked), locked[name])
    (te,) = {pins(lock)["transformer-engine"] for lock in LOCKS if "trainer" in lock.name}
    assert f"version={te}\n" in (ROOT / "scripts/install_te.sh").read_text()
    assert {str(asked.specifier) for asked in extras["gpu"] if "transformer" in asked.name} == {f"=={te}"}


def test_no_message_names_a_project_on_pypi_that_is_not_ours() -> None:
    """megatron-rl is not on PyPI: whoever takes that name there would be installed."""
    folders = [ROOT / name for name in "megatron_rl kernels scripts slurm docs requirements examples".split()]
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    paths += [*ROOT.glob("*.md"), ROOT / "Makefile", ROOT / "pyproject.toml"]
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in paths
        for line in path.read_text(errors="replace").splitlines()
        if re.search(r"megatron[-_]rl\[|pip3? install[^`]*\bmegatron[-_]rl\b", line)
    ]
    assert not found, "\n".join(found)
