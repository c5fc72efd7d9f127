"""Driving Megatron's forward-backward schedule over packed micro-batches."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron_rl.policy.build import Model
from megatron_rl.policy.replay import RoutedSequences
from megatron_rl.types import Inputs, MicroBatch, MiniBatch

# from (logits shard [T, V/TP], or hidden states [T, H] where the model hands them over; micro-batch) to Megatron's
# triple (loss sum, count, what to collect) or, forward only, to any value
OutputFunction = Callable[[Tensor, MicroBatch], Any]


def run_schedule(
    model: Model,
    mini_batch: MiniBatch,
    on_output: OutputFunction,
    *,
    forward_only: bool,
    output: Tensor | None = None,
) -> list[Any]:
    """Run all micro-batches through Megatron's schedule (1F1B when pipelined).

    With forward_only, `on_output` returns any value and the result lists them; otherwise it returns (loss sum, int
    count, metrics) and the result lists the metrics. Only the last pipeline stage gets a non-empty list. Gradients end
    in Megatron's main_grad buffers, divided once by the count over all micro-batches and data-parallel ranks.

    `output`: what `on_output` got in a forward pass of the mini-batch's only micro-batch, with its graph: not computed
    again.
    """

    def step(iterator: Any, ddp: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        micro_batch: MicroBatch = next(iterator)
        if output is not None:
            return output, lambda output, non_loss_data=False: on_output(output, micro_batch)
        inputs = micro_batch.model_inputs()
        options = (
            {"fp32_output": False} if model.config.bf16 else {}
        )  # the statistics upcast row blocks, never all logits
        computed = ddp(
            inputs.token_ids[None],
            inputs.position_ids[None],
            None,
            packed_seq_params=_packed(inputs, micro_batch.routes, model),
            **options,
        )

        def loss_function(output: Tensor, non_loss_data: bool = False) -> Any:
            output = output.view(-1, output.shape[-1])
            return on_output(output if inputs.rows is None else output.index_select(0, inputs.rows), micro_batch)

        if forward_only and get_attr_wrapped_model(ddp, "post_process"):
            # Megatron keeps what it is given until the next micro-batch is through: it gets no logits
            value = loss_function(computed)
            return computed.new_empty(0), lambda output, non_loss_data=False: value
        return computed, loss_function

    micro_batches = mini_batch.micro_batches
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(micro_batches) for _ in model.ddp],
        model=model.ddp,
        num_microbatches=len(micro_batches),
        # over the context-parallel ranks; pipelined micro-batches share one length, see packing
        seq_length=micro_batches[0].model_inputs().token_ids.numel() * model.config.context_parallel_size,
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def _packed(inputs: Inputs, routes: Tensor | None, model: Model) -> RoutedSequences:
    """Boundaries of the whole sequences. Padding inside them counts as tokens, whose keys no real query can see."""
    context_size = model.config.context_parallel_size
    routes = None if routes is None else routes.to(inputs.cu_seqlens.device)
    if model.packs is not None:
        return model.packs.of(inputs, context_size, routes)
    cu_seqlens = inputs.cu_seqlens * context_size
    padded = {"cu_seqlens_q_padded": cu_seqlens, "cu_seqlens_kv_padded": cu_seqlens} if context_size > 1 else {}
    return RoutedSequences(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        # the true longest: Megatron takes a RoPE table as long as the whole pack for per-token positions
        max_seqlen_q=inputs.longest,
        max_seqlen_kv=inputs.longest,
        routes=routes,
        **padded,
    )
