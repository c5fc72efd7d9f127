"""torch, and the modules of this folder that need it, imported when they are first used.

A method's file has its options beside its formula, and a config is read without torch, which takes seconds to import.
"""

import importlib
from typing import TYPE_CHECKING, Any

__all__ = [
    "Flags",
    "LossInputs",
    "LossOutputs",
    "MiniBatch",
    "Number",
    "Numbers",
    "Ranks",
    "Tensor",
    "TrainBatch",
    "torch",
]
__all__ += ["aggregation", "control", "covariance", "entropy", "hashing", "kl", "terms"]

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megatron_rl.algorithms import aggregation, control, covariance, entropy, hashing, kl, terms
    from megatron_rl.types import Bool, Float64, LossInputs, LossOutputs, MiniBatch, Ranks, TrainBatch

    Number = Float64[Tensor, ""]
    Numbers = Float64[Tensor, "N"]  # of this rank's response tokens in a mini-batch
    Flags = Bool[Tensor, "N"]
else:

    class _Later:
        def __init__(self, module: str) -> None:
            self._module = module

        def __getattr__(self, name: str) -> Any:
            return getattr(importlib.import_module(self._module), name)

    torch = _Later("torch")
    _MODULES = [_Later(f"{__package__}.{name}") for name in __all__[10:]]
    aggregation, control, covariance, entropy, hashing, kl, terms = _MODULES
    LossInputs = LossOutputs = MiniBatch = TrainBatch = Ranks = Tensor = Number = Numbers = Flags = (
        Any  # in annotations alone
    )
