"""What must agree in `rollout`: the engine, its servers, the way of the weights. Checked by checks.py."""

from __future__ import annotations

import socket
import urllib.parse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megatron_rl.models.facts import has_dense_layers, head_width, is_moe

if TYPE_CHECKING:
    from megatron_rl.config.rollout import ServerConfig
    from megatron_rl.config.sections import Config


def engine_faults(config: Config) -> Iterator[str]:
    """Yield one line per fault in `rollout`, with its remedy."""
    rollout = config.rollout
    yield from _replay_faults(config)
    if rollout.is_embedded:
        if rollout.max_staleness:
            yield (
                f"rollout.max_staleness={rollout.max_staleness}: the embedded engine shares its process with the "
                "trainer and cannot generate ahead; set it to 0, or rollout.engine to sglang or vllm"
            )
        return
    for name, server in _servers(config).items():
        colocated = server is rollout.server and rollout.weight_sync.mode == "colocated"
        yield from [*_url_faults(name, server, colocated), *_memory_faults(name, server, config.max_sequence_tokens)]
    if rollout.server.share_memory and rollout.max_staleness:
        yield (
            "rollout.server.share_memory=true lets trainer and servers take turns, rollout.max_staleness > 0 lets them "
            "work at the same time; choose one"
        )
    if rollout.max_staleness and config.loss.rollout_correction is None:
        yield (
            f"rollout.max_staleness={rollout.max_staleness} trains on responses of older weights, which needs the "
            "correction; set loss.rollout_correction={cap: 2}, or max_staleness=0"
        )


def beside_faults(config: Config) -> Iterator[str]:
    """Yield why the sets cannot be evaluated beside training."""
    server, held_out = config.eval.server, getattr(config.data, "eval_path", None)
    if not config.eval.sets:
        yield "eval.beside=true is for eval.sets, and there are none; name some, or set beside=false"
    if config.rollout.is_embedded:
        yield (
            "eval.beside=true: the embedded engine shares its process with the trainer, and cannot evaluate meanwhile; "
            "set rollout.engine to sglang or vllm, or beside=false"
        )
    if server.share_memory:
        yield (
            "eval.server.share_memory=true with eval.beside=true: servers that work while the trainer does cannot take "
            "turns with it; set share_memory=false, or beside=false"
        )
    if shared := set(server.urls) & set(config.rollout.server.urls):
        yield (
            f"eval.server.urls and rollout.server.urls both have {', '.join(sorted(shared))}, which cannot hold the "
            "weights of two steps; give the evaluation other servers, or set eval.beside=false"
        )
    if config.train.keep_best and not held_out:
        yield (
            "train.keep_best=true with eval.beside=true: eval/average comes when its step's weights are gone; give "
            "held-out problems, whose eval/accuracy is known within the step (data.eval_path), or set one to false"
        )


def _servers(config: Config) -> dict[str, ServerConfig]:
    """Return the run's kinds of servers by the name of their options."""
    beside = config.eval.beside and config.train.eval_every
    return {"rollout.server": config.rollout.server} | ({"eval.server": config.eval.server} if beside else {})


def _replay_faults(config: Config) -> Iterator[str]:
    if not config.rollout.routing_replay:
        return
    if config.rollout.engine == "vllm":  # its Model Runner V2 alone reports experts, and does not start on a CPU
        yield (
            "rollout.routing_replay=true: what vLLM reports of its routing was never tried here; set rollout.engine to "
            "sglang or transformers, or routing_replay=false"
        )
    if config.train.share_prompts is True:
        yield (
            "rollout.routing_replay=true with train.share_prompts=true: an engine may take a prompt's token to other "
            "experts in each sample; set share_prompts=auto"
        )
    if "moe" in (config.model.recompute_modules or ()) and config.parallel.pp > 1:
        yield (
            f"rollout.routing_replay=true with model.recompute_modules=[moe] and parallel.pp={config.parallel.pp}: "
            "Megatron then runs a router again without saying for which of the micro-batches in the pipeline; set "
            "model.recompute=full, or leave moe out"
        )


def _url_faults(name: str, server: ServerConfig, colocated: bool) -> Iterator[str]:
    here = ("127.0.0.1", "localhost", "::1", socket.gethostname())
    for url in server.urls:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
            yield f"{name}.urls: {url!r} is no address such as http://node1:30000"
        elif colocated and parts.hostname not in here:
            yield (
                f"rollout.weight_sync.mode=colocated shares memory within one machine, and {url} is another; set it to "
                "disaggregated or disk"
            )
    if len(set(server.urls)) < len(server.urls):
        yield f"{name}.urls: the same server is listed twice"


def _memory_faults(name: str, server: ServerConfig, longest: int) -> Iterator[str]:
    """Yield what is wrong with the servers' memory. longest: tokens of a sequence."""
    if (server.kv_tokens or longest) < longest:
        yield (
            f"{name}.kv_tokens={server.kv_tokens} is below the longest sequence (max_prompt_tokens + "
            f"max_response_tokens = {longest}); raise it, best to {longest} times {name}.max_concurrency"
        )


def model_engine_faults(config: Config, hf: dict[str, Any]) -> Iterator[str]:
    """Yield how the model does not fit the engine. hf: a config.json without faults of its own."""
    rollout = config.rollout
    if rollout.routing_replay and not is_moe(hf):
        yield f"rollout.routing_replay=true: {hf['model_type']} has no experts to route to; set it to false"
    if rollout.is_embedded:
        return
    heads = hf["num_attention_heads"]
    for name, server in _servers(config).items():
        if heads % server.tp:
            yield (
                f"model num_attention_heads={heads} is not divisible by {name}.tp={server.tp}; choose from "
                f"{divisors(heads)}"
            )
    if rollout.engine == "sglang" and is_moe(hf) and has_dense_layers(hf):
        yield (
            "model mlp_only_layers or decoder_sparse_step makes some layers dense, and SGLang gives every layer of "
            f"{hf['model_type']} experts; set rollout.engine to vllm or transformers"
        )
    width = head_width(hf)
    if rollout.engine == "vllm" and hf["model_type"] == "qwen2" and width * heads != hf["hidden_size"]:
        yield (
            f"model head_dim={width} is not hidden_size / num_attention_heads, and vLLM's Qwen2 ignores head_dim; "
            "change one of the three, or set rollout.engine=sglang"
        )


def divisors(number: int) -> list[int]:
    """Return all divisors of a positive number, ascending: what a remedy offers to choose from."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
