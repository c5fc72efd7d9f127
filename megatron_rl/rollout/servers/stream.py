"""One rank's responses under way on the servers."""

import asyncio
import contextlib
import queue
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from typing_extensions import override

from megatron_rl.rollout.engine import Cost, EngineAborted, Request, ServersLost, Stream, Taken, Then
from megatron_rl.rollout.servers.http import Loop
from megatron_rl.types import Rollout


class Answering(Protocol):
    """What a stream asks: the engine."""

    cost: Cost  # since it was last taken

    def check(self) -> None:
        """Raises: EngineError when it cannot generate."""

    async def complete(self, request: Request) -> Rollout:
        """Return the response; on the event loop. Raises: ServersLost, EngineError."""

    def take_cost(self) -> Cost:
        """Return what the servers did since this was last asked; on the event loop."""

    def backlog(self) -> tuple[int, int]:
        """Return how many requests wait for room at a server, and the number of servers."""


class ServerStream(Stream):
    """Responses under way on the servers. One thread adds and takes."""

    in_rounds = False

    def __init__(self, engine: Answering, loop: Loop, then: Then) -> None:
        """Ask for nothing yet."""
        self._engine, self._loop, self._then = engine, loop, then
        self._tasks: set[asyncio.Task[None]] = set()
        self._results: queue.SimpleQueue[tuple[Request, int, Any]] = queue.SimpleQueue()  # with a response's tokens
        self._under_way = 0
        self._thread = ThreadPoolExecutor(1, "responses")  # a slow verifier must not hold the others' connections

    @override
    def add(self, requests: Sequence[Request]) -> None:
        self._engine.check()
        self._under_way += len(requests)
        self._loop.submit(self._start(requests)).result()

    async def _start(self, requests: Sequence[Request]) -> None:
        for request in requests:
            task = asyncio.get_running_loop().create_task(self._answer(request))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, request: Request) -> None:
        tokens = 0
        try:
            rollout = await self._engine.complete(request)
            tokens, loop = rollout.response_length, asyncio.get_running_loop()
            outcome = await loop.run_in_executor(self._thread, self._then, request, rollout)
        except asyncio.CancelledError:
            outcome = EngineAborted("generate: aborted")
        except Exception as error:
            outcome = error
        self._results.put((request, tokens, outcome))

    @override
    def take(self, seconds: float) -> Taken:
        taken, until = Taken(), time.monotonic() + seconds
        while self._under_way:
            try:
                request, _, outcome = self._results.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            self._under_way -= 1
            if isinstance(outcome, ServersLost):
                taken.lost.append(request)
                taken.why_lost = str(outcome)
            elif isinstance(outcome, Exception):
                self.drop()
                raise outcome
            else:
                taken.finished.append(outcome)
        return taken

    @override
    def is_idle(self) -> bool:
        return not self._under_way

    @override
    def backlog(self) -> tuple[int, int]:
        return self._engine.backlog()

    @override
    def drop(self) -> None:
        self._loop.submit(self.cancel()).result()
        with contextlib.suppress(queue.Empty):
            while True:
                self._engine.cost.discarded_tokens += self._results.get_nowait()[1]
        self._under_way = 0

    @override
    def cost(self) -> Cost:
        return self._loop.call(self._engine.take_cost)

    async def cancel(self) -> None:
        """End all that is under way: who takes it next hears of it, by EngineAborted."""
        for task in (tasks := list(self._tasks)):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
