"""The experts that a rollout engine routed each token to, as rollouts and micro-batches carry them.

`[tokens, mixture layers, top_k]`, the layers in the model's order, in the narrowest integers that hold an expert's
number and one more value, the mark of a token that no engine routed: the last of a sequence, which is never fed, and
padding. Source: routing replay (R3), arXiv 2510.11370.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_rl.models.mapping import is_moe_layer


def route_dtype(num_experts: int) -> torch.dtype:
    """uint8 up to 255 experts, else int16: a 30B model has 48 * 8 of them for each token."""
    return torch.uint8 if num_experts <= torch.iinfo(torch.uint8).max else torch.int16


def unrouted(dtype: torch.dtype) -> int:
    """The mark of a token without routes."""
    return torch.iinfo(dtype).max


def moe_layers(hf: Any) -> list[int]:
    """Numbers, from 0, of the layers with experts. `hf`: the model's transformers config."""
    return [layer for layer in range(hf.num_hidden_layers) if is_moe_layer(hf, layer)]


def place_routes(routes: Sequence[Tensor | None], starts: Sequence[int], length: int) -> Tensor | None:
    """`routes[i]`, `[L_i, layers, top_k]`, from position `starts[i]` on of `length` packed tokens, unrouted elsewhere;
    None when none has any. Raises: ValueError when some have."""
    given = [part for part in routes if part is not None]
    if not given:
        return None
    if len(given) < len(routes):
        raise ValueError(f"{len(given)} of {len(routes)} rollouts of a micro-batch have routes; expected all or none")
    packed = torch.full((length, *given[0].shape[1:]), unrouted(given[0].dtype), dtype=given[0].dtype)
    for part, start in zip(given, starts, strict=True):
        packed[start : start + len(part)] = part
    return packed


def server_routes(flat: Tensor | None, length: int, hf: Any) -> Tensor:
    """A server's answer for a sequence of `length` tokens, `[(length - 1) * hidden layers * top_k]`, as a rollout's
    routes `[length, mixture layers, top_k]`. Raises: ValueError when it cannot be that."""
    if flat is None:
        raise ValueError("are missing; start the server with --enable-return-routed-experts")
    layers, top_k, experts = hf.num_hidden_layers, hf.num_experts_per_tok, hf.num_experts
    wanted = (length - 1) * layers * top_k
    if flat.numel() != wanted:
        raise ValueError(
            f"are {flat.numel()} numbers, expected {wanted}: {length - 1} tokens * {layers} layers * {top_k} experts"
        )
    chosen = flat.view(length - 1, layers, top_k)[:, moe_layers(hf)]
    ordered = chosen.sort(dim=-1).values
    if chosen.numel() and not 0 <= int(ordered[..., 0].min()) <= int(ordered[..., -1].max()) < experts:
        raise ValueError(f"are {int(chosen.min())} to {int(chosen.max())}, the model has 0 to {experts - 1}")
    if bool((ordered[..., 1:] == ordered[..., :-1]).any()):  # as of a token whose routes were lost: zeros
        raise ValueError("name one twice for one token: the server did not keep all of them")
    dtype = route_dtype(experts)
    last = torch.full((1, *chosen.shape[1:]), unrouted(dtype), dtype=dtype)
    return torch.cat([chosen.to(dtype), last])
