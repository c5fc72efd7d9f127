"""Which experts the embedded engine's model chooses, token by token."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_rl.models.expert_routes import moe_layers, route_dtype, unrouted


class RouteRecorder:
    """Watches the gates of a transformers model. Call in this order for each batch: `begin`, a forward over the
    distinct prompts, `prompts`, then `fed` after each forward over one token a row, and `of` at the end."""

    def __init__(self, model: Any) -> None:
        """A model without experts has nothing to watch."""
        self._model, self._layers, self._on = model, moe_layers(model.config), False
        self._seen: list[Tensor] = []  # of the forward in work, one per layer: [tokens, top_k]
        for layer in self._layers:
            model.model.layers[layer].mlp.gate.register_forward_hook(self._see)

    def _see(self, gate: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        if self._on:
            self._seen.append(output[2])

    def _take(self, rows: int) -> Tensor:
        """`[rows, tokens a row, layers, top_k]` of the last forward."""
        taken = torch.stack(self._seen, dim=1).to(self._dtype)
        self._seen = []
        return taken.view(rows, -1, *taken.shape[1:])

    def begin(self, wanted: bool, rows: int, room: int) -> None:
        """A batch of `rows` responses of at most `room` tokens; `wanted`: whether to record it."""
        self._on, self._seen = wanted, []
        if wanted:
            config = self._model.config
            self._dtype = route_dtype(config.num_experts)
            shape = (rows, room, len(self._layers), config.num_experts_per_tok)
            self._response = torch.empty(shape, dtype=self._dtype, device=self._model.device)

    def prompts(self, which: Sequence[int]) -> None:
        """The forward just made was over the distinct prompts, left-padded; row i of the batch goes on from prompt
        `which[i]`."""
        if self._on:
            self._which, self._prompt = which, self._take(max(which) + 1)

    def fed(self, rows: Tensor, step: int) -> None:
        """The forward just made took each row's response token number `step`."""
        if self._on:
            self._response[rows, step] = self._take(len(rows))[:, 0]

    def of(self, row: int, prompt: int, response: int) -> Tensor | None:
        """A row's routes `[prompt + response, layers, top_k]` on the CPU, given its lengths; None when not recorded.
        The last token has none, whether or not the row stayed in the batch after it."""
        if not self._on:
            return None
        of_prompt = self._prompt[self._which[row]]
        routes = torch.cat([of_prompt[len(of_prompt) - prompt :], self._response[row, :response]]).cpu()
        routes[-1] = unrouted(self._dtype)
        return routes
