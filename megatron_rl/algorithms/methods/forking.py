"""80/20: only the tokens of highest entropy, the forks, get the policy gradient, `w = 1[H >= tau] * N / K`.

tau is the entropy of the ceil(keep_fraction * N)-th token by falling entropy, K the number of tokens with H >= tau. N /
K makes the mean over all N tokens the mean over the kept ones, as the paper's indicator stands in the numerator and in
the normaliser. Tokens tied at tau are all kept, as in the paper (its code keeps exactly K, the first in memory).
Regularisers still see every token. Mathematically equal entropies (the first tokens of one prompt's samples) can be
told apart by rounding, which depends on the layout. The paper's base is DAPO: eps_high is 0.28.
Source: arXiv 2506.01939, eq. 6, rho = 0.2; over the mini-batch, where its text says "within each (micro-)batch".
"""

import math
from collections.abc import Iterator
from typing import Any

from megatron_rl.algorithms.families import WeightedLoss
from megatron_rl.algorithms.later import MiniBatch, Numbers, Ranks, torch
from megatron_rl.algorithms.section import Fraction, NonNegativeFloat


class ForkingLoss(WeightedLoss):
    compared = {"forking": {"eps_high": 0.2}}
    restraints = {"keep_fraction": -1}
    type: str = "forking"
    eps_high: NonNegativeFloat = 0.28
    """The ratio's upper bound is 1 + eps_high."""
    keep_fraction: Fraction = 0.2
    """Fraction of the mini-batch's response tokens that is kept, those of highest entropy."""

    def weights(self, mini_batch: MiniBatch, ranks: Ranks) -> Numbers:
        entropy = mini_batch.cat_stats("entropy")
        count = int(ranks.sum(torch.tensor([entropy.numel()], device=entropy.device)))
        wanted = min(count, math.ceil(self.keep_fraction * count - 1e-9))  # 0.2 * 15 is 3.0000000000000004
        kept = (entropy >= ranks.kth_largest(entropy, max(1, wanted))).double()
        return kept * (count / ranks.sum(kept.sum()))

    def faults(self, config: Any) -> Iterator[str]:
        if self.aggregation != "token_mean":
            yield (
                f"loss.aggregation={self.aggregation} with loss.type=forking: the paper's mean is over the kept tokens "
                "of the mini-batch; set aggregation=token_mean"
            )
