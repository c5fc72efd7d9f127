"""Real engine servers for tests, and what tests do with them on the ranks of a world."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rl.config import parse_config
from megatron_rl.rollout.engine import EngineError, Place, Request, SamplingParams
from megatron_rl.rollout.servers.protocol import LaunchSpec
from tests.tiny import tiny_raw

ENGINES = ("sglang", "vllm")
KV_TOKENS = 8192  # of a server of `started`
# heads of width 32, the narrowest that vLLM's CPU attention takes; vocabulary of the countdown tokenizer
HF: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}


def raw_of(folder: Path, name: str, engine: str, *, tied: bool = True, **sections: Any) -> dict[str, Any]:
    """A tiny run that generates with servers."""
    hf = HF | {"tie_word_embeddings": tied}
    rollout = {"engine": engine} | sections.pop("rollout", {})
    return tiny_raw(folder, name, model={"hf_config": hf}, rollout=rollout, optimizer={"lr": 1e-2}, **sections)


def python_of(engine: str) -> Path:
    """The interpreter with the engine; skips without it."""
    path = Path(".engines") / engine / "bin" / "python"
    if not path.is_file():
        pytest.skip(f"no {path}: type `make engines`")
    return path.absolute()


@contextlib.contextmanager
def serving(
    engine: str,
    folder: Path,
    *,
    tp: int = 1,
    tied: bool = True,
    with_routes: bool = False,
    deterministic: bool = False,
    **hf: Any,
) -> Iterator[Any]:
    """A server of the tiny model's architecture, started as a run starts it: (process, url)."""
    from transformers import AutoConfig

    from megatron_rl.data.tokenizer import build_tokenizer, vocab_size

    python_of(engine)
    tokenizer = build_tokenizer(parse_config(tiny_raw(folder)))
    config = AutoConfig.for_model(**(HF | {"tie_word_embeddings": tied, "vocab_size": vocab_size(tokenizer)} | hf))
    names = {"qwen2": "Qwen2ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
    config.architectures, config.dtype = [names[config.model_type]], "float32"
    config.save_pretrained(folder / "served")
    tokenizer.save_pretrained(folder / "served")
    options = {"with_routes": with_routes, "deterministic": deterministic}
    with started(engine, folder / "served", folder, tp=tp, **options) as server:
        yield server


@contextlib.contextmanager
def started(
    engine: str,
    model_dir: Path,
    folder: Path,
    *,
    tp: int = 1,
    with_routes: bool = False,
    deterministic: bool = False,
    own_weights: bool = False,
    dtype: str = "float32",
) -> Iterator[Any]:
    """A server of a model folder, started as a run starts it, but that it may load the folder's weights: (process,
    url)."""
    from megatron_rl.rollout.build import DIALECTS
    from megatron_rl.rollout.servers.processes import EngineProcess, free_port

    port = free_port()
    spec = LaunchSpec(
        python=python_of(engine),
        model_dir=model_dir,
        port=port,
        tp=tp,
        dtype=dtype,
        devices=(),
        context_tokens=400,
        max_concurrency=16,
        kv_tokens=KV_TOKENS,
        memory_fraction=0.5,
        colocated=False,
        extra_args=(),
        with_routes=with_routes,
        deterministic=deterministic,
    )
    argv, env = DIALECTS[engine]().command(spec)
    assert "dummy" in argv
    argv = ["auto" if own_weights and word == "dummy" else word for word in argv]
    process = EngineProcess(argv, env, folder / f"{engine}.log")
    try:
        wait_ready(engine, process, f"http://127.0.0.1:{port}")
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.stop()


def wait_ready(engine: str, process: Any, url: str, seconds: float = 240) -> None:
    from megatron_rl.rollout.build import DIALECTS
    from megatron_rl.rollout.servers.http import Loop, Server

    loop, dialect, deadline = Loop(), DIALECTS[engine](), time.monotonic() + seconds
    try:
        while True:
            assert process.alive(), process.obituary()
            try:
                loop.submit(dialect.health(Server(url, loop.session))).result()
                return
            except EngineError:
                assert time.monotonic() < deadline, process.obituary()
            time.sleep(0.5)
    finally:
        loop.close()


# --- on the ranks of a world ------------------------------------------------------------------------------------------


def train_and_compare(raws: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Train each run step by step; after every update what `compare` finds."""
    return [_train_and_compare(raw) for raw in raws]


def _train_and_compare(raw: dict[str, Any]) -> list[dict[str, Any]]:
    from megatron_rl import train
    from megatron_rl.metrics.write import RunLogger
    from megatron_rl.parallel.groups import init_groups
    from tests.worlds import leave_layout

    config, found = parse_config(raw), []
    try:
        run = train.set_up(config, init_groups(config.parallel, config.seed))
        with RunLogger(config.run_dir, config, rank=run.groups.rank, start_step=0) as logger:
            before: dict[str, Tensor] | None = None
            for step in range(config.train.num_steps):
                metrics = train.run_step(run, step, logger)
                with run.served.session(run.timers):
                    weights = {name: tensor.clone() for name, tensor in run.policy.hf_weights()}
                    found.append(compare(run, weights, before) | {"mismatch": metrics["mismatch/abs_max"]})
                before = weights
        run.close()
    finally:
        leave_layout()
    return found


def compare(run: Any, weights: dict[str, Tensor], before: dict[str, Tensor] | None) -> dict[str, Any]:
    """The engine's greedy continuations against those of transformers with the exported weights: whether the tokens are
    equal, the largest difference of log-probabilities, and that to the weights before the last update."""
    sampling = SamplingParams(0.0, 1.0, 0, 12, (), seed=0)
    prompts = [prompt.token_ids for prompt in run.collector.cursor.prompts[:3]]
    rollouts = run.served.engine.generate([Request(i, 0, prompt, sampling) for i, prompt in enumerate(prompts)])
    same, worst, stale = True, 0.0, 0.0
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        tokens, logprobs = greedy(run.policy.hf_config, weights, prompt, 12)
        same &= rollout.token_ids.tolist() == [*prompt, *tokens]
        engine = rollout.rollout_logprobs[rollout.sampled]
        worst = max(worst, float((engine - logprobs).abs().max()))
        if before is not None:
            old = score(run.policy.hf_config, before, [*prompt, *tokens])[-12:]
            stale = max(stale, float((engine - old).abs().max()))
    versions = {rollout.weight_version for rollout in rollouts}
    return {"same": same, "worst": worst, "stale": stale, "versions": versions}


def model_with(hf_config: Any, weights: dict[str, Tensor]) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


@torch.no_grad()
def score(hf_config: Any, weights: dict[str, Tensor], tokens: list[int]) -> Tensor:
    """log pi of every token but the first: `[len(tokens) - 1]`."""
    logits = model_with(hf_config, weights)(torch.tensor([tokens])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def greedy(hf_config: Any, weights: dict[str, Tensor], prompt: tuple[int, ...], count: int) -> tuple[list[int], Tensor]:
    model, tokens = model_with(hf_config, weights), list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[-count:], score(hf_config, weights, tokens)[-count:]


def lone_place() -> Place:
    """A world of one process, for tests that need no group."""
    return Place(0, 1, 0, lambda value: [value])


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
