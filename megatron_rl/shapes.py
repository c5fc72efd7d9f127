"""Shapes in signatures: `Float[Tensor, "T V"]` is a floating-point tensor of two dimensions. Tests check them at every
call, by jaxtyping and beartype (tests/conftest.py); a run does not, and needs neither installed.

Within one call a letter stands for one length. The letters:

| letter | length                                                                                              |
|--------|-----------------------------------------------------------------------------------------------------|
| T      | packed tokens of a micro-batch, padding included; under context parallelism this rank's             |
| B      | rollouts of a step                                                                                  |
| S      | sequences of a micro-batch                                                                          |
| E      | their S + 1 boundaries in the packed tokens (`cu_seqlens`); the S sequences themselves are "E-1"    |
| N      | response tokens of a mini-batch: in a shape this rank's, in a formula those of all ranks            |
| V      | columns of the vocabulary that this rank holds, padding included                                    |
| H      | hidden size                                                                                         |
| G      | prompts, or other groups of what is summed up                                                       |
| R      | ranks                                                                                               |
| k      | selected                                                                                            |
| C      | columns of a table                                                                                  |

"..." is any shape, "" a scalar, and a number that number. `Float` is any floating-point type, `Int` any integer type,
`Shaped` any type at all; a number behind the name is the number of bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float32, Float64, Int, Int64, Shaped
else:
    try:
        from jaxtyping import Bool, Float, Float32, Float64, Int, Int64, Shaped
    except ImportError:

        class _Unchecked:
            """Stands for all of them: `_Unchecked[Tensor, "T V"]` is Tensor."""

            def __class_getitem__(cls, tensor_and_shape: tuple[type, str]) -> type:
                return tensor_and_shape[0]

        Bool = Float = Float32 = Float64 = Int = Int64 = Shaped = _Unchecked

__all__ = ["Bool", "Float", "Float32", "Float64", "Int", "Int64", "Shaped"]
