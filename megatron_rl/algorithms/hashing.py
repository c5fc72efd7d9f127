"""Counter-based randomness: a value is a pure function of what it belongs to, never of an RNG's state.

Two ranks that ask for the same (seed, step, prompt_id, sample_index, position) get the same number whatever they drew
before, so sampling and token selection do not depend on the layout.
"""

import torch
from torch import Tensor

from megatron_rl.types import Float64, Int64, Shaped

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def hash64(*fields: int | Shaped[Tensor, "#*shape"]) -> Int64[Tensor, "*shape"]:
    """Return a hash of the fields, elementwise, of their broadcast shape; every bit is uniform.

    Sensitive to each field's value, to their order and to their number. Integers lie in [-2**63, 2**63).

    Raises: TypeError for a floating-point tensor, ValueError without fields.
    Source: splitmix64's finaliser (Steele, Lea, Flood 2014; constants of Stafford's mix 13), chained over the fields.
    """
    if not fields:
        raise ValueError("hash64: got no fields, expected at least one")
    device = next((field.device for field in fields if isinstance(field, Tensor)), None)
    state = torch.tensor(_signed(_GOLDEN), dtype=torch.int64, device=device)
    for field in fields:
        if isinstance(field, Tensor) and (field.is_floating_point() or field.is_complex()):
            raise TypeError(
                f"hash64: got a {field.dtype} tensor, expected integers (a float's bits differ across layouts)"
            )
        state = _mix64((state + _signed(_GOLDEN)) ^ torch.as_tensor(field, dtype=torch.int64, device=device))
    return state


def hash_uniform(*fields: int | Shaped[Tensor, "#*shape"]) -> Float64[Tensor, "*shape"]:
    """Return `hash64` as a number in [0, 1): a multiple of 2**-53, so 1 itself never occurs."""
    return _shift(hash64(*fields), 11).to(torch.float64) * 2.0**-53


def _mix64(x: Tensor) -> Tensor:
    # int64 multiplication and addition wrap around, which is what arithmetic modulo 2**64 needs
    x = (x ^ _shift(x, 30)) * _signed(_MULTIPLIERS[0])
    x = (x ^ _shift(x, 27)) * _signed(_MULTIPLIERS[1])
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically; the mask drops the copies of the sign bit
    return (x >> bits) & (_MASK >> bits)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x
