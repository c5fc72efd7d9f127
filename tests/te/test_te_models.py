"""The real models of Transformer Engine, of every recipe and architecture, built without a GPU: tensors are fake, and
nothing is computed. `make test-te` compiles the engine and runs this."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config import load_config
from tests.worlds import ROOT

pytestmark = [
    pytest.mark.te,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="type `make test-te`"),
]
SIZES = {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "num_hidden_layers": 4}
QWEN2 = SIZES | {"model_type": "qwen2", "vocab_size": 151936, "tie_word_embeddings": True}
QWEN2 |= {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2}
QWEN3 = SIZES | {"model_type": "qwen3", "vocab_size": 151936, "tie_word_embeddings": False, "head_dim": 128}
QWEN3 |= {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8}
MOE = QWEN3 | {"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_key_value_heads": 4}
MOE |= {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA = QWEN3 | {"model_type": "llama", "vocab_size": 128256, "intermediate_size": 14336, "rope_theta": 5e5}
LLAMA |= {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192}}
MISTRAL = QWEN3 | {"model_type": "mistral", "vocab_size": 32768, "intermediate_size": 14336, "sliding_window": None}

Case = tuple[dict[str, Any], dict[str, Any], dict[str, Any], list[int]]
# name: architecture, layout, other options, ranks to build; together the ranks of a pipeline have all rows
CASES: dict[str, Case] = {
    "qwen2 tied tp2": (QWEN2, {"world_size": 8, "tp": 2}, {}, [1]),
    "qwen2 tied tp2 pp2": (QWEN2, {"world_size": 8, "tp": 2, "pp": 2}, {}, [0, 7]),
    "qwen2, fewer key-value groups than tp": (
        QWEN2 | {"num_attention_heads": 16, "hidden_size": 1024}, {"world_size": 8, "tp": 8}, {}, [5]
    ),
    "qwen2 tp4 pp2 vpp2": (QWEN2 | {"num_attention_heads": 16, "num_key_value_heads": 4, "hidden_size": 1024},
                           {"world_size": 16, "tp": 4, "pp": 2, "vpp": 2}, {}, [0, 15]),
    "qwen3 tp4 cp2": (QWEN3, {"world_size": 8, "tp": 4, "cp": 2}, {}, [6]),
    "qwen3 tp8 pp2": (QWEN3, {"world_size": 16, "tp": 8, "pp": 2}, {}, [0, 15]),
    "qwen3, plain optimizer": (QWEN3, {"world_size": 8, "tp": 8, "distributed_optimizer": False}, {}, [0]),
    "qwen3 float32": (QWEN3, {"world_size": 8, "tp": 8}, {"model": {"dtype": "float32"}}, [0]),
    "qwen3, optimizer on the host": (QWEN3, {"world_size": 8, "tp": 8}, {"optimizer": {"cpu_offload": True}}, [0]),
    "experts ep8": (MOE, {"world_size": 8, "tp": 1, "ep": 8, "sp": False}, {}, [3]),
    "experts tp4": (MOE, {"world_size": 8, "tp": 4}, {}, [2]),
    "experts tp4 ep4": (MOE, {"world_size": 8, "tp": 4, "ep": 4}, {}, [6]),
    "experts tp8 ep8": (MOE, {"world_size": 8, "tp": 8, "ep": 8}, {}, [7]),
    "experts tp2 pp2 ep4": (MOE, {"world_size": 16, "tp": 2, "pp": 2, "ep": 4}, {}, [0, 8]),
    "experts, two dense layers": (MOE | {"mlp_only_layers": [0, 1]}, {"world_size": 8, "tp": 2, "ep": 8}, {}, [0]),
    "llama tp8": (LLAMA, {"world_size": 8, "tp": 8}, {}, [4]),
    "mistral tp2": (MISTRAL, {"world_size": 8, "tp": 2}, {}, [0]),
}  # fmt: skip


def raw_of(case: Case) -> dict[str, Any]:
    hf, parallel, more, _ = case
    raw: dict[str, Any] = {
        "model": {"hf_config": hf, "dtype": "bfloat16", "recompute": "full"},
        "parallel": {"sp": True} | parallel,
        "data": {"type": "countdown", "max_prompt_tokens": 64},
        "rollout": {"samples_per_prompt": 8, "max_response_tokens": 2048},
        "train": {"prompts_per_step": 32, "prompts_per_minibatch": 8, "micro_batch_tokens": 8192},
        "optimizer": {"lr": 1e-6},
        "logging": {"run_dir": "runs"},
    }
    return raw | {name: raw[name] | section for name, section in more.items()}


def recipes() -> dict[str, Case]:
    """The recipes whose model or layout differs from those before."""
    found: dict[str, Case] = {}
    for path in sorted((ROOT / "configs").glob("*b_*.yaml")):
        raw = load_config(path).model_dump(mode="json")
        model = {name: value for name, value in raw["model"].items() if name not in ("hf_config", "path")}
        more = {"model": model, "optimizer": raw["optimizer"]}
        case = (raw["model"]["hf_config"], raw["parallel"], more, [0])
        if case not in found.values():
            found[path.stem] = case
    return found


@pytest.fixture(scope="session")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What answers for the CUDA runtime."""
    library = tmp_path_factory.mktemp("runtime") / "libcudart_answers.so"
    source = Path(__file__).with_name("cudart.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


ALL = recipes() | CASES


@pytest.mark.parametrize("name", ALL)
def test_a_model_of_transformer_engine(name: str, runtime: Path, tmp_path: Path) -> None:
    """Every parameter has a row and the right shape, lies on the device, and is the optimizer's."""
    case = ALL[name]
    raw = raw_of(case)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "LD_PRELOAD": str(runtime), "MEGATRON_RL_DEVICE": ""}
    rows: set[str] = set()
    expected: set[str] = set()
    for rank in case[3]:
        command = [sys.executable, "-W", "ignore", "-m", "tests.te.build_case", tmp_path / "config.json", str(rank)]
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        built = json.loads(done.stdout.splitlines()[-1])
        assert built["faults"] == []
        assert "TransformerEngineBaseModule" in built["layers"]
        if raw["optimizer"].get("cpu_offload"):
            assert built["optimizers"] == ["HybridDeviceOptimizer"]
        else:
            assert built["has engine's Adam"] and built["optimizers"] == ["FusedAdam"]
        rows.update(built["rows"])
        expected.update(built["expected"])
    assert rows == expected
