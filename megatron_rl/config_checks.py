"""What must agree across options. Each check says what was got, what was expected and what to change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_rl.errors import UserError

if TYPE_CHECKING:
    from megatron_rl.config import Config

SUPPORTED_MODEL_TYPES = ("llama", "qwen2", "qwen3")


class ConfigError(ValueError, UserError):
    """The config cannot work. Raised before any process starts."""


def read_hf_config(config: Config) -> dict[str, Any]:
    """The policy's Hugging Face config as a dict. Raises: ConfigError when model.path has no readable config.json."""
    if config.model.hf_config is not None:
        return dict(config.model.hf_config)
    path = Path(config.model.path or "") / "config.json"
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(
            f"model.path: cannot read {path} ({error}); give a folder with a Hugging Face config.json and safetensors"
        ) from error


def check_consistency(config: Config) -> None:
    """Raises: ConfigError listing every inconsistency with its remedy."""
    groups = (_folder_faults, _layout_faults, _batch_faults, _loss_faults, _model_faults)
    faults = [fault for find in groups for fault in find(config)]
    if faults:
        raise ConfigError("the config is inconsistent:\n" + "\n".join(f"  - {fault}" for fault in faults))


def _folder_faults(config: Config) -> list[str]:
    template = config.logging.run_dir
    try:
        template.format(name=config.name)
    except (KeyError, IndexError, ValueError):
        return [f"logging.run_dir={template!r}: the only placeholder is {{name}}"]
    return []


def _layout_faults(config: Config) -> list[str]:
    parallel, faults = config.parallel, []
    model_parallel = parallel.tp * parallel.pp
    if parallel.processes % model_parallel:
        low = parallel.processes // model_parallel * model_parallel
        near = f"{low} or {low + model_parallel}" if low else str(model_parallel)
        faults.append(
            f"parallel.world_size={parallel.processes} is not a multiple of tp*pp={model_parallel}; set it to {near}"
        )
    if parallel.sp and parallel.tp == 1:
        faults.append("parallel.sp=true needs parallel.tp > 1; set sp=false or raise tp")
    return faults


def _batch_faults(config: Config) -> list[str]:
    train, faults = config.train, []
    if train.prompts_per_step % train.prompts_per_minibatch:
        divisors = [d for d in range(1, train.prompts_per_step + 1) if train.prompts_per_step % d == 0]
        faults.append(
            f"train.prompts_per_step={train.prompts_per_step} is not a multiple of "
            f"prompts_per_minibatch={train.prompts_per_minibatch}; choose one of {divisors}"
        )
    sequences = train.prompts_per_minibatch * config.rollout.samples_per_prompt
    if sequences < config.parallel.dp:
        faults.append(
            f"a mini-batch has {sequences} sequences (prompts_per_minibatch * samples_per_prompt) for "
            f"{config.parallel.dp} data-parallel ranks; raise prompts_per_minibatch or lower world_size"
        )
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if train.micro_batch_tokens < longest:
        faults.append(
            f"train.micro_batch_tokens={train.micro_batch_tokens} is below the longest sequence "
            f"(max_prompt_tokens + max_response_tokens = {longest}); raise it to at least {longest}"
        )
    if config.algorithm.overlong.penalty_buffer > config.rollout.max_response_tokens:
        faults.append(
            f"algorithm.overlong.penalty_buffer={config.algorithm.overlong.penalty_buffer} exceeds "
            f"rollout.max_response_tokens={config.rollout.max_response_tokens}"
        )
    needs_group = (
        config.algorithm.advantage in ("grpo", "dr_grpo", "rloo", "qae") or config.algorithm.dynamic_sampling.enabled
    )
    if needs_group and config.rollout.samples_per_prompt < 2:
        faults.append(
            f"rollout.samples_per_prompt={config.rollout.samples_per_prompt}: {config.algorithm.advantage} and dynamic "
            "sampling compare the samples of one prompt; set it to at least 2"
        )
    if config.train.eval_every and config.data.type == "jsonl" and config.data.eval_path is None:
        faults.append("train.eval_every is set but data.eval_path is not; give held-out problems or set eval_every=0")
    return faults


def _loss_faults(config: Config) -> list[str]:
    loss, faults = config.loss, []
    if loss.type == "clip_cov" and loss.cov_low >= loss.cov_high:
        faults.append(f"loss.cov_low={loss.cov_low} must be below loss.cov_high={loss.cov_high}")
    truncated = config.rollout.top_p < 1 or config.rollout.top_k > 0
    if truncated and loss.rollout_is_cap is None:
        faults.append(
            "rollout.top_p/top_k cut the sampling distribution, so the samples do not come from the policy that is "
            "trained; set top_p=1 and top_k=0, or turn on the correction with loss.rollout_is_cap (2 is usual)"
        )
    if config.warm_start is not None and config.data.type != "countdown":
        faults.append("warm_start needs a task with known solutions (data.type=countdown); remove it")
    return faults


def _model_faults(config: Config) -> list[str]:
    hf, tp, pp, faults = read_hf_config(config), config.parallel.tp, config.parallel.pp, []
    if hf.get("model_type") not in SUPPORTED_MODEL_TYPES:
        known = ", ".join(SUPPORTED_MODEL_TYPES)
        return [f"model: model_type {hf.get('model_type')!r} is not supported; supported: {known}"]
    required = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    missing = [key for key in required if not isinstance(hf.get(key), int) or hf[key] < 1]
    if missing and not (config.data.type == "countdown" and missing == ["vocab_size"]):
        return [f"model: the Hugging Face config lacks a positive {', '.join(missing)}"]
    heads, layers = hf["num_attention_heads"], hf["num_hidden_layers"]
    groups = hf.get("num_key_value_heads") or heads
    for what, value in (("num_attention_heads", heads), ("num_key_value_heads", groups)):
        if value % tp:
            fits = [d for d in range(1, value + 1) if heads % d == 0 and groups % d == 0]
            faults.append(f"model {what}={value} is not divisible by parallel.tp={tp}; choose tp from {fits}")
    if hf["intermediate_size"] % tp:
        faults.append(f"model intermediate_size={hf['intermediate_size']} is not divisible by parallel.tp={tp}")
    if not hf.get("head_dim") and hf["hidden_size"] % heads:
        faults.append(
            f"model hidden_size={hf['hidden_size']} is not divisible by num_attention_heads={heads}; "
            "change one of them or give head_dim"
        )
    if heads % groups:
        faults.append(f"model num_attention_heads={heads} is not divisible by num_key_value_heads={groups}")
    if layers % pp:
        fits = [d for d in range(1, layers + 1) if layers % d == 0]
        faults.append(f"model num_hidden_layers={layers} is not divisible by parallel.pp={pp}; choose pp from {fits}")
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    positions = hf.get("max_position_embeddings")
    if isinstance(positions, int) and longest > positions:
        faults.append(
            f"the longest sequence (max_prompt_tokens + max_response_tokens = {longest}) exceeds the model's "
            f"max_position_embeddings={positions}; shorten one of them"
        )
    return faults
