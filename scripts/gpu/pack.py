"""The packages that scripts/gpu/run.py needs beside PyTorch, as wheels that a machine without a network can be given.

    python scripts/gpu/pack.py .wheels     # `make test-gpu-wheels`

The releases are those of requirements/cpu.txt, for Python 3.11 and 3.12 on x86-64. SGLang itself is not carried: of its
wheel two files are kept, which say how a worker reads a handle to another process's memory.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ("3.11", "3.12")
LIMIT = 60 * 10**6  # bytes
SGLANG_FOLDER = "sglang"
SGLANG_FILES = ("sglang/srt/utils/common.py", "sglang/srt/utils/patch_torch.py")
PINS = "pins.txt"
# What the parts import, and what that asks for. PyTorch brings the rest: NumPy, sympy, jinja2, fsspec, filelock.
NAMES = (
    "megatron-core transformers tokenizers safetensors huggingface_hub httpx2 httpcore2 h11 anyio truststore regex "
    "tqdm PyYAML packaging pydantic pydantic_core annotated-types typing-inspection typing_extensions typer rich "
    "markdown-it-py mdurl Pygments shellingham click annotated-doc aiohttp aiosignal aiohappyeyeballs attrs frozenlist "
    "multidict propcache yarl idna psutil mpmath plotly narwhals"
).split()
_PLATFORMS = ["manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"]
_PLATFORMS += ["manylinux_2_12_x86_64", "manylinux2010_x86_64", "manylinux_2_5_x86_64", "manylinux1_x86_64"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", action="append", choices=PYTHONS, help="these alone; default all")
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    pins = pinned(NAMES)
    (folder / PINS).write_text("".join(f"{pin}\n" for pin in pins))
    for python in options.python or PYTHONS:
        download(pins, python, _PLATFORMS, folder)
    sglang(folder / SGLANG_FOLDER)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {len(list(folder.glob('*.whl')))} wheels, {size / 10**6:.1f} MB")
    if size > LIMIT:
        sys.exit(f"that is more than {LIMIT / 10**6:.0f} MB; leave a Python out with --python, or remove older wheels")


def pinned(names: tuple[str, ...] | list[str]) -> list[str]:
    """Return `name==version` of each, as requirements/cpu.txt has it. Raises: SystemExit for one that it lacks."""
    lines = (ROOT / "requirements" / "cpu.txt").read_text().splitlines()
    known = {line.partition("==")[0].lower(): line for line in lines if "==" in line and not line.startswith("#")}
    missing = [name for name in names if name.lower() not in known]
    if missing:
        sys.exit(f"requirements/cpu.txt has no {', '.join(missing)}")
    return [known[name.lower()] for name in names]


def download(pins: list[str], python: str, platforms: list[str], folder: Path) -> None:
    """Bring the wheels of one Python."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, "--implementation", "cp", "--dest", str(folder)]
    command += [word for platform in platforms for word in ("--platform", platform)]
    subprocess.run([*command, *pins], check=True)


def sglang(target: Path) -> None:
    """Keep two files of SGLang's wheel, in the release that the servers run."""
    lock = (ROOT / "requirements" / "gpu-sglang-engine-py311.txt").read_text()
    pin = re.search(r"^sglang==\S+", lock, re.M)
    assert pin is not None
    with tempfile.TemporaryDirectory() as folder:
        download([pin[0]], "3.11", ["manylinux_2_34_x86_64", *_PLATFORMS], Path(folder))
        (wheel,) = Path(folder).glob("*.whl")
        target.mkdir(exist_ok=True)
        with zipfile.ZipFile(wheel) as files:
            for name in SGLANG_FILES:
                (target / Path(name).name).write_bytes(files.read(name))


def install(folder: Path, site: Path) -> None:
    """Install the carried wheels into `site`, which goes before this Python's own packages.

    A folder and no virtual environment: one made of another does not see the packages of that one, PyTorch among them.
    Raises: SystemExit for a folder that `main` has not filled.
    """
    if not (folder / PINS).is_file():
        sys.exit(f"--wheels {folder}: no {PINS} there; fill the folder with `python scripts/gpu/pack.py {folder}`")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--find-links", str(folder), "--target", str(site), "--requirement", str(folder / PINS)]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
