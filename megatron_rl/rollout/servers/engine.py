"""The engine over servers: every trainer rank asks them for its share of the responses, rank 0 gives them weights.

Two threads a rank: the caller's, and one with the event loop that speaks to the servers. A response that a server lost
is asked for anew from another; one that a pause cut short goes on from the tokens it has. Each request is answered at
most once, whatever happens on the way.
"""

import asyncio
import contextlib
import functools
import itertools
import random
import uuid
import weakref
from collections.abc import Coroutine, Iterable
from typing import Any

from torch import Tensor
from typing_extensions import override

from megatron_rl import device
from megatron_rl.launch import say
from megatron_rl.rollout.clocks import HEALTH_SECONDS
from megatron_rl.rollout.engine import Cost, EngineError, Request, RolloutEngine, ServersLost, Then
from megatron_rl.rollout.servers.answers import as_rollout, joined, rest, too_late
from megatron_rl.rollout.servers.checksums import Checksums, WeightProof, digested
from megatron_rl.rollout.servers.fleet import Fleet
from megatron_rl.rollout.servers.http import Loop, Server, ServerBusy, ServerFailed, ServerLost, why_lost
from megatron_rl.rollout.servers.protocol import Completion, Dialect
from megatron_rl.rollout.servers.stream import ServerStream
from megatron_rl.rollout.servers.turns import Target, Turns
from megatron_rl.rollout.servers.weight_sync import Channel, check_same_model
from megatron_rl.types import Rollout

_MAX_TRIES = 10  # of one response on servers that break or fail and yet are healthy
_BACKOFF_SECONDS = (0.1, 10.0)  # first and longest pause before a request is sent again
_ENDED_SECONDS = 2.0  # for a server to tell what it had of a request that it was told to end


