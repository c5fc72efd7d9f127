"""The CPU shim: it rewrites Megatron, touches nothing in torch, and refuses to come too late."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rl import device
from megatron_rl.kernels.megatron_cpu import REWRITES
from tests.worlds import ROOT

if device.ON_GPU:
    pytest.skip("the shim is for CPUs", allow_module_level=True)


def _run(code: str, cwd: Path) -> str:
    """The code's output, from a fresh interpreter that sees the repository from another folder."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MEGATRON_RL_DEVICE": "cpu"}
    env.pop("TORCHDYNAMO_DISABLE", None)
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


UNTOUCHED = """
import sys, torch, torch.distributed
import torch._dynamo  # replaces torch.manual_seed when it is first imported, whoever does it

def picture():
    spaces = [torch, torch.cuda, torch.Tensor, torch.nn.Module, torch.distributed, torch.autograd, torch.utils]
    return {(i, name): id(value) for i, space in enumerate(spaces) for name, value in list(vars(space).items())
            if callable(value) or isinstance(value, (bool, int, str))}

before = picture()
from megatron_rl import device
from megatron_rl.kernels.megatron_cpu import REWRITES
finders = len(sys.meta_path)
device.prepare_megatron()
device.prepare_megatron()
assert len(sys.meta_path) == finders + 1, "prepared twice"

import megatron.core
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.pipeline_parallel import schedules
from megatron.core import dist_checkpointing
from megatron.core.tensor_parallel import random
from transformers import Qwen2ForCausalLM
import megatron_rl.policy

after = picture()
changed = sorted(name for key, name in ((k, k[1]) for k in before) if after.get(key) != before[key])
print("changed:", changed)
print("rng:", random._get_cuda_rng_state().device)
"""

TOO_LATE = """
import megatron.core
from megatron_rl import device
from megatron_rl.kernels.megatron_cpu import REWRITES
for _ in range(2):
    try:
        device.prepare_megatron()
        print("no error")
    except RuntimeError as error:
        print(error)
"""


def test_preparing_twice_works_from_any_folder_and_leaves_torch_alone(tmp_path: Path) -> None:
    assert _run(UNTOUCHED, tmp_path).splitlines() == ["changed: []", "rng: cpu"]


def test_megatron_imported_before_the_shim_is_an_error(tmp_path: Path) -> None:
    lines = _run(TOO_LATE, tmp_path).splitlines()
    assert len(lines) == 2 and all("import megatron_rl.policy first" in line for line in lines)


def _sources() -> dict[str, str]:
    spec = importlib.util.find_spec("megatron")
    assert spec is not None and spec.submodule_search_locations is not None
    root = Path(next(iter(spec.submodule_search_locations))) / "core"
    return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*.py")}


def test_every_rewrite_still_finds_its_target() -> None:
    """A Megatron release that spells a line differently must fail here, not inside a schedule."""
    text = "\n".join(_sources().values())
    assert [pattern.pattern for pattern, _ in REWRITES if not pattern.search(text)] == []


def test_rewritten_modules_of_the_training_path_ask_for_no_cuda_device() -> None:
    sources = _sources()
    modules = [
        "pipeline_parallel/schedules.py",
        "pipeline_parallel/p2p_communication.py",
        "optimizer/optimizer.py",
        "optimizer/distrib_optimizer.py",
        "optimizer/clip_grads.py",
        "distributed/param_and_grad_buffer.py",
        "distributed/finalize_model_grads.py",
        "tensor_parallel/layers.py",
        "tensor_parallel/mappings.py",
        "models/common/embeddings/rotary_pos_embedding.py",
    ]
    asks = re.compile(r"""torch\.cuda\.current_device\(\)|device=["']cuda["']|\.cuda\(\)|cuda\.FloatTensor""")
    assert sum(bool(asks.search(sources[module])) for module in modules) > 5  # else the list proves nothing
    for module in modules:
        source = sources[module]
        for pattern, replacement in REWRITES:
            source = pattern.sub(replacement, source)
        assert not asks.search(source), module
        compile(source, module, "exec")
