"""What generates rollouts: the protocol of every engine, its requests, and the registry."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from megatron_rl.errors import UserError
from megatron_rl.types import Rollout

if TYPE_CHECKING:
    from transformers import PretrainedConfig


_TAKE_SECONDS = 0.25  # for which finished responses are gathered


class EngineError(RuntimeError, UserError):
    """The engine cannot do what was asked; its state is as before unless the message says otherwise."""


class EngineAborted(EngineError):
    """`abort` ended a running `generate`; its partial responses are lost."""


class ServersLost(EngineError):
    """Servers died with what they were doing; `update_weights` restarts them, and requests may then be made again."""


@dataclass(frozen=True, slots=True, order=True)
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
    with_routes: bool = False  # of a mixture of experts: the rollout tells the experts that each token was routed to
    expected_tokens: int = 0  # of the response, from earlier samples of the prompt; 0: unknown
    at_once: bool = False  # it does not wait for room at a server


Item = TypeVar("Item")
Then = Callable[[Request, Rollout], Any]


@dataclass(slots=True)
class Taken:
    """What a `Stream` has brought since it was last asked."""

    finished: list[Any] = field(default_factory=list)  # what `then` made of each response
    lost: list[Request] = field(default_factory=list)  # that no living server can answer: see `ServersLost`
    why_lost: str = ""


@dataclass(slots=True)
class Cost:
    """What servers did for a rank."""

    busy: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # by address: from, to, time.time()
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of those: their keys and values were at hand
    discarded_tokens: int = 0  # generated for responses that were ended


class Stream(Protocol):
    """One rank's responses under way: more are asked for while others are generated."""

    in_rounds: bool  # `take` generates, and returns when everything is answered

    def add(self, requests: Sequence[Request]) -> None:
        """Ask for more. Raises: EngineError as `RolloutEngine.stream`."""

    def take(self, seconds: float) -> Taken:
        """Return what has come, after `seconds` or when everything has. Raises: EngineError."""

    def is_idle(self) -> bool:
        """Tell whether nothing is under way."""

    def backlog(self) -> tuple[int, int]:
        """Return how many requests wait for room at a server, and the number of servers: 0 where there are none."""

    def drop(self) -> None:
        """End all that is under way."""

    def cost(self) -> Cost:
        """Return what servers did since this was last asked."""


class Rounds(Stream):
    """The stream of an engine that generates in the caller's thread."""

    in_rounds = True

    def __init__(self, engine: RolloutEngine, then: Then) -> None:
        """Ask for nothing yet."""
        self._engine, self._then, self._waiting = engine, then, list[Request]()

    def add(self, requests: Sequence[Request]) -> None:
        """Keep the requests for the next `take`."""
        self._waiting += requests

    def take(self, seconds: float) -> Taken:
        """Generate everything that was asked for."""
        requests, taken, answered = self._waiting, Taken(), set[int]()
        self._waiting = []
        try:
            for index, rollout in self._engine.stream(requests) if requests else ():
                answered.add(index)
                taken.finished.append(self._then(requests[index], rollout))
        except ServersLost as error:
            taken.why_lost = str(error)
            taken.lost = [request for index, request in enumerate(requests) if index not in answered]
        return taken

    def is_idle(self) -> bool:
        """Tell whether nothing was asked for."""
        return not self._waiting

    def backlog(self) -> tuple[int, int]:
        """Return nothing: there are no servers."""
        return 0, 0

    def drop(self) -> None:
        """Forget what was asked for: nothing of it was begun."""
        self._waiting = []

    def cost(self) -> Cost:
        """Return nothing: there are no servers."""
        return Cost()


@runtime_checkable
class RolloutEngine(Protocol):
    """Generation with the current policy.

    The order in a step: `update_weights`, `generate` (any number of times), and around the training phase `sleep` and
    `wake` where memory is shared.
    """

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Rollout]]:
        """(position of the request, its rollout) as responses finish; `score`, `reward` and `error` are unset, tensors
        on the CPU. An engine has this or `open` of its own.

        Raises: EngineError when there are no weights, the engine sleeps, or a log-probability is not finite;
        EngineAborted; ServersLost after everything else has been yielded.
        """
        positions = {(request.prompt_id, request.sample_index): i for i, request in enumerate(requests)}
        stream = self.open(lambda request, rollout: (positions[request.prompt_id, request.sample_index], rollout))
        stream.add(requests)
        num_lost, why = 0, ""
        while not stream.is_idle():
            taken = stream.take(_TAKE_SECONDS)
            yield from taken.finished
            num_lost, why = num_lost + len(taken.lost), why or taken.why_lost
        if num_lost:
            raise ServersLost(f"{num_lost} of {len(requests)} responses were lost: {why}")

    def open(self, then: Then) -> Stream:
        """Return a stream of responses. `then`: called with each as soon as it is there, on whatever thread."""
        return Rounds(self, then)

    def generate(self, requests: Sequence[Request]) -> list[Rollout]:
        """One rollout per request, in the requests' order. Raises: as `stream`."""
        rollouts = dict(self.stream(requests))
        return [rollouts[i] for i in range(len(requests))]

    def update_weights(self, stream: Iterable[tuple[str, Tensor]], weight_version: int) -> None:
        """Replace all weights by (Hugging Face name, full tensor) pairs, and stamp later rollouts with
        `weight_version`. Every trainer rank calls it.

        Raises: on every rank, EngineError naming an unknown, repeated or missing weight or a wrong shape, ServersLost;
        until a later update succeeds, `generate` then refuses.
        """

    def sleep(self) -> None:
        """Give the accelerator's memory back until `wake`; nothing happens when already asleep."""

    def wake(self) -> None:
        """Undo `sleep`; nothing happens when awake."""

    def abort(self) -> None:
        """End a running `generate` soon, from another thread or a signal handler; it raises EngineAborted."""

    def health(self) -> None:
        """Raises: EngineError saying why `generate` would refuse."""

    def close(self) -> None:
        """Free everything; the engine is unusable afterwards."""


def part_of(items: list[Item], rank: int, world_size: int) -> list[Item]:
    """Return a rank's part of what all ranks share: contiguous, and as long as the others' but for one."""
    return items[len(items) * rank // world_size : len(items) * (rank + 1) // world_size]


@dataclass(frozen=True, slots=True)
class Place:
    """This trainer rank in the world, as far as engines are concerned."""

    rank: int
    world_size: int
    local_rank: int  # 0 starts its node's servers
    gather: Callable[[Any], Sequence[Any]]  # all ranks' objects, in the order of ranks
    devices_taken: int = 0  # of this node, beyond the trainer's, by other servers
    has_weights: bool = False  # they lie in the folder of weight_sync.mode=disk already


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """What an engine is built from, besides the config."""

    hf: PretrainedConfig  # of the policy
    model_dir: Path  # holds the policy's config.json and tokenizer, once `build_engine` is called on server engines
    device: torch.device
    place: Place
