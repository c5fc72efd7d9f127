"""From a Hugging Face config to a Megatron-Core GPTModel, its DDP wrapper and its optimizer."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_rl import device
from megatron_rl.config import Config, ModelConfig, OptimizerConfig
from megatron_rl.config.checks import context_faults
from megatron_rl.errors import ConfigError
from megatron_rl.models.architecture import head_dim, resolve_hf_config
from megatron_rl.models.facts import ARCHITECTURES
from megatron_rl.models.mapping import is_moe_layer
from megatron_rl.parallel.groups import Groups, expert_tp
from megatron_rl.policy.adam import fuse_torch_adam, host_options, use_main_weights
from megatron_rl.policy.replay import replay_routes
from megatron_rl.policy.torch_layers import RememberedPacks, block_spec

# with Megatron's defaults, batched exchanges, the gradients of interleaved stages are silently wrong over gloo
_INTERLEAVED = {"overlap_p2p_comm": True, "batch_p2p_comm": False}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Model:
    """A rank's part of the policy: one chunk, or several under virtual pipeline stages. `chunks` are the bare GPTModels
    inside `ddp`."""

    hf_config: PretrainedConfig
    config: TransformerConfig
    chunks: list[GPTModel]
    ddp: list[DistributedDataParallel]
    vocab_size: int  # real
    vocab_start: int  # first global column of this rank's logits shard
    packs: RememberedPacks | None  # of torch's layers, which rotate queries and keys themselves; None: Megatron does it
    hands_over_hidden: bool  # the last stage returns hidden states, and parallel/fused_linear.py is the output layer

    @property
    def output_weight(self) -> torch.Tensor:
        """`[padded V/TP, H]`, of the last pipeline stage's output layer; the embedding's where the two are tied."""
        gpt = self.chunks[-1]
        if gpt.share_embeddings_and_output_weights:
            return gpt.shared_embedding_or_output_weight()
        return gpt.output_layer.weight

    def complete_weights(self) -> None:
        """Gather the weights that other ranks have updated, where parallel.ddp.overlap_param_gather leaves that to the
        next forward pass. A collective."""
        for ddp in self.ddp:
            groups = ddp.bucket_groups + ddp.expert_parallel_bucket_groups
            if ddp.ddp_config.overlap_param_gather and not all(group.param_gather_dispatched for group in groups):
                ddp.start_param_sync(force_sync=True)

    def sharded_state_dict(self, metadata: dict[str, Any]) -> dict[int, Any]:
        """Return what a checkpoint keeps of each chunk. Its keys number the layers over the whole model."""
        self.complete_weights()
        # no list: Megatron cannot merge lists of different lengths, as another layout's would be
        states = {index: chunk.sharded_state_dict(metadata=metadata) for index, chunk in enumerate(self.chunks)}
        for state in states.values():  # Transformer Engine's _extra_state is of FP8; without it torch's layers load all
            for name in [name for name in state if name.endswith("_extra_state")]:
                del state[name]
        return states

    def load_state_dict(self, state: dict[int, Any]) -> None:
        """Fill the chunks from the loaded state of the same structure. Raises: KeyError naming weights that it
        lacks."""
        for index, chunk in enumerate(self.chunks):
            missing = chunk.load_state_dict(state[index], strict=False).missing_keys
            if lost := [name for name in missing if not name.endswith("_extra_state")]:
                raise KeyError(f"the checkpoint has no {', '.join(lost)}")


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """The least multiple of tp (times 128 on CUDA) that holds the vocabulary."""
    multiple = tp * device.vocab_pad_multiple()
    return -(-vocab_size // multiple) * multiple


def transformer_config(hf: PretrainedConfig, config: Config) -> TransformerConfig:
    """Megatron's description of the architecture and the layout."""
    dtype, parallel, layers = DTYPES[config.model.dtype], config.parallel, device.layers(config.model.layers)
    float32_activations = device.float32_activations(config.model.activations, dtype)
    if faults := context_faults(config, layers):
        raise ConfigError(faults[0])
    options: dict[str, Any] = dict(
        **_moe_options(hf, config, has_engine=layers == "transformer_engine"),
        transformer_impl="transformer_engine" if layers == "transformer_engine" else "local",
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.intermediate_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        kv_channels=head_dim(hf),
        normalization="RMSNorm",
        layernorm_epsilon=hf.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=ARCHITECTURES[hf.model_type].qkv_bias,
        qk_layernorm=ARCHITECTURES[hf.model_type].qk_norm,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        context_parallel_size=parallel.cp,
        sequence_parallel=parallel.sp,
        params_dtype=dtype,
        pipeline_dtype=torch.float32 if float32_activations else dtype,
        fp32_residual_connection=float32_activations,  # from the embedding on; all that follows takes its type
        bf16=dtype == torch.bfloat16,
        calculate_per_token_loss=True,  # divides by the global count once, after all micro-batches and ranks
        # Megatron marks a weight as tensor-parallel while it initialises it; without the mark its gradient norm counts
        # one shard only
        perform_initialization=True,
        deterministic_mode=config.train.deterministic or not device.ON_GPU,
        **(_INTERLEAVED | {"virtual_pipeline_model_parallel_size": parallel.vpp} if parallel.vpp > 1 else {}),
        **_recompute_options(config.model),
        **device.transformer_config_options(layers),
    )
    given = dict(config.model.megatron)
    if "attention_backend" in given:
        given["attention_backend"] = AttnBackend[given["attention_backend"]]
    try:
        return TransformerConfig(**options | given)
    except (AssertionError, ValueError) as error:
        if not given:
            raise
        raise ConfigError(f"model.megatron={config.model.megatron}: Megatron refuses it: {error}") from error


