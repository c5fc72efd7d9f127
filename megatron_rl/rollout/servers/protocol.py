"""The protocol of engine servers: how each kind is started, asked for tokens and given weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from megatron_rl.rollout.clocks import HEALTH_SECONDS
from megatron_rl.rollout.engine import Request
from megatron_rl.rollout.servers.checksums import Checksums
from megatron_rl.rollout.servers.http import Server


@dataclass(frozen=True, slots=True)
class Completion:
    """A server's answer to one request."""

    token_ids: list[int]  # response only; with the stop token, when one ended it
    logprobs: list[float]  # nats, of those tokens at the request's temperature, before any top-p or top-k cut
    finish_reason: str  # "stop", "length", or "abort" when the server ended it early: the tokens so far are valid
    spans: tuple[tuple[int, int], ...] | None  # (weight_version, tokens), in order; None: the server does not tell
    # experts of every token but the last, prompt included: [tokens - 1, layers, top_k], flattened; None: not told
    routes: Tensor | None = None
    cached_tokens: int = 0  # of the prompt, as the server says: their keys and values were at hand; 0: not told


@dataclass(frozen=True, slots=True)
class LaunchSpec:
    """One engine server to start on this machine."""

    python: Path  # interpreter of an environment that has the engine
    model_dir: Path  # config.json and perhaps a tokenizer; no weights: they come through the first update
    port: int
    tp: int
    dtype: str  # as in config.json: float32, bfloat16
    devices: tuple[int, ...]  # GPUs, `tp` of them; empty: the CPU
    context_tokens: int  # longest prompt and response together
    max_concurrency: int  # requests decoded together
    kv_tokens: int | None  # size of the key-value cache; None, on a GPU alone: by memory_fraction
    memory_fraction: float  # of the GPU's memory, weights and key-value cache together
    colocated: bool  # the trainer shares the GPUs: the server must be able to give its memory back
    extra_args: tuple[str, ...]  # appended to the server's command line
    float32_logits: bool = False  # its output layer gives float32 from the bfloat16 of `dtype`, as the trainer's does
    with_routes: bool = False  # it must be able to tell the experts of each token
    deterministic: bool = False  # its sums must not depend on what else is in a batch
    key: str = ""  # that every request must bring; empty: none
    host: str = "127.0.0.1"  # the address to listen on; 0.0.0.0 when the trainer spans several machines


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of a bucket of weights: Hugging Face names, full shapes and dtypes (as in "float32"), in order."""

    names: list[str]
    shapes: list[list[int]]
    dtypes: list[str]


class Dialect(Protocol):
    """One kind of server. Stateless but for `seeded`: everything is said to the `Server` that comes with the call.

    All coroutines raise ServerRefused, ServerBusy and ServerLost. An update is: `pause`, `flush`, `begin_update`, one
    `receive_*` per bucket (or `load_folder`, without begin and end), `end_update`, `flush`, `resume`.
    """

    name: str
    seeded: bool = False  # each request shall be drawn from its own seed
    checksums_are_digests: bool = False  # of `megatron_rl_digest`, and not of the server's own kind

    def command(self, spec: LaunchSpec) -> tuple[list[str], dict[str, str]]:
        """Return the argument vector and the environment variables to add. Raises: EngineError for what cannot be
        served."""

    async def health(self, server: Server, seconds: float = HEALTH_SECONDS) -> None:
        """Ask once, for so many seconds, whether it is ready for requests."""

    async def settle_in(self, server: Server) -> None:
        """Prepare a server that the run started; called once, when it is ready."""

    async def generate(self, server: Server, request: Request, rid: str, *, seconds: float) -> Completion:
        """Return one response. `rid` names it for `abort`; `seconds` is the deadline of the whole call."""

    async def abort(self, server: Server, rid: str) -> None:
        """End one request early; nothing happens when it is unknown."""

    async def pause(self, server: Server) -> None:
        """Stop decoding in a way that loses no token: requests stay and are computed anew from their tokens after
        `resume`, or they return with finish_reason "abort"."""

    async def resume(self, server: Server) -> None:
        """Undo `pause`."""

    async def flush(self, server: Server) -> None:
        """Forget all key-value entries. Raises: ServerRefused when requests hold some."""

    async def sleep(self, server: Server) -> None:
        """Give the accelerator's memory back, weights and key-value cache."""

    async def wake(self, server: Server) -> None:
        """Take the memory again; the weights are undefined until the next update."""

    async def hf_config(self, server: Server) -> dict[str, Any]:
        """Return the config.json of the model that it serves. Raises: EngineError when it cannot be known."""

    async def weight_version(self, server: Server) -> int:
        """Return the version of the weights that it serves; -1 before the first update."""

    async def num_workers(self, server: Server) -> int:
        """Return the number of processes that receive weights: its tensor-parallel size."""

    async def capacity(self, server: Server) -> int:
        """Return how many tokens its key-value cache holds, all its replicas together. Raises: EngineError when it does
        not say."""

    async def open_group(
        self, server: Server, *, host: str, port: int, rank_offset: int, world_size: int, name: str, backend: str
    ) -> None:
        """Make its workers join a process group as ranks rank_offset .. rank_offset + num_workers - 1; return when the
        group stands. Rank 0 is the trainer."""

    async def close_group(self, server: Server, name: str) -> None:
        """Leave the group."""

    async def begin_update(self, server: Server) -> None:
        """Open an update."""

    async def receive_broadcast(self, server: Server, manifest: Manifest, group: str) -> None:
        """Receive one flat uint8 bucket broadcast by rank 0 of `group`, tensor after tensor, and load it."""

    def shared_object(self, manifest: Manifest, flat: Tensor) -> Any:
        """Return what to pickle for `receive_shared`: the flat uint8 bucket, in the form that the server unpickles."""

    async def receive_shared(self, server: Server, manifest: Manifest, payloads: list[bytes]) -> None:
        """Load one bucket from memory that this machine shares: `payloads[i]` is for worker i, torch's ForkingPickler's
        pickle of `shared_object`, which carries a handle and not the bytes."""

    async def load_folder(self, server: Server, path: Path, weight_version: int) -> None:
        """Load a Hugging Face folder that the server can read, as `weight_version`."""

    def parameter_of(self, name: str) -> str:
        """Return the server's parameter that holds a weight, as `checksums` calls it."""

    async def checksums(self, server: Server) -> Checksums:
        """Return each worker's checksums: equal if and only if the bytes are."""

    async def end_update(self, server: Server, weight_version: int) -> None:
        """Finish: from here on responses carry `weight_version`."""
