"""A policy loss of your own in one file: PPO-clip whose tokens count less, the further their entropy is from the usual.

    PYTHONPATH=examples megatron-rl train configs/quickstart.yaml 'loss={type: my_method:UsualLoss, width: 0.5}'

It has all that the built-in ones have: options that the config checks, exact statistics over the whole mini-batch, a
state that checkpoints keep, and a place in `megatron-rl shadow`. test_my_method.py proves that no layout changes it.
"""

from __future__ import annotations

import math

from pydantic import PrivateAttr
from torch import Tensor

from megatron_rl.algorithms.control import mean_entropy
from megatron_rl.algorithms.families import WeightedLoss
from megatron_rl.algorithms.section import Fraction, PositiveFloat
from megatron_rl.types import MiniBatch, Ranks, TrainBatch


class UsualLoss(WeightedLoss):
    """Weights `w = exp(-((H - usual) / width)^2) * N / sum`, of mean 1; usual: a running mean of the steps' entropy."""

    width: PositiveFloat = 0.5
    """Nats from the usual entropy at which a token's weight has fallen to 1/e."""
    pace: Fraction = 0.1
    """Share of the newest step in the usual entropy."""
    _usual: float = PrivateAttr(math.nan)

    def follow(self, batch: TrainBatch, ranks: Ranks, state: dict[str, float]) -> tuple[UsualLoss, dict[str, float]]:
        """Once a step: take over what the step before remembered, and return what the next one shall."""
        entropy = mean_entropy(batch, ranks)  # NaN when no token counts
        usual = state.get("usual_entropy", entropy)
        loss = self.model_copy()
        loss._usual = usual if math.isnan(entropy) else usual + self.pace * (entropy - usual)
        return loss, {"usual_entropy": loss._usual}

    def weights(self, mini_batch: MiniBatch, ranks: Ranks) -> Tensor:
        """Once an update: sums go over all ranks and micro-batches, so no layout changes them."""
        entropy = mini_batch.cat_stats("entropy").double()
        kernel = (-(((entropy - self._usual) / self.width) ** 2)).exp()
        count, total = ranks.sum(kernel.new_tensor([kernel.numel(), float(kernel.sum())])).tolist()
        return kernel * count / total