def _recompute_options(model: ModelConfig) -> dict[str, Any]:
    """Megatron's other way to save activations, cpu_offloading, is Transformer Engine's alone and excludes pipelines
    and recomputation: nothing of it could be tried without a GPU, so there is no option for it."""
    options: dict[str, Any] = {}
    if model.recompute == "full":
        options = {"recompute_method": model.recompute_method or "uniform"}
        options["recompute_num_layers"] = model.recompute_layers or 1
    elif model.recompute == "selective":
        options = {"recompute_modules": list(model.recompute_modules or ("core_attn",))}
    return {"recompute_granularity": model.recompute, **options} if options else {}


def _moe_options(hf: PretrainedConfig, config: Config, *, has_engine: bool) -> dict[str, Any]:
    """The mixture of experts as transformers computes it: softmax over all experts, then the largest few.

    Nothing balances the load: hf.router_aux_loss_coef is for pre-training, and here it would add to the policy
    gradient a term that no reward asked for.
    """
    pattern = [int(is_moe_layer(hf, layer)) for layer in range(hf.num_hidden_layers)]
    if not any(pattern):
        return {}
    return {
        "num_moe_experts": hf.num_experts,
        "moe_ffn_hidden_size": hf.moe_intermediate_size,
        "moe_layer_freq": 1 if all(pattern) else pattern,
        "moe_router_topk": hf.num_experts_per_tok,
        # renormalising the chosen probabilities is a softmax over the chosen logits
        "moe_router_pre_softmax": not hf.norm_topk_prob,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": has_engine,
        "moe_permute_fusion": has_engine,
        "expert_model_parallel_size": config.parallel.ep,
        "expert_tensor_parallel_size": expert_tp(config.parallel),
    }


