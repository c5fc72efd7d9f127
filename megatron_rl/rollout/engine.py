"""What generates rollouts: the protocol of every engine, its requests, and the registry."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from megatron_rl.types import Rollout

if TYPE_CHECKING:
    from megatron_rl.config import Config


class EngineError(RuntimeError):
    """The engine cannot do what was asked; its state is as before unless the message says otherwise."""


class EngineAborted(EngineError):
    """`abort` ended a running `generate`; its partial responses are lost."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one response is sampled."""

    temperature: float  # divides the logits; 0 is greedy, with log-probabilities reported at temperature 1
    top_p: float  # nucleus mass in (0, 1]
    top_k: int  # 0 keeps all tokens
    max_response_tokens: int
    stop_token_ids: tuple[int, ...]  # each ends the response and belongs to it
    seed: int  # with prompt_id, sample_index and position it fixes every draw


@dataclass(frozen=True, slots=True)
class Request:
    """One response wanted. Token ids in, a `Rollout` out."""

    prompt_id: int
    sample_index: int
    token_ids: tuple[int, ...]  # the prompt
    sampling: SamplingParams


@runtime_checkable
class RolloutEngine(Protocol):
    """Generation with the current policy.

    The order in a step: `update_weights`, `generate` (any number of times), and around the training phase `sleep` and
    `wake` where memory is shared.
    """

    def generate(self, requests: Sequence[Request]) -> list[Rollout]:
        """One rollout per request, in the requests' order; `score`, `reward` and `error` are unset, tensors on the CPU.

        Raises: EngineError when there are no weights, the engine sleeps, or a log-probability is not finite;
        EngineAborted.
        """

    def update_weights(self, stream: Iterable[tuple[str, Tensor]], weight_version: int) -> None:
        """Replace all weights by (Hugging Face name, full tensor) pairs, and stamp later rollouts with
        `weight_version`.

        Raises: EngineError naming an unknown, repeated or missing weight or a wrong shape; until a later update
        succeeds, `generate` then refuses.
        """

    def sleep(self) -> None:
        """Give the accelerator's memory back until `wake`; nothing happens when already asleep."""

    def wake(self) -> None:
        """Undo `sleep`; nothing happens when awake."""

    def flush_cache(self) -> None:
        """Forget key-value entries that older weights computed."""

    def abort(self) -> None:
        """End a running `generate` soon, from another thread or a signal handler; it raises EngineAborted."""

    def health(self) -> None:
        """Raises: EngineError saying why `generate` would refuse."""

    def close(self) -> None:
        """Free everything; the engine is unusable afterwards."""


def _transformers(config: Config, hf_config: dict[str, Any], device: torch.device) -> RolloutEngine:
    from megatron_rl.rollout.transformers import TransformersEngine

    dtype = getattr(torch, config.model.dtype)
    return TransformersEngine(hf_config, dtype=dtype, device=device, batch_size=config.rollout.batch_size)


# imports are inside, so that an engine's package is needed only by those who choose it
ENGINES: dict[str, Callable[[Config, dict[str, Any], torch.device], RolloutEngine]] = {"transformers": _transformers}


def build_engine(config: Config, hf_config: dict[str, Any], device: torch.device) -> RolloutEngine:
    """The engine that `rollout.engine` names, still without weights. `hf_config` must hold `vocab_size`."""
    return ENGINES[config.rollout.engine](config, hf_config, device)
