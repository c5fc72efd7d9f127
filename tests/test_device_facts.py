"""What follows from the device, asked as if there were a GPU: no kernel runs here."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import inspect
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_rl import device, launch
from megatron_rl.config import Config, parse_config
from megatron_rl.config.environment import for_libraries
from megatron_rl.errors import ConfigError, UserError
from megatron_rl.packing import Layout
from megatron_rl.rollout.sampling import cumsum
from megatron_rl.run import forbid_nondeterminism


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The facts of a GPU without Transformer Engine; patched with what a test adds."""
    monkeypatch.setattr(device, "ON_GPU", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    device.flash_attention.cache_clear()
    yield monkeypatch
    device.flash_attention.cache_clear()


def with_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.machinery.ModuleSpec("transformer_engine", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "transformer_engine" else None)


def test_a_cpu_has_no_transformer_engine_even_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron_rl.policy  # noqa: F401  prepares Megatron

    assert importlib.util.find_spec("transformer_engine") is None
    with pytest.raises(ImportError):
        importlib.import_module("transformer_engine")
    with_engine(monkeypatch)
    assert not device.has_transformer_engine()
    assert device.layers("auto") == device.layers("torch") == "torch"
    with pytest.raises(UserError, match="runs on GPUs alone, and this process has none; or set model.layers=torch"):
        device.layers("transformer_engine")


def test_a_gpu_takes_transformer_engine_where_it_is(gpu: pytest.MonkeyPatch) -> None:
    assert device.layers("auto") == "torch"
    with pytest.raises(UserError, match="is not installed; `make gpu` installs it.* or set model.layers=torch"):
        device.layers("transformer_engine")
    with_engine(gpu)
    assert device.layers("auto") == device.layers("transformer_engine") == "transformer_engine"
    assert device.layers("torch") == "torch"


def test_a_transformer_engine_of_another_torch_is_named_before_megatron_meets_it(gpu: pytest.MonkeyPatch) -> None:
    with_engine(gpu)
    with pytest.raises(UserError, match="(?s)cannot be imported: .*transformer_engine.*`make gpu`"):
        device.prepare_megatron()


def test_packed_attention_is_torchs_own_for_bfloat16_on_a_gpu(gpu: pytest.MonkeyPatch) -> None:
    """Its arguments are those of the call; its own stand-in for tracing then answers with the right shape."""
    flash = device.flash_attention(torch.bfloat16)
    assert flash is not None and device.flash_attention(torch.float32) is None
    options = {"scale": None, "window_size": (-1, 0), "enable_gqa": True}
    inspect.signature(flash).bind(*range(7), **options)
    with FakeTensorMode(), torch.no_grad():
        query, key = (torch.empty(24, heads, 64, dtype=torch.bfloat16, device="cuda") for heads in (8, 2))
        bounds = torch.empty(4, dtype=torch.int32, device="cuda")
        out = flash(query, key, key, bounds, bounds, 16, 16, **options)
    assert out.shape == query.shape and out.device.type == "cuda"
    gpu.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    device.flash_attention.cache_clear()
    assert device.flash_attention(torch.bfloat16) is None


def config(**sections: Any) -> Config:
    raw: dict[str, Any] = {
        "model": {"hf_config": {"model_type": "qwen2", "hidden_size": 32, "intermediate_size": 48}},
        "data": {"type": "countdown"},
        "train": {"micro_batch_tokens": 8192},
    }
    raw["model"]["hf_config"] |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    raw["model"]["hf_config"] |= {"max_position_embeddings": 4096, "rope_theta": 1e4, "rms_norm_eps": 1e-6}
    return parse_config(raw | {name: raw.get(name, {}) | section for name, section in sections.items()})


@pytest.mark.parametrize("parallel", [{}, {"tp": 2, "sp": True}, {"cp": 2}, {"tp": 4, "sp": True, "cp": 2}])
def test_a_gpu_computes_whole_tiles_of_rows(gpu: pytest.MonkeyPatch, parallel: dict[str, Any]) -> None:
    cp = parallel.get("cp", 1)
    groups: Any = SimpleNamespace(dp_rank=0, dp_size=1, dp_ranks=(0,) * cp, cp_rank=0, cp_size=cp, pp_size=1)
    layout = Layout.of(config(parallel=parallel), groups)
    for total in (1, 127, 128, 1000, 5000):
        rows, rest = divmod(layout.filled(total), cp)
        assert rest == 0 and rows % 128 == 0 and 0 <= rows * cp - total < 128 * cp
    assert layout.filled(8190) == 8192  # the budget stays the bound


def test_sums_along_a_row_are_allowed_under_deterministic_algorithms(gpu: pytest.MonkeyPatch) -> None:
    rows = torch.rand(3, 50, dtype=torch.float64)
    real = torch.Tensor.cumsum
    summed: list[tuple[bool, int]] = []

    def noted(self: torch.Tensor, dim: int) -> torch.Tensor:
        summed.append((torch.are_deterministic_algorithms_enabled(), len(self)))
        return real(self, dim)

    gpu.setattr(torch.Tensor, "cumsum", noted)
    try:
        forbid_nondeterminism()
        found = [cumsum(rows), cumsum(rows[:1])]
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert summed == [(False, 3), (False, 2)]  # a single row goes to another kernel
    assert torch.equal(found[0], real(rows, -1)) and torch.equal(found[1], real(rows[:1], -1))


def test_a_rank_tells_its_libraries_before_it_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    exact, plain = {"NVIDIA_TF32_OVERRIDE": "0"}, config(model={"dtype": "bfloat16"})
    assert for_libraries(plain) == {} and for_libraries(config()) == exact
    settings = for_libraries(config(train={"deterministic": True}))
    assert settings.items() > exact.items() and settings["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"
    for name in settings:
        monkeypatch.setenv(name, "")
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(launch, "run_worker", lambda main, run_dir: main())
    seen: dict[str, str] = {}
    launch.in_world(lambda: seen.update(os.environ), [], tmp_path, processes=1, environment=settings)
    assert settings.items() <= seen.items()


def test_kernels_start_in_the_order_of_their_calls_but_not_in_engines(gpu: pytest.MonkeyPatch) -> None:
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"  # importing device sets it, before the GPU is asked for
    gpu.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert device.visible_devices([1])["CUDA_DEVICE_MAX_CONNECTIONS"] == ""


def test_float32_over_context_parallel_ranks_has_no_attention_in_transformer_engine() -> None:
    with pytest.raises(ConfigError, match="takes bfloat16 alone; set dtype=bfloat16, model.layers=torch, or cp=1"):
        config(model={"layers": "transformer_engine"}, parallel={"cp": 2})
    config(model={"layers": "transformer_engine", "dtype": "bfloat16"}, parallel={"cp": 2})
    config(model={"layers": "torch"}, parallel={"cp": 2})
