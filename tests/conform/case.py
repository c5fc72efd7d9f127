"""Tiny runs whose layouts are compared, and what `megatron-rl conform` does with one."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_rl.config import parse_config
from tests.tiny import HF, tiny_raw

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "tp2_sp": {"tp": 2, "sp": True},
    "dp2": {"world_size": 2},
    "pp2": {"pp": 2},
    "cp2": {"cp": 2},
    "ep2": {"world_size": 2, "ep": 2},
}
MOE = HF | {
    "model_type": "qwen3_moe",
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "tie_word_embeddings": False,
}
LOSSES: dict[str, dict[str, Any]] = {
    "kl_cov": {"type": "kl_cov", "select_fraction": 0.1},
    "clip_cov": {"type": "clip_cov", "select_fraction": 0.1, "cov_low": 0.0, "cov_high": 3.0},
    "gspo": {"type": "gspo", "aggregation": "seq_mean_token_mean", "eps_low": 0.2, "eps_high": 0.3},
}


def raw_config(
    folder: Path, parallel: dict[str, Any], hf: dict[str, Any] = HF, loss: str = "kl_cov", **model: Any
) -> dict[str, Any]:
    """A tiny run. `model`: options of that section."""
    # as on the GPUs for which a layout is tried
    parallel, model = {"world_size": None, "tp": 1} | parallel, {"hf_config": hf, "activations": "model"} | model
    return tiny_raw(folder, parallel=parallel, model=model, loss=LOSSES[loss])


def conformed(
    raw: dict[str, Any],
    folder: Path,
    against: str = "tp=1",
    layers: int | None = None,
    room: float | None = None,
    tokens: int = 256,
) -> str:
    """What `megatron-rl conform` does on one rank, and what it prints; the answer is in folder/conform.json. `room`: of
    the memory, bytes."""
    from megatron_rl import device
    from megatron_rl.conform.commands import reference_of
    from megatron_rl.conform.run import Question, main

    config = parse_config(raw)
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.ExitStack() as stack:
        if room is not None:
            stack.enter_context(mock.patch.object(device, "memory_bytes", lambda: room))
        main(config, Question(reference_of(config, against), tokens, layers, with_engine=True), folder)
    return printed.getvalue()
