"""Stands in for SGLang's compiled kernels on a CPU without AVX512, where their build does not load.

SGLang imports names from here that only speculative decoding, mixtures of experts and the like call; with no operator
registered it takes its torch implementations. What is called nevertheless fails aloud.
"""

from typing import Any

import torch


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"sgl_kernel.{name}: no stand-in for a CPU")

    return absent


def _top_k_softmax(
    hidden: torch.Tensor, router_logits: torch.Tensor, k: int, renormalize: bool, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    if bias is not None:
        raise NotImplementedError("top-k routing with a correction bias: no stand-in for a CPU")
    weights, experts = router_logits.float().softmax(-1).topk(k, dim=-1)
    return weights / weights.sum(-1, keepdim=True) if renormalize else weights, experts.to(torch.int32)


# the one operator that mixtures of experts need
_library = torch.library.Library("sgl_kernel", "FRAGMENT")
_library.define(
    "topk_softmax_cpu(Tensor hidden_states, Tensor gating_output, int topk, bool renormalize, "
    "Tensor? correction_bias=None) -> (Tensor, Tensor)"
)
_library.impl("topk_softmax_cpu", _top_k_softmax, "CPU")


class _NoCudaRuntime:
    """Page-locking host memory means nothing without a GPU."""

    @staticmethod
    def cudaHostRegister(*args: Any) -> int:
        return 0

    @staticmethod
    def cudaHostUnregister(*args: Any) -> int:
        return 0


if not torch.cuda.is_available():
    torch.cuda.cudart = lambda: _NoCudaRuntime  # returned routed experts live in memory that SGLang registers
