"""The forward pass of the old log-probabilities, kept for the update that would repeat it.

The first mini-batch of a step is updated with the weights that its old log-probabilities were computed with. Where it
is one micro-batch on one pipeline stage, its update begins with that pass, graph included, instead of the same one
again: the same bits, one forward pass less a step. Without this door every update would compute its own forward pass.
"""

from torch import Tensor

from megatron_rl.types import MicroBatch, MiniBatch


class KeptForward:
    """At most one output with its graph. The next forward pass and the next update forget it."""

    def __init__(self) -> None:
        """Keep nothing yet."""
        self._output: Tensor | None = None
        self._token_ids: Tensor | None = None  # of its micro-batch: the copies that carry results share this tensor

    def keep(self, micro_batch: MicroBatch, output: Tensor) -> None:
        """Keep the pass of this micro-batch."""
        self._output, self._token_ids = output, micro_batch.token_ids

    def forget(self) -> None:
        """Free what is kept."""
        self._output = self._token_ids = None

    def take(self, mini_batch: MiniBatch) -> Tensor | None:
        """Return the pass of this mini-batch if it is the one that is kept; afterwards none is."""
        same = self._token_ids is mini_batch.micro_batches[0].token_ids
        output = self._output if same else None
        self.forget()
        return output
