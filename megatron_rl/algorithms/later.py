"""torch, and the modules of this folder that need it, imported when they are first used.

A method's file has its options beside its formula, and a config is read without torch, which takes seconds to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `as`: for the files that import them from here
    import torch as torch
    from torch import Tensor as Tensor

    from megatron_rl.algorithms import aggregation as aggregation
    from megatron_rl.algorithms import covariance as covariance
    from megatron_rl.algorithms import hashing as hashing
    from megatron_rl.algorithms import kl as kl
    from megatron_rl.algorithms import terms as terms
    from megatron_rl.algorithms import weighting as weighting
    from megatron_rl.types import LossInputs as LossInputs
    from megatron_rl.types import LossOutputs as LossOutputs
    from megatron_rl.types import MicroBatch as MicroBatch
    from megatron_rl.types import MiniBatch as MiniBatch
    from megatron_rl.types import Ranks as Ranks
    from megatron_rl.types import TrainBatch as TrainBatch
else:

    class _Later:
        def __init__(self, module: str) -> None:
            self._module = module

        def __getattr__(self, name: str) -> Any:
            return getattr(importlib.import_module(self._module), name)

    Tensor = LossInputs = LossOutputs = MicroBatch = MiniBatch = Ranks = TrainBatch = Any  # in annotations alone
    torch = _Later("torch")
    _NAMES = ("aggregation", "covariance", "hashing", "kl", "terms", "weighting")
    aggregation, covariance, hashing, kl, terms, weighting = (_Later(f"megatron_rl.algorithms.{n}") for n in _NAMES)
