"""The section `loss`: which policy loss, and its options."""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import SerializeAsAny, WrapValidator

from megatron_rl.algorithms.methods import METHODS, loss_class
from megatron_rl.algorithms.policy_loss import PolicyLoss


def _read(value: Any, _: Any) -> PolicyLoss:
    if isinstance(value, PolicyLoss):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise ValueError(f"expected a mapping with type: one of {', '.join(METHODS)}, or module:Class of your own")
    return loss_class(value["type"]).model_validate(value)


if TYPE_CHECKING:
    LossConfig = PolicyLoss
else:
    LossConfig = Annotated[SerializeAsAny[functools.reduce(operator.or_, METHODS.values())], WrapValidator(_read)]
