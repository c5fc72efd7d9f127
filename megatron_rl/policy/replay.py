"""Mixture layers that take a token to the experts that the rollout engine took it to.

Engine and trainer round differently, so that near a tie their routers choose other experts, and the two policies then
differ by far more than rounding. Replayed, the choice is the engine's; its weights are the router's own probabilities
under the current weights, so that the gradient reaches the router as ever. Source: arXiv 2510.11370.

Megatron's RouterReplay is a list of all routers of the process with queues beside it, one for the forward passes and
one for recomputation, which must be filled and drained in the order of the schedule. Here the routes are part of the
micro-batch's packing, which Megatron hands to each layer, in recomputation too: under any schedule a layer finds those
of the micro-batch that it works on.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_rl.models.expert_routes import moe_layers, unrouted
from megatron_rl.parallel.groups import Groups


@dataclasses.dataclass
class RoutedSequences(PackedSeqParams):
    """What Megatron hands to the layers, with the routes of its tokens."""

    routes: Tensor | None = None  # [T, mixture layers, top_k]; None: the router chooses


class _Replay:
    """Stands where Megatron's router looks for its RouterReplay."""

    def __init__(self) -> None:
        self.routes: Tensor | None = None  # [tokens of this rank, top_k] in the forward pass at hand

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: Any, group_topk: Any, choose: Callable[..., tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Scores and numbers, `[tokens, top_k]` each, of the experts to take, from all scores `[tokens, experts]`."""
        values, experts = choose(scores, topk, num_groups=num_groups, group_topk=group_topk)
        if self.routes is None:
            return values, experts
        experts = torch.where(self.routes == unrouted(self.routes.dtype), experts, self.routes.long())
        return scores.gather(1, experts), experts


def replay_routes(chunks: list[GPTModel], hf: Any, groups: Groups) -> None:
    """Make the mixture layers of this rank's chunks follow `RoutedSequences.routes` where there are any."""
    index = {layer + 1: which for which, layer in enumerate(moe_layers(hf))}  # Megatron counts layers from 1
    for layer in (layer for chunk in chunks for layer in chunk.decoder.layers):
        which = index.get(layer.layer_number)
        if which is not None:
            layer.mlp.router.router_replay = _Replay()
            first_of = groups.tp_rank if layer.config.sequence_parallel else 0
            layer.register_forward_pre_hook(_set_routes(which, first_of), with_kwargs=True)


def _set_routes(which: int, tp_part: int) -> Callable[..., None]:
    """Set, before a layer runs, the routes of mixture layer `which`, of the part of the tokens that this rank has under
    sequence parallelism."""

    def hook(layer: Any, args: Any, kwargs: dict[str, Any]) -> None:
        routes = kwargs["packed_seq_params"].routes  # packing without the field must not pass for a free choice
        if routes is not None:
            count = len(kwargs["hidden_states"])
            routes = routes[tp_part * count : (tp_part + 1) * count, which]
        layer.mlp.router.router_replay.routes = routes

    return hook
