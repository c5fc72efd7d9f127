"""Options that pass through to Megatron-Core: the fields of two of its dataclasses, read from its source.

Nothing of Megatron is imported, which would take torch and seconds: a config is also loaded on a laptop.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import json
import typing
from collections.abc import Mapping
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from megatron_rl.errors import ConfigError

if TYPE_CHECKING:
    from megatron_rl.config.sections import Config, ParallelConfig

# option -> files of megatron/core and the dataclasses in them, a base class first
_SOURCES = {
    "model.megatron": {
        "model_parallel_config.py": "ModelParallelConfig",
        "transformer/transformer_config.py": "TransformerConfig",
    },
    "parallel.ddp": {"distributed/distributed_data_parallel_config.py": "DistributedDataParallelConfig"},
}
AttnBackend = typing.Literal["flash", "fused", "unfused", "local", "auto"]  # names of Megatron's enum
_TYPES: dict[str, Any] = {name: getattr(typing, name) for name in ("Optional", "Union", "Literal", "List", "Tuple")}
_TYPES |= {"AttnBackend": AttnBackend, "CudaGraphScope": str}

# Fields that pass through no more: why, and which (* stands for any letters).
_ARCHITECTURE = "config.json says what the model computes, and engines and exports compute the same"
_FLOAT = "weights, statistics, engines and exports know float32 and bfloat16 alone"
_ROUTING = "it changes which experts a token takes, or drops tokens, in a way that the engines and other layouts do not"
_NOISE = "the same weights must give the same log-probabilities twice: their difference is the loss's ratio"
_INFERENCE = "it is for Megatron's own inference; responses come from rollout.engine"
_SCHEDULE = "it needs parts of Megatron's own training loop, which does not run here"
_GROUPS = "it needs process groups that parallel/groups.py does not make"
_REFUSED = {
    "set parallel.tp": "tensor_model_parallel_size expert_tensor_parallel_size moe_extended_tp",
    "set parallel.pp": "pipeline_model_parallel_size",
    "set parallel.vpp": "virtual_pipeline_model_parallel_size",
    "set parallel.cp": "context_parallel_size",
    "set parallel.ep": "expert_model_parallel_size",
    "set parallel.sp": "sequence_parallel",
    "set parallel.distributed_optimizer": "use_distributed_optimizer",
    "set model.dtype": "params_dtype pipeline_dtype fp16 bf16 enable_autocast autocast_dtype",
    "set model.recompute": "recompute_granularity",
    "set model.recompute_method, recompute_layers or recompute_modules": "recompute_* moe_layer_recompute",
    "set rollout.routing_replay": "moe_enable_routing_replay",
    "set num_layers_in_first_pipeline_stage or _last_, which checks and plan read": "pipeline_model_parallel_layout",
    "the device decides": "use_cpu_initialization deterministic_mode transformer_impl",
    "the loss is divided once, by the tokens of all micro-batches and ranks": "calculate_per_token_loss "
    "average_in_collective gradient_reduce_div_fusion",
    "gradients are summed in float32, so that layouts agree": "grad_reduce_in_fp32 "
    "reduce_scatter_with_fp32_accumulation",
    "an update looks at the norm over all ranks, and skips where it is not finite": "check_for_*_grad*",
    "weights are loaded, and marked as sharded while they are made": "*init_method* perform_initialization "
    "init_model_with_meta_device",
    "the statistics are the output layer, and there is no other loss": "cross_entropy_* defer_embedding_wgrad_compute "
    "wgrad_deferral_limit mtp_*",
    "it would add a gradient that no reward asked for": "moe_aux_loss_coeff moe_z_loss_coeff",
    "packing gives each micro-batch its own length, and a CUDA graph has one": "*cuda_graph*",
    "with Megatron's other exchanges the gradients of interleaved stages are wrong over gloo": "*_p2p_* "
    "use_ring_exchange_p2p",
    "checkpoints, offload and the weight stream know the distributed optimizer alone": "use_*_fsdp fsdp_* "
    "*_sharding_strategy suggested_communication_unit_size preserve_fp32_weights",
    _NOISE: "*_dropout moe_input_jitter_eps",
    _ROUTING: "moe_router_load_balancing_type moe_router_force_load_balancing moe_token_drop* "
    "moe_expert_capacity_factor moe_pad_expert_input_to_capacity moe_router_fusion moe_router_padding_*",
    _FLOAT: "fp8* fp4* *_fp8* *_mxfp8_* tp_only_amax_red first_last_layers_bf16 num_layers_at_*_in_bf16 "
    "fp32_residual_connection *kitchen* quant_recipe disable_parameter_transpose_cache",
    _INFERENCE: "flash_decode inference_* *_inference_* symmetric_ar_type mlp_chunks_for_prefill",
    _SCHEDULE: "overlap_moe_expert_parallel_comm ep_overlap_* delay_wgrad_compute tp_comm_* align_param_gather "
    "mtp_standalone num_microbatches_with_partial_activation_checkpoints test_mode config_logger_dir",
    _GROUPS: "hierarchical_context_parallel_sizes hybrid_context_parallel max_seqlen_per_dp_cp_rank "
    "num_distributed_optimizer_instances pipeline_model_parallel_comm_backend",
    _ARCHITECTURE: "num_layers hidden_size num_attention_heads num_query_groups ffn_hidden_size kv_channels softmax_* "
    "apply_residual_connection_post_layernorm layernorm_* add_*bias* gated_linear_unit activation_func* glu_* "
    "num_moe_experts rotary_interleaved window_* normalization qk_* log_max_attention_logit attention_output_gate "
    "multi_latent_attention no_rope_freq experimental_* dsa_* linear_* apply_query_key_layer_scaling "
    "attention_softmax_in_fp32 moe_shared_* moe_layer_freq moe_ffn_* moe_router_topk* moe_router_*group* "
    "moe_router_pre_softmax moe_router_score_function moe_router_*bias* moe_apply_probs_on_input moe_latent_size "
    "mrope_section is_hybrid_model *mamba_* heter* use_te_activation_func use_fused_weighted_squared_relu",
}


class MegatronField(NamedTuple):
    """A field of one of Megatron's dataclasses, as its source has it."""

    annotation: str
    default: str


