"""Gradients as vectors over the whole world, for products between them: what a loss does to the entropy through the
weights, and how alike the directions of two losses are."""

import torch
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from megatron_rl import device
from megatron_rl.algorithms.kl import masked_sum_count
from megatron_rl.algorithms.terms import LossFunction
from megatron_rl.parallel.reduce import Reducer
from megatron_rl.policy.policy import MegatronPolicy
from megatron_rl.types import LossInputs, LossOutputs, MiniBatch

Flat = list[Tensor]  # per optimizer of Megatron's chain: the elements of which this rank owns the only copy, float32


def gradient(policy: MegatronPolicy, mini_batch: MiniBatch, loss: LossFunction) -> Flat:
    """Return the gradient of the mini-batch's mean loss, over all ranks and micro-batches, unclipped; nothing moves.
    Collective."""
    policy.backward(mini_batch, loss)
    policy.optimizer.prepare_grads()
    parts = [_concat([p.grad for p in parameters if p.grad is not None]) for parameters in _owned(policy)]
    policy.clear_gradients()
    return parts


def full_gradients(policy: MegatronPolicy) -> list[tuple[str, Tensor]]:
    """Return the (Megatron name, gradient of this rank's shard) pairs that `backward` left, float32, over all ranks and
    micro-batches. Collective.

    Under the distributed optimizer each data-parallel rank has summed its part alone; here all reach all of them.
    """
    for ddp in policy.model.ddp if policy.config.parallel.distributed_optimizer else []:
        for groups in ddp.bucket_groups + ddp.expert_parallel_bucket_groups:
            ranks = Reducer(groups.intra_distributed_optimizer_instance_group, device.device())
            for bucket in groups.buckets:
                part = bucket.grad_data.chunk(ranks.size)[groups.intra_distributed_optimizer_instance_rank]
                bucket.grad_data.copy_(ranks.gather(part.clone()).view(-1))
    return [(name, parameter.main_grad) for name, parameter in policy.parameters]  # type: ignore[attr-defined]


def entropy_gradient(policy: MegatronPolicy, mini_batch: MiniBatch) -> Flat:
    """Return the gradient of the mean entropy over the mini-batch's response tokens, whatever the losses' aggregation.
    Collective."""

    def entropy(inputs: LossInputs) -> LossOutputs:
        counted = torch.where(inputs.loss_mask, inputs.entropy, 0.0)
        return LossOutputs(counted.sum(), {"entropy": masked_sum_count(counted, inputs.loss_mask)})

    by_token = [m.replace(loss_denominator=m.num_tokens) for m in mini_batch.micro_batches]
    return gradient(policy, MiniBatch(mini_batch.index, tuple(by_token)), entropy)


def inner(policy: MegatronPolicy, a: Flat, b: Flat) -> float:
    """Return the product of two vectors over all ranks, in float64. Collective, the same on every rank."""
    total = 0.0
    for optimizer, x, y in zip(policy.optimizer.chained_optimizers, a, b, strict=True):
        group = Reducer(optimizer.get_grad_stats_parallel_group(), device.device())
        total += float(group.sum(x.double() @ y.double()))
    return total


class EntropyTangent:
    """The first-order change of the mean entropy that the weights' real movement predicts, Adam and momentum included:
    `grad H . (theta_after - theta_before)`, in nats, with grad H at the weights and tokens where this was made.

    Costs a forward and backward pass of the mini-batch, and two float32 copies of a rank's own weights.
    """

    def __init__(self, policy: MegatronPolicy, mini_batch: MiniBatch) -> None:
        """Collective, as `change` is."""
        self._policy = policy
        self._gradient = entropy_gradient(policy, mini_batch)
        self._weights = _weights(policy)

    def change(self) -> float:
        """Return the entropy's change by the weights' movement since this was made, in nats per token."""
        moved = [now - then for now, then in zip(_weights(self._policy), self._weights, strict=True)]
        return inner(self._policy, self._gradient, moved)


def _weights(policy: MegatronPolicy) -> Flat:
    return [_concat(parameters) for parameters in _owned(policy)]


def _owned(policy: MegatronPolicy) -> list[list[Tensor]]:
    """Return the optimizers' parameters, without those that another rank of the statistics group counts, as in
    Megatron's own gradient norm."""
    return [
        [
            parameter
            for parameter in optimizer.get_parameters()
            if param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter)
        ]
        for optimizer in policy.optimizer.chained_optimizers
    ]


def _concat(tensors: list[Tensor]) -> Tensor:
    flat = [tensor.detach().float().reshape(-1) for tensor in tensors]
    return torch.cat(flat) if flat else torch.zeros(0, device=device.device())  # torch.cat copies
