"""The root folder `kernels/` beside the PyPI package of that name; what the command line may not import."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROBE = """
import importlib.metadata, os, sys
sys.path.insert(0, os.getcwd())
from transformers import LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM
from transformers.utils import is_kernels_available
installed = any(d.metadata["Name"] == "kernels" for d in importlib.metadata.distributions())
assert installed or not is_kernels_available(), "transformers takes the folder kernels/ for the package"
print("transformers imports")
"""
MODULE = "transformers_probe"


def run(command: list[str], *, path: Path | None = None) -> str:
    env = {**os.environ, "PYTHONPATH": str(path) if path else ""}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_transformers_imports_in_python_from_the_root() -> None:
    assert "transformers imports" in run([sys.executable, "-c", PROBE])


def test_transformers_imports_in_torchrun_from_the_root(tmp_path: Path) -> None:
    (tmp_path / f"{MODULE}.py").write_text(PROBE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    assert "transformers imports" in run([*torchrun, "-m", MODULE], path=tmp_path)


def test_transformers_imports_in_pytest_from_the_root() -> None:
    assert str(ROOT) in sys.path, "pytest no longer puts the root on sys.path: this test then proves nothing"
    from transformers import Qwen2ForCausalLM
    from transformers.utils import is_kernels_available

    installed = any(d.metadata["Name"] == "kernels" for d in importlib.metadata.distributions())
    assert Qwen2ForCausalLM.__name__ == "Qwen2ForCausalLM"
    assert installed or not is_kernels_available()


def test_an_installed_kernels_package_wins_over_the_folder(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("get_kernel = 'the package'\n")
    code = "import sys; assert sys.path[0] == ''; from kernels import get_kernel; print(get_kernel)"
    assert run([sys.executable, "-c", code], path=tmp_path) == "the package\n"


def test_the_folder_is_reached_as_megatron_rl_kernels() -> None:
    import megatron_rl.kernels

    assert not (ROOT / "kernels" / "__init__.py").exists(), "see kernels/README.md"
    assert [Path(path).resolve() for path in megatron_rl.kernels.__path__] == [ROOT / "kernels"]


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["train", "--check", "CONFIG"]])
def test_the_command_line_answers_without_torch(arguments: list[str], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "model: {hf_config: {model_type: qwen2, hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1,"
        " num_attention_heads: 1}}\ndata: {type: countdown}\n"
    )
    arguments = [str(config) if argument == "CONFIG" else argument for argument in arguments]
    code = f"""
import sys
sys.argv = ["megatron-rl", *{arguments!r}]
from megatron_rl.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = {{"torch", "megatron", "transformers", "numpy"}} & set(sys.modules)
assert not heavy, heavy
"""
    run([sys.executable, "-c", code])
