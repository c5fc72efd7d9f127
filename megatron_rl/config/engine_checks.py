"""What must agree in `rollout`: the engine, its servers, the way of the weights. Checked by checks.py."""

from __future__ import annotations

import socket
import urllib.parse
from typing import TYPE_CHECKING, Any

from megatron_rl.models.facts import has_dense_layers, head_width, is_moe

if TYPE_CHECKING:
    from megatron_rl.config.rollout import RolloutConfig
    from megatron_rl.config.sections import Config


def engine_faults(config: Config) -> list[str]:
    """Return one line per fault in `rollout`, with its remedy."""
    rollout, faults = config.rollout, _replay_faults(config)
    if rollout.is_embedded:
        if rollout.max_staleness:
            faults.append(
                f"rollout.max_staleness={rollout.max_staleness}: the embedded engine shares its process with the "
                "trainer and cannot generate ahead; set it to 0, or rollout.engine to sglang or vllm"
            )
        return faults
    faults += [*_url_faults(rollout), *_memory_faults(rollout, config.max_sequence_tokens)]
    if rollout.max_staleness and config.loss.rollout_correction is None:
        faults.append(
            f"rollout.max_staleness={rollout.max_staleness} trains on responses of older weights, which needs the "
            "correction; set loss.rollout_correction={cap: 2}, or max_staleness=0"
        )
    return faults


def _replay_faults(config: Config) -> list[str]:
    faults: list[str] = []
    if not config.rollout.routing_replay:
        return faults
    if config.rollout.engine == "vllm":  # its Model Runner V2 alone reports experts, and does not start on a CPU
        faults.append(
            "rollout.routing_replay=true: what vLLM reports of its routing was never tried here; set rollout.engine to "
            "sglang or transformers, or routing_replay=false"
        )
    if config.train.share_prompts is True:
        faults.append(
            "rollout.routing_replay=true with train.share_prompts=true: an engine may take a prompt's token to other "
            "experts in each sample; set share_prompts=auto"
        )
    if "moe" in (config.model.recompute_modules or ()) and config.parallel.pp > 1:
        faults.append(
            f"rollout.routing_replay=true with model.recompute_modules=[moe] and parallel.pp={config.parallel.pp}: "
            "Megatron then runs a router again without saying for which of the micro-batches in the pipeline; set "
            "model.recompute=full, or leave moe out"
        )
    return faults


def _url_faults(rollout: RolloutConfig) -> list[str]:
    faults = []
    for url in rollout.server.urls:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
            faults.append(f"rollout.server.urls: {url!r} is no address such as http://node1:30000")
        elif rollout.weight_sync.mode == "colocated" and not _is_here(parts.hostname):
            faults.append(
                f"rollout.weight_sync.mode=colocated shares memory within one machine, and {url} is another; set it to "
                "disaggregated or disk"
            )
    if len(set(rollout.server.urls)) < len(rollout.server.urls):
        faults.append("rollout.server.urls: the same server is listed twice")
    return faults


def _is_here(host: str) -> bool:
    return host in ("127.0.0.1", "localhost", "::1", socket.gethostname())


def _memory_faults(rollout: RolloutConfig, longest: int) -> list[str]:
    """Return what is wrong with the servers' memory. longest: tokens of a sequence."""
    faults = []
    if rollout.server.share_memory and rollout.max_staleness:
        faults.append(
            "rollout.server.share_memory=true lets trainer and servers take turns, rollout.max_staleness > 0 lets them "
            "work at the same time; choose one"
        )
    if (rollout.server.kv_tokens or longest) < longest:
        faults.append(
            f"rollout.server.kv_tokens={rollout.server.kv_tokens} is below the longest sequence (max_prompt_tokens + "
            f"max_response_tokens = {longest}); raise it, best to {longest} times rollout.server.max_concurrency"
        )
    return faults


def model_engine_faults(rollout: RolloutConfig, hf: dict[str, Any]) -> list[str]:
    """Return how the model does not fit the engine. hf: a config.json without faults of its own."""
    faults = []
    if rollout.routing_replay and not is_moe(hf):
        faults.append(f"rollout.routing_replay=true: {hf['model_type']} has no experts to route to; set it to false")
    if rollout.is_embedded:
        return faults
    heads, tp = hf["num_attention_heads"], rollout.server.tp
    if heads % tp:
        fits = [d for d in range(1, heads + 1) if heads % d == 0]
        faults.append(
            f"model num_attention_heads={heads} is not divisible by rollout.server.tp={tp}; choose from {fits}"
        )
    if rollout.engine == "sglang" and is_moe(hf) and has_dense_layers(hf):
        faults.append(
            "model mlp_only_layers or decoder_sparse_step makes some layers dense, and SGLang gives every layer of "
            f"{hf['model_type']} experts; set rollout.engine to vllm or transformers"
        )
    width = head_width(hf)
    if rollout.engine == "vllm" and hf["model_type"] == "qwen2" and width * heads != hf["hidden_size"]:
        faults.append(
            f"model head_dim={width} is not hidden_size / num_attention_heads, and vLLM's Qwen2 ignores head_dim; "
            "change one of the three, or set rollout.engine=sglang"
        )
    return faults