class ServerEngine(RolloutEngine):
    """Generates with one or more servers of one dialect."""

    def __init__(self, dialect: Dialect, loop: Loop, fleet: Fleet, channel: Channel, hf_config: Any) -> None:
        """Prepare; nothing is started or asked yet. `hf_config`: the policy's transformers config; the servers must
        serve the same model."""
        self.weight_version = -1
        self._dialect, self._loop, self._fleet, self._channel = dialect, loop, fleet, channel
        self._hf_config, self._place = hf_config, fleet.place
        self._proof = WeightProof(dialect.parameter_of, exact=dialect.checksums_are_digests)
        self._config = fleet.config.rollout.server
        self._turns = Turns(fleet.config, fleet.place, dialect.name)
        self.cost = Cost()
        self._streams = weakref.WeakSet[ServerStream]()
        self._trouble = "it has no weights yet; call update_weights"
        self._serial = itertools.count()
        self._name = uuid.uuid4().hex[:12]  # servers refuse a request id twice, and several trainers may share one
        self._asleep = False
        self._closed = False

    # ------------------------------------------------------------------------------------------------- generation

    @override
    def open(self, then: Then) -> ServerStream:
        """Return a stream; `then` is called on a thread of its own."""
        stream = ServerStream(self, self._loop, then)
        self._streams.add(stream)
        return stream

    def check(self) -> None:
        """Raises: EngineError when it cannot generate."""
        if self._trouble:
            raise EngineError(f"the {self._dialect.name} engine cannot generate: {self._trouble}")

    def take_cost(self) -> Cost:
        """Return what the servers did since this was last asked; on the loop, where it adds up."""
        cost, self.cost = self.cost, Cost()
        cost.busy = self._turns.take_busy()
        return cost

    def backlog(self) -> tuple[int, int]:
        """Return how many requests wait for room at a server, and the number of servers."""
        return self._turns.backlog()

    async def complete(self, request: Request) -> Rollout:
        """Return the response, from whichever server; on the loop. Raises: ServersLost when none is left, EngineError.
        When this is cancelled the server ends it too."""
        loop = asyncio.get_running_loop()
        deadline = float("inf")
        done, tries = Completion([], [], "abort", ()), 0
        pause, longest = _BACKOFF_SECONDS
        while done.finish_reason == "abort":
            turn = await self._turns.acquire(request)
            target = turn.target.result()
            # from the first time it is sent: how long it waits for its turn depends on the others
            deadline = min(deadline, loop.time() + self._config.request_seconds)
            sent_under = self.weight_version
            rid = f"{self._name}-{request.prompt_id}-{request.sample_index}-{next(self._serial)}"
            try:
                seconds = max(deadline - loop.time(), 0.001)
                part = await self._or_abort(
                    self._dialect.generate(target.server, rest(request, done), rid, seconds=seconds), target.server, rid
                )
                # a request that reached the server during a pause waited, and was answered by the new weights; a pause
                # ends with "abort" what the old ones were answering
                done = joined(done, part, sent_under if part.finish_reason == "abort" else self.weight_version)
                if part.finish_reason == "abort":
                    await asyncio.sleep(_BACKOFF_SECONDS[0])  # when someone else ends requests: do not spin
            except ServerBusy as error:
                if loop.time() > deadline:
                    raise EngineError(too_late(request, self._config.request_seconds, error)) from error
                await asyncio.sleep(pause * random.uniform(0.5, 1.5))
                pause = min(2 * pause, longest)
            except (ServerLost, ServerFailed) as error:
                tries += 1
                if loop.time() > deadline or tries > _MAX_TRIES:
                    await self._quietly_abort(target.server, rid)
                    raise EngineError(too_late(request, self._config.request_seconds, error)) from error
                await self._look_after(target, error)
                await asyncio.sleep(pause * random.uniform(0.5, 1.5))
                pause = min(2 * pause, longest)
            except asyncio.CancelledError:
                self.cost.discarded_tokens += len(done.token_ids)
                raise
            finally:
                self._turns.release(turn)
        self._turns.saw(len(done.token_ids))
        self.cost.prompt_tokens += len(request.token_ids)
        self.cost.cached_tokens += done.cached_tokens
        return as_rollout(request, done, self._hf_config)

    async def _or_abort(self, call: Coroutine[Any, Any, Completion], server: Server, rid: str) -> Completion:
        """Return the server's answer; when this is cancelled, have the server end the request, and count its tokens."""
        answer = asyncio.ensure_future(call)
        try:
            return await asyncio.shield(answer)
        except asyncio.CancelledError:
            await self._quietly_abort(server, rid)
            with contextlib.suppress(EngineError, TimeoutError):
                ended = await asyncio.wait_for(answer, _ENDED_SECONDS)  # a sum would be read before the wait
                self.cost.discarded_tokens += len(ended.token_ids)
            raise

    async def _look_after(self, target: Target, error: EngineError) -> None:
        """Ask a server whose connection broke whether it lives; mark it as lost when it does not answer."""
        why = await why_lost(functools.partial(self._dialect.health, target.server))
        if why and not target.why_lost:
            self._turns.lose(target, f"{target.server.url} is lost: {error}; then {why}")
            say(target.why_lost, every_rank=True)

    async def _quietly_abort(self, server: Server, rid: str) -> None:
        with contextlib.suppress(EngineError, TimeoutError):  # it is gone, or will finish for nobody
            await asyncio.wait_for(self._dialect.abort(server, rid), HEALTH_SECONDS)

    @override
    def abort(self) -> None:
        """End the running requests of this rank."""
        for stream in list(self._streams):
            self._loop.submit(stream.cancel()).result()

    # --------------------------------------------------------------------------------------------------- weights

    @override
    def update_weights(self, stream: Iterable[tuple[str, Tensor]], weight_version: int) -> None:
        """Send the servers new weights; call it on all ranks. Requests in flight wait, then go on with the new weights.

        Raises: ServersLost, on every rank, when a server died on the way: call it again, and it is restarted first.
        """
        self._loop.call(self._turns.close)
        try:
            self._update(stream, weight_version)
        except EngineError:
            self._trouble = "its last update_weights failed; update again"
            raise
        self.weight_version, self._trouble = weight_version, ""
        self._loop.call(self._turns.open)

    def _update(self, stream: Iterable[tuple[str, Tensor]], weight_version: int) -> None:
        self._fleet.heal()
        if [target.server.url for target in self._turns.targets] != self._fleet.urls:
            self._agree(self._meet)
        servers = [target.server for target in self._turns.targets]
        digests: dict[str, int] = {}
        if self._place.rank == 0 and self._fleet.config.rollout.weight_sync.checksums:
            stream = digested(stream, digests)
        try:
            self._agree(lambda: self._prepare(servers))
            self._agree(lambda: self._channel.send(stream, weight_version))
            self._agree(lambda: self._finish(servers, weight_version, digests))
        except EngineError as error:
            self._settle(servers)
            if not isinstance(error, ServersLost) and (losses := self._losses(servers)):
                raise ServersLost(f"{error}\n{losses}") from error  # it could still say that it is dying
            raise
        finally:
            device.collect_shared(give_back=True)  # all ranks have left `send`, and the servers have read

    def _meet(self) -> None:
        servers = [Server(url, self._loop.session) for url in self._fleet.urls]
        capacities: dict[Server, int] = {}

        async def ask(server: Server) -> None:
            capacities[server] = await self._dialect.capacity(server)

        self._loop.submit(self._on_each(servers, ask)).result()
        self._loop.call(lambda: self._turns.meet({server: capacities[server] for server in servers}))

    def _agree(self, action: Any) -> None:
        """Run `action` on every rank, and fail on all ranks when it fails on one."""
        problem: tuple[bool, str] | None = None
        try:
            action()
        except EngineError as error:
            problem = (isinstance(error, ServerLost), str(error))
        problems = [problem for problem in self._place.gather(problem) if problem is not None]
        if problems:
            is_lost = any(lost for lost, _ in problems)
            raise (ServersLost if is_lost else EngineError)("\n".join(dict.fromkeys(text for _, text in problems)))

    def _prepare(self, servers: list[Server]) -> None:
        """Open the update on every server and the channel to them, on rank 0."""
        if self._place.rank == 0:
            self._loop.submit(self._on_each(servers, self._open_update)).result()
            self._channel.open(servers)

    def _finish(self, servers: list[Server], weight_version: int, digests: dict[str, int]) -> None:
        held: dict[str, Checksums] = {}

        async def finish(server: Server) -> None:
            if self._fleet.config.rollout.weight_sync.mode != "disk":
                await self._dialect.end_update(server, weight_version)
            if digests:
                held[server.url] = await self._dialect.checksums(server)
            await self._dialect.flush(server)
            await self._dialect.resume(server)
            served = await self._dialect.weight_version(server)
            if served != weight_version:
                raise EngineError(f"{server.url} says that it serves weight version {served}, sent {weight_version}")

        if self._place.rank == 0:
            self._loop.submit(self._on_each(servers, finish)).result()
            self._proof.check(digests, held)

    def _losses(self, servers: list[Server]) -> str:
        """Return, on every rank, which servers are lost and why; empty: every one answers."""
        losses: list[str] = []

        async def look(server: Server) -> None:
            if why := await why_lost(functools.partial(self._dialect.health, server)):
                losses.append(f"{server.url} is lost: {why}")

        if self._place.rank == 0:
            self._loop.submit(self._on_each(servers, look)).result()
        return "\n".join(self._place.gather(losses)[0])

    def _settle(self, servers: list[Server]) -> None:
        """Close, after a failure, the update that living servers have open, so that another can begin."""

        async def settle(server: Server) -> None:
            for action in (self._dialect.end_update(server, -1), self._dialect.resume(server)):
                with contextlib.suppress(EngineError, TimeoutError):  # it is dead, or had none open
                    await asyncio.wait_for(action, HEALTH_SECONDS)

        if self._place.rank == 0:
            self._loop.submit(self._on_each(servers, settle)).result()

    async def _open_update(self, server: Server) -> None:
        theirs = type(self._hf_config).from_dict(await self._dialect.hf_config(server))
        check_same_model(self._hf_config, theirs, server.url)
        await self._dialect.pause(server)
        await self._dialect.flush(server)
        if self._fleet.config.rollout.weight_sync.mode != "disk":
            await self._dialect.begin_update(server)

    async def _on_each(self, servers: list[Server], action: Any) -> None:
        await asyncio.gather(*(action(server) for server in servers))

    # ------------------------------------------------------------------------------------------------------ life

    @override
    def sleep(self) -> None:
        """Have rank 0 put the servers to sleep."""
        if not self._asleep:
            self._asleep, self._trouble = True, "it sleeps; call wake and update_weights"
            self._agree(lambda: self._tell(self._dialect.sleep))

    @override
    def wake(self) -> None:
        """Have rank 0 wake the servers; their weights must be sent again."""
        if self._asleep:
            self._asleep = False
            self._agree(lambda: self._tell(self._dialect.wake))

    def _tell(self, action: Any) -> None:
        if self._place.rank == 0:
            servers = [target.server for target in self._turns.targets]
            self._loop.submit(self._on_each(servers, action)).result()

    @override
    def health(self) -> None:
        self.check()
        self._tell(self._dialect.health)

    @override
    def close(self) -> None:
        """Stop the servers that this rank started; a second call does nothing."""
        if self._closed:
            return
        self._closed, self._trouble = True, "it was closed"
        self.abort()
        self._channel.close()
        self._fleet.close()
        self._loop.close()