def build_model(raw_hf_config: dict[str, Any], config: Config, groups: Groups, *, fuse_output_layer: bool) -> Model:
    """This rank's stage and shard, with uninitialised weights (load them before use), wrapped in Megatron's DDP.

    `fuse_output_layer`: the statistics compute the logits in chunks. For that, or for float32 logits, the last stage
    returns hidden states.
    Raises: ConfigError for an unsupported architecture feature.
    """
    hf = resolve_hf_config(raw_hf_config)
    tconfig = transformer_config(hf, config)
    vocab = padded_vocab_size(hf.vocab_size, groups.tp_size)
    chunks = [_chunk(hf, tconfig, vocab, groups, chunk, config.parallel.vpp) for chunk in range(config.parallel.vpp)]
    hands_over_hidden = fuse_output_layer or config.float32_logits
    if hands_over_hidden and groups.is_last_stage:
        _hand_over_hidden(chunks[-1], groups)
    if config.rollout.routing_replay:
        replay_routes(chunks, hf, groups)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        check_for_nan_in_grad=False,  # the update checks the global norm, on all ranks alike, before the weights move
        **config.parallel.ddp,
    )
    ddp = []
    for chunk, gpt in enumerate(chunks):
        module = Float16Module(tconfig, gpt) if tconfig.bf16 else gpt
        ddp.append(DistributedDataParallel(tconfig, ddp_config, module, disable_bucketing=chunk > 0))
        _add_weight_gradients(gpt)
    tconfig.finalize_model_grads_func = finalize_model_grads
    if ddp_config.overlap_grad_reduce:  # the last micro-batch's backward pass alone starts the exchange
        tconfig.no_sync_func = [chunk.no_sync for chunk in ddp] if len(ddp) > 1 else ddp[0].no_sync
    vocab_start = groups.tp_rank * (vocab // groups.tp_size)
    packs = None if _has_engine(tconfig) else RememberedPacks(_inv_freq(hf).to(device.device()))
    return Model(hf, tconfig, chunks, ddp, hf.vocab_size, vocab_start, packs, hands_over_hidden)


def _chunk(
    hf: PretrainedConfig, tconfig: TransformerConfig, vocab: int, groups: Groups, chunk: int, chunks: int
) -> GPTModel:
    """The rank's model chunk number `chunk`: the first of the first stage embeds, the last of the last has the
    output."""
    vp_stage = chunk if chunks > 1 else None
    if _has_engine(tconfig):
        spec = get_gpt_decoder_block_spec(tconfig, use_transformer_engine=True, vp_stage=vp_stage)
    else:
        spec = block_spec(tconfig, vp_stage)
    with device.device():  # routers and norms name none, and Megatron would make them on the host
        gpt = GPTModel(
            tconfig,
            spec,
            vocab_size=vocab,
            max_sequence_length=hf.max_position_embeddings,
            position_embedding_type="rope" if _has_engine(tconfig) else "none",
            share_embeddings_and_output_weights=hf.tie_word_embeddings,
            pre_process=groups.is_first_stage and chunk == 0,
            post_process=groups.is_last_stage and chunk == chunks - 1,
            vp_stage=vp_stage,
        )
    if _has_engine(tconfig):
        gpt.rotary_pos_emb.inv_freq.copy_(_inv_freq(hf))
    return gpt


def _has_engine(tconfig: TransformerConfig) -> bool:
    return tconfig.transformer_impl == "transformer_engine"


def _add_weight_gradients(gpt: GPTModel) -> None:
    """Let Transformer Engine's products add a weight's gradient to Megatron's float32 buffer themselves, where a hook
    of DDP would add one that was rounded to bfloat16. The hook leaves out what they have marked as added.

    Megatron's own switch for it, gradient_accumulation_fusion, asks for apex in the output layer.
    """
    for module in gpt.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def _hand_over_hidden(gpt: GPTModel, groups: Groups) -> None:
    """Let the output layer return its whole input, whose gradient is then summed over TP as the layer would.

    The layer stays where it is, with its weight: checkpoints, gradient buffers and tying know no difference.
    """

    def forward(hidden: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        if gpt.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden, group=groups.tp), None
        return copy_to_tensor_model_parallel_region(hidden, group=groups.tp), None

    gpt.output_layer.forward = forward


def _inv_freq(hf: PretrainedConfig) -> torch.Tensor:
    """RoPE's inverse frequencies `[d/2]` from transformers, so that every rope type it knows is exactly its own."""
    rope = LlamaRotaryEmbedding(hf)
    if rope.attention_scaling != 1.0:
        raise ConfigError(
            f"model: rope_type {rope.rope_type!r} scales attention by {rope.attention_scaling}; not supported"
        )
    return rope.inv_freq


def build_optimizer(
    model: Model, config: Config, total_updates: int
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Return Adam and its learning-rate schedule. Megatron counts it in optimizer updates; a run that goes on with
    mini-batches of another size is put at the same step (checkpoint.py)."""
    options: OptimizerConfig = config.optimizer
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=options.lr,
            min_lr=0.0,
            weight_decay=options.weight_decay,
            adam_beta1=options.beta1,
            adam_beta2=options.beta2,
            adam_eps=options.eps,
            clip_grad=options.clip_grad,
            bf16=config.model.dtype == "bfloat16",
            params_dtype=DTYPES[config.model.dtype],
            use_distributed_optimizer=config.parallel.distributed_optimizer,
            **(host_options() if options.cpu_offload else {}),
        ),
        model.ddp,
    )
    fuse_torch_adam(optimizer)
    if options.cpu_offload:
        use_main_weights(optimizer)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=options.lr,
        min_lr=options.lr if options.schedule == "constant" else 0.0,
        lr_warmup_steps=options.warmup_steps,
        lr_decay_steps=max(total_updates, options.warmup_steps + 1),
        lr_decay_style=options.schedule,
        start_wd=options.weight_decay,
        end_wd=options.weight_decay,
        wd_incr_steps=total_updates,
        wd_incr_style="constant",
    )
    return optimizer, scheduler
