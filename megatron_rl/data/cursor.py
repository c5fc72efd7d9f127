"""The order in which prompts are drawn."""

from collections.abc import Collection, Sequence

import torch

from megatron_rl.algorithms.hashing import hash64
from megatron_rl.errors import DataError
from megatron_rl.types import Prompt


class PromptCursor:
    """Where the run is in its endless sequence of prompts: each epoch a new shuffle, fixed by (seed, epoch)."""

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        """Start at the first epoch. Raises: DataError without prompts."""
        if not prompts:
            raise DataError("no training prompts")
        self._prompts, self._seed = list(prompts), seed
        self._epoch, self._position = 0, 0
        self._order = self._shuffle()

    @property
    def prompts(self) -> list[Prompt]:
        """Return all of them, in the order of the data."""
        return self._prompts

    def take(self, count: int, exclude: Collection[int] = ()) -> list[Prompt]:
        """Return the next `count` distinct prompts, passing over those whose prompt_id is in `exclude`; see `draw`."""
        return [prompt for prompt, _ in self.draw(count, exclude)]

    def draw(self, count: int, exclude: Collection[int] = ()) -> list[tuple[Prompt, dict[str, int]]]:
        """Return the next `count` distinct prompts, passing over those whose prompt_id is in `exclude`, each with the
        state that would draw it, and those behind it, again.

        Repetition is possible only where an epoch ends within a step; a prompt passed over is not made up for.

        Raises: DataError when fewer than `count` prompts are left to choose from; the cursor then stays.
        """
        available = sum(prompt.prompt_id not in exclude for prompt in self._prompts)
        if count > available:
            raise DataError(
                f"{count} prompts are wanted, but of the data set's {len(self._prompts)} only {available} have not "
                "been drawn in this step; use more problems, lower train.prompts_per_step, or lower "
                "dynamic_sampling.max_batches"
            )
        drawn: dict[int, tuple[Prompt, dict[str, int]]] = {}
        while len(drawn) < count:
            if self._position == len(self._order):
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._shuffle()
            prompt, before = self._prompts[self._order[self._position]], self.state()
            self._position += 1
            if prompt.prompt_id not in exclude:
                drawn.setdefault(prompt.prompt_id, (prompt, before))
        return list(drawn.values())

    def state(self) -> dict[str, int]:
        """Return what a checkpoint keeps."""
        return {"epoch": self._epoch, "position": self._position, "seed": self._seed, "num_prompts": len(self._prompts)}

    def restore(self, state: dict[str, int]) -> None:
        """Continue where `state` was taken. Raises: DataError when the data or the seed are not those of `state`."""
        for name, value in (("seed", self._seed), ("num_prompts", len(self._prompts))):
            if state[name] != value:
                raise DataError(
                    f"the checkpoint's data order has {name}={state[name]}, this run has {value}; resume with the same "
                    "data and seed, or start afresh with train.resume=never"
                )
        self._epoch, self._position = state["epoch"], state["position"]
        self._order = self._shuffle()

    def _shuffle(self) -> list[int]:
        keys = hash64(self._seed, self._epoch, torch.arange(len(self._prompts)))
        return torch.argsort(keys, stable=True).tolist()
