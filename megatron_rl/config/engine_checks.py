"""What must agree in `rollout`: the engine, its servers, the way of the weights. Checked by checks.py."""

from __future__ import annotations

import socket
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_rl.models.facts import has_dense_layers, head_width, is_moe

if TYPE_CHECKING:
    from megatron_rl.config.rollout import RolloutConfig
    from megatron_rl.config.sections import Config

SEQUENCE_MASK = "{weights: none, max_negative_kl: 0.1}"
# options of SGLang and vLLM by which a server computes in another precision than model.dtype
_PRECISION = {"--dtype", "--quantization", "-q", "--kv-cache-dtype", "--torchao-config"}


def engine_faults(config: Config) -> Iterator[str]:
    """Yield one line per fault in `rollout`, with its remedy."""
    rollout = config.rollout
    yield from [*_replay_faults(config), *_old_policy_faults(config)]
    if rollout.oversample != "auto" and not config.algorithm.dynamic_sampling.enabled:
        yield "rollout.oversample does nothing without algorithm.dynamic_sampling; enable that, or remove oversample"
    if rollout.is_embedded:
        if rollout.max_staleness:
            yield (
                f"rollout.max_staleness={rollout.max_staleness}: the embedded engine shares its process with the "
                "trainer and cannot generate ahead; set it to 0, or rollout.engine to sglang or vllm"
            )
        return
    if rollout.server.deterministic and rollout.max_staleness:
        yield (
            f"rollout.server.deterministic=true with rollout.max_staleness={rollout.max_staleness}: which tokens an "
            "update's weights make depends on the clock; set one of the two to its default"
        )
    yield from [*_url_faults(rollout), *_memory_faults(rollout, config.max_sequence_tokens)]
    if rollout.max_staleness and config.loss.rollout_correction is None:
        correction = "{cap: 2}" if config.algorithm.old_logprobs == "recompute" else SEQUENCE_MASK
        yield (
            f"rollout.max_staleness={rollout.max_staleness} trains on responses of older weights, which needs the "
            f"correction; set loss.rollout_correction={correction}, or max_staleness=0"
        )


def _old_policy_faults(config: Config) -> Iterator[str]:
    """Yield what cannot be right, or does nothing, with this origin of the old log-probabilities."""
    algorithm, rollout, loss = config.algorithm, config.rollout, config.loss
    if algorithm.old_logprobs == "recompute":
        for name in ("max_mismatch", "old_logprobs_check_every"):
            if getattr(algorithm, name) != type(algorithm).model_fields[name].default:
                yield f"algorithm.{name} does nothing with old_logprobs=recompute; remove it, or set rollout"
        return
    refused = []
    if rollout.top_p < 1 or rollout.top_k > 0:
        refused += [
            f"rollout.top_p={rollout.top_p}, top_k={rollout.top_k}: after a cut, what an engine reports is either not "
            "the probability of the sampling or not that of the policy; set top_p=1 and top_k=0"
        ]
    if loss.adaptive_entropy is not None or loss.entropy_band is not None:
        refused += ["loss.adaptive_entropy or entropy_band: no pass gives the old policy's entropy; remove them"]
    if loss.statistics == "old":
        refused += ["loss.stats or cov_logprobs=old: no pass gives the old policy's statistics; set them to current"]
    if (correction := loss.rollout_correction) and (correction.weights != "none" or correction.max_kl is not None):
        refused += [
            "loss.rollout_correction: its weights and max_kl compare the engine's log-probabilities with the old ones, "
            f"which are now the same; set it to {SEQUENCE_MASK} or null"
        ]
    if algorithm.max_mismatch is None:
        options = sorted({argument.split("=")[0] for argument in rollout.server.extra_args} & _PRECISION)
        reasons = [f"rollout.max_staleness={rollout.max_staleness}"] * (rollout.max_staleness > 0)
        reasons += [f"rollout.server.extra_args={option}" for option in options]
        refused += [f"{reason}: say with algorithm.max_mismatch how far apart both may be" for reason in reasons]
    yield from (f"algorithm.old_logprobs=rollout with {text}, or set old_logprobs=recompute" for text in refused)