@cache
def fields(option: str) -> dict[str, MegatronField]:
    """Return the fields by name that `option` may pass. Raises: ConfigError where Megatron-Core is not installed."""
    spec = importlib.util.find_spec("megatron")  # a package without code of its own
    folders = [Path(place) / "core" for place in (spec.submodule_search_locations or ())] if spec is not None else []
    result: dict[str, MegatronField] = {}
    for file, name in _SOURCES[option].items():
        path = next((folder / file for folder in folders if (folder / file).is_file()), None)
        if path is None:
            raise ConfigError(f"{option}: Megatron-Core is not installed, whose {file} says what there is; install it")
        classes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
        body = next(node.body for node in classes if node.name == name)
        for node in (node for node in body if isinstance(node, ast.AnnAssign)):
            default = node.value
            if isinstance(default, ast.Call):  # dataclasses.field(default=...)
                default = next((word.value for word in default.keywords if word.arg == "default"), None)
            text = "" if default is None else ast.unparse(default)
            result[ast.unparse(node.target)] = MegatronField(ast.unparse(node.annotation), text)
    return result


def refusal(name: str) -> str | None:
    """Return why a field does not pass through; None: it does."""
    for reason, names in _REFUSED.items():
        if any(fnmatch(name, pattern) for pattern in names.split()):
            return reason
    return None


def option_faults(option: str, given: Mapping[str, Any]) -> list[str]:
    """Return one line for each field that does not exist, does not pass through, or has a value of another type."""
    faults = []
    for name, value in given.items():
        known, reason = fields(option), refusal(name)
        passing = [other for other in known if refusal(other) is None and not other.startswith("_")]
        if name not in known:
            near = difflib.get_close_matches(name, passing, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(passing))}"
            faults.append(f"{option}.{name}: Megatron-Core has no such field; {hint}")
        elif reason is not None:
            faults.append(f"{option}.{name} does not pass through: {reason}")
        else:
            faults += _type_fault(f"{option}.{name}", known[name].annotation, value)
    return faults


def _type_fault(where: str, annotation: str, value: Any) -> list[str]:
    try:
        kind = eval(annotation, {**_TYPES})  # Megatron's own source, of which names are all that is evaluated
    except (NameError, AttributeError):
        return [f"{where} takes a Python object ({annotation}), which no config holds; remove it"]
    try:
        TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError:
        return [f"{where}: got {value!r}, expected {annotation}"]
    return []


def megatron_faults(config: Config) -> list[str]:
    """Return one line per fault in what passes through, with its remedy."""
    ddp = config.parallel.ddp
    faults = option_faults("model.megatron", config.model.megatron) + option_faults("parallel.ddp", ddp)
    if ddp.get("overlap_param_gather") and not (
        config.parallel.distributed_optimizer and ddp.get("overlap_grad_reduce")
    ):
        faults.append(
            "parallel.ddp.overlap_param_gather=true needs parallel.distributed_optimizer=true and "
            "parallel.ddp.overlap_grad_reduce=true; set both"
        )
    return faults


def megatron_notes(config: Config) -> list[str]:
    """Return one line for each field that passes through, beside Megatron's own default."""
    given = {"model.megatron": config.model.megatron, "parallel.ddp": config.parallel.ddp}
    return [
        f"{option}.{name}={json.dumps(value)} passes to Megatron, whose default is {fields(option)[name].default}"
        for option, values in given.items()
        for name, value in values.items()
    ]


def chunk_layers(layers: int, parallel: ParallelConfig, options: Mapping[str, Any]) -> list[list[int]]:
    """Return the layers of each model chunk, `[stage][chunk]`, as `get_num_layers_to_build` of Megatron's
    transformer_block deals them; whether they are positive and make up `layers`, the caller must check."""
    pp, vpp = parallel.pp, parallel.vpp
    names = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
    fixed = {stage: options[name] for stage, name in zip((0, pp - 1), names, strict=True) if options.get(name)}
    ends = [bool(options.get(f"account_for_{end}_in_pipeline_split")) for end in ("embedding", "loss")]
    total = layers - sum(fixed.values()) + sum(ends)
    even = total // max(1, pp - len(fixed))
    result = [[fixed.get(stage, even) // vpp] * vpp for stage in range(pp)]
    result[0][0] -= ends[0]
    result[-1][-1] -= ends[1]
    return result
