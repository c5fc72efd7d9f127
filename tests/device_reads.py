"""Where a step waits for the device, by file and function, with the reason why it stays; who sends objects over NCCL.

A wait costs what the host could have queued meanwhile. One in each layer or token stalls a GPU; a few in an update do
not. So each entry begins with how often it happens.
"""

READS = {
    # generation in the trainer's own process; servers generate in theirs
    "rollout/transformers.py TransformersEngine._prefill": "batch of requests: equal lengths need no mask",
    "rollout/transformers.py TransformersEngine._decode": "token: it ends when no row is left",
    "rollout/transformers.py TransformersEngine._collect": "batch of requests: tokens go to the host, which grades",
    "rollout/recorder.py RouteRecorder.of": "response with rollout.routing_replay: its experts go to the host",
    # torch's layers; Transformer Engine's read nothing
    "policy/torch_layers.py _tokens": "micro-batch: sequences with a prefix apart from those without",
    "policy/torch_layers.py _padded": "micro-batch: how long the longest sequence is",
    "policy/torch_layers.py _rows": "micro-batch: which padded positions are real",
    "parallel/context.py local_tokens": "layer: which tokens the context-parallel ranks hold",
    # Megatron
    "megatron/core/distributed/finalize_model_grads.py finalize_model_grads": "update: no token counts, no division",
    "megatron/core/optimizer/cpu_offloading/hybrid_optimizer.py HybridDeviceOptimizer._set_sub_optimizer_grads": (
        "update with optimizer.cpu_offload: Adam on the host needs the gradients there"
    ),
    "megatron/core/optimizer/clip_grads.py get_grad_norm_fp32": "update: the gradient's norm decides the update",
    "megatron/core/transformer/moe/moe_utils.py maybe_move_tensor_to_cpu": "mixture layer: sizes of the exchange",
    "megatron/core/transformer/moe/moe_utils.py permute": "mixture layer: torch's permutation selects by a mask",
    # an update
    "policy/policy.py MegatronPolicy.backward": "update of a pipeline: its sums travel as host tensors",
    "policy/gradients.py inner": "step with train.entropy_tangent or _every: one number a group",
    "types.py MicroBatch.num_tokens": "step with train.entropy_tangent or _every: the count is Megatron's denominator",
    "types.py MiniBatch.response_tokens": "mini-batch and value: selecting response tokens by their mask",
    "algorithms/covariance.py covariances": "update: the count of tokens decides the quota",
    "algorithms/families.py CovarianceLoss._offer": "update: candidates are selected by a mask",
    "algorithms/families.py CovarianceLoss._choose_within": "micro-batch of cov_scope=microbatch: by a mask",
    "algorithms/families.py CovarianceLoss.mark": "update: four numbers",
    "algorithms/families.py WeightedLoss.mark": "update: no token, no weights; three numbers",
    "algorithms/methods/forking.py ForkingLoss.weights": "update: the count of tokens decides how many are kept",
    "algorithms/methods/clip_v.py ClipVLoss.weights": "update: candidates, by a mask; the count decides the quota",
    "algorithms/methods/gaussian_cov.py GaussianCovLoss.weights": "update: without variance all weights are 1",
    "parallel/reduce.py _best": "top-k: what can win, by a mask",
    "parallel/reduce.py Reducer.top_ks_and_sum": "top-k: how many values each rank offers",
    "parallel/reduce.py Reducer._contenders": "top-k of many values: what can win, by a mask",
    # the metrics of a step
    "algorithms/control.py mean_entropy": "step: the controller's coefficient is a number of Python's",
    "algorithms/prediction.py predicted_change": "step: one number",
    "algorithms/covariance.py covariance_metrics": "step: six numbers of each update",
    "algorithms/ledger.py _sums": "step with a ledger: token ids become keys",
    "metrics/collect.py Metrics._check_same_names": "step: ranks must hold the same metrics",
    "metrics/collect.py Metrics.reduce": "step: all sums at once, all maxima at once",
    "metrics/samples.py token_values": "step that logs samples: their columns",
    "metrics/collect.py Metrics.max": "step: the largest mismatch of the response tokens",
    "metrics/step.py batch_totals": "step: four numbers",
    "packing/pack.py packing_metrics": "mini-batch: how full its micro-batches are",
    "parallel/reduce.py Reducer.kth_largest": "update of the forking loss: the least entropy that is kept",
    "parallel/reduce.py Reducer.quantiles": "step: two quantiles of the entropy",
}

_EXCHANGE = "megatron/core/dist_checkpointing/exchange_utils.py"
_SAVER = "megatron/core/dist_checkpointing/strategies/state_dict_saver.py"
# each is a collective of bytes on a group that a GPU's world would give to NCCL: fine where no rank waits long
OBJECTS = {
    "megatron/core/optimizer/__init__.py _get_param_groups": "start: the names of the parameter groups",
    "megatron/core/dist_checkpointing/validation.py determine_global_metadata": "save and load: the names of tensors",
    "megatron/core/dist_checkpointing/validation.py _validate_common_state_dict": "save: what all ranks hold alike",
    f"{_EXCHANGE} determine_main_replica_uniform_distribution": "save and load: which ranks share which weights",
    f"{_EXCHANGE} exchange_loaded_objects_gather_object": "load: what is no tensor",
    f"{_SAVER} save_state_dict_async_plan": "save: writers",
    f"{_SAVER} save_state_dict_async_finalize": "save: what was written",
    "megatron/core/dist_checkpointing/strategies/torch.py TorchDistLoadShardedStrategy.load": "load: who reads what",
}