def beside_config(config: Config, folder: Path) -> Config:
    """Return the config of the servers that evaluate beside training, with the run folder and the weights there."""
    sync = config.rollout.weight_sync.model_copy(update={"mode": "disk", "folder": str(folder / "weights")})
    rollout = config.rollout.model_copy(update={"server": config.eval.server, "weight_sync": sync})
    logging = config.logging.model_copy(update={"run_dir": str(folder)})
    return config.model_copy(update={"rollout": rollout, "logging": logging})


def beside_faults(config: Config) -> Iterator[str]:
    """Yield why the sets of `eval` cannot be evaluated beside training."""
    server, known = config.eval.server, list(engine_faults(config))
    faults = [fault for fault in engine_faults(beside_config(config, Path())) if fault not in known]
    yield from (fault.replace("rollout.server.", "eval.server.") for fault in faults)
    if not config.eval.sets:
        yield "eval.beside=true has no eval.sets to evaluate; name some, or set it to false"
    if config.rollout.is_embedded:
        yield "eval.beside=true needs servers; set rollout.engine to sglang or vllm, or beside=false"
    if server.share_memory:
        yield "eval.server.share_memory=true: with eval.beside=true servers and trainer work at once; set it to false"
    if set(server.urls) & set(config.rollout.server.urls):
        yield "eval.server.urls has a server of rollout.server.urls, which cannot hold two steps' weights; name others"
    if config.train.keep_best and getattr(config.data, "eval_path", None) is None:
        yield (
            "train.keep_best=true with eval.beside=true: eval/average comes when its weights are gone; give held-out "
            "problems, which are evaluated within the step (data.eval_path), or set one of the two to false"
        )


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


def _url_faults(rollout: RolloutConfig) -> Iterator[str]:
    here = ("127.0.0.1", "localhost", "::1", socket.gethostname())
    for url in rollout.server.urls:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/"):
            yield f"rollout.server.urls: {url!r} is no address such as http://node1:30000"
        elif rollout.weight_sync.mode == "colocated" and parts.hostname not in here:
            yield (
                f"rollout.weight_sync.mode=colocated shares memory within one machine, and {url} is another; set it to "
                "disaggregated or disk"
            )
    if len(set(rollout.server.urls)) < len(rollout.server.urls):
        yield "rollout.server.urls: the same server is listed twice"


def _memory_faults(rollout: RolloutConfig, longest: int) -> Iterator[str]:
    """Yield what is wrong with the servers' memory. longest: tokens of a sequence."""
    if rollout.server.share_memory and rollout.max_staleness:
        yield (
            "rollout.server.share_memory=true lets trainer and servers take turns, rollout.max_staleness > 0 lets them "
            "work at the same time; choose one"
        )
    if (rollout.server.kv_tokens or longest) < longest:
        yield (
            f"rollout.server.kv_tokens={rollout.server.kv_tokens} is below the longest sequence (max_prompt_tokens + "
            f"max_response_tokens = {longest}); raise it, best to {longest} times rollout.server.max_concurrency"
        )


def model_engine_faults(config: Config, hf: dict[str, Any]) -> Iterator[str]:
    """Yield how the model does not fit the engine. hf: a config.json without faults of its own."""
    rollout = config.rollout
    if rollout.routing_replay and not is_moe(hf):
        yield f"rollout.routing_replay=true: {hf['model_type']} has no experts to route to; set it to false"
    if rollout.is_embedded:
        return
    heads = hf["num_attention_heads"]
    for name, tp in {"rollout": rollout.server.tp, "eval": config.eval.server.tp}.items():
        if heads % tp:
            choice = divisors(heads)
            yield f"model num_attention_heads={heads} is not divisible by {name}.server.tp={tp}; choose from {choice}"
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
