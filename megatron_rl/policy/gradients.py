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

GAUSS_POINTS = (0.5 - 0.5 / 3**0.5, 0.5 + 0.5 / 3**0.5)  # of [0, 1], with equal weights: exact up to third powers
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
    """The change of the mean entropy along the weights' real movement, Adam and momentum included, by a gradient:
    `grad H . (theta_after - theta_before)`, in nats, with the float32 weights that the optimizer keeps.

    With grad H where the movement begins this is first order in it. With the mean of grad H at GAUSS_POINTS it is of
    fourth order: Gauss's rule for the integral of grad H along the straight line, which is the change itself. The
    weights there are rounded to the model's dtype. Each gradient costs a forward and backward pass of the mini-batch.
    Memory: a float32 copy of a rank's own weights, for the beginning another of its gradient, for the way three of the
    model's weights in their dtype.
    """

    def __init__(self, policy: MegatronPolicy, mini_batch: MiniBatch, *, start: bool, way: bool) -> None:
        """Remember where the movement begins. `start`, `way`: where the gradient is wanted. Collective, as `changes`
        is."""
        self._policy, self._mini_batch = policy, mini_batch
        self._gradient = entropy_gradient(policy, mini_batch) if start else None
        self._begin = policy.copy_weights() if way else None
        self._weights = _weights(policy)

    def changes(self) -> dict[str, float]:
        """Return the entropy's changes by the weights' movement since this was made, nats per token, as metrics."""
        policy, changes = self._policy, {}
        moved = [now - then for now, then in zip(_weights(policy), self._weights, strict=True)]
        if self._gradient is not None:
            changes["entropy/first_order_change"] = inner(policy, self._gradient, moved)
        if self._begin is not None:
            changes["entropy/tangent_change"] = 0.0
            for place in GAUSS_POINTS:
                ends = zip(self._begin, (end.detach() for _, end in policy.parameters), strict=True)
                with policy.at([torch.lerp(*pair, place) for pair in ends]):
                    gradient_there = entropy_gradient(policy, self._mini_batch)
                changes["entropy/tangent_change"] += inner(policy, gradient_there, moved) / len(GAUSS_POINTS)
        return changes


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
