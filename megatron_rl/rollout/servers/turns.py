"""Whose turn it is: which request of this rank goes to which server, and when."""

from __future__ import annotations

import asyncio
import dataclasses
import heapq
import itertools
import time
from collections.abc import Mapping, Sequence

from megatron_rl.config import Config
from megatron_rl.rollout.engine import Place, Request, ServersLost
from megatron_rl.rollout.servers.http import Server

_MEMORY = 0.05  # share of one response in the mean length


@dataclasses.dataclass(slots=True, eq=False)
class Target:
    """A server as this rank sees it."""

    server: Server
    limit: int  # requests that this rank keeps there
    room: float  # tokens of its cache that this rank may fill, and one request more
    in_flight: int = 0
    tokens: float = 0.0  # that the requests in flight hold, or are expected to
    why_lost: str = ""  # empty: it is not
    since: float = 0.0  # when it got the first of those in flight, time.time()
    busy: list[tuple[float, float]] = dataclasses.field(default_factory=list)  # stretches of time, since last asked
    waiting: list[Turn] = dataclasses.field(default_factory=list)  # for this server, as a heap

    @property
    def is_open(self) -> bool:
        """Tell whether it may get another request."""
        return not self.in_flight or (self.in_flight < self.limit and self.tokens < self.room)


@dataclasses.dataclass(slots=True, order=True)
class Turn:
    """A request that waits for a server: what cannot wait, then the longest, then the earliest."""

    can_wait: bool
    minus_expected: int
    serial: int
    prompt_id: int = dataclasses.field(compare=False)
    tokens: float = dataclasses.field(compare=False)
    target: asyncio.Future[Target] = dataclasses.field(compare=False)


class Turns:
    """The servers as this rank sees them, and the requests that wait for room there. All of it on the event loop."""

    def __init__(self, config: Config, place: Place, name: str) -> None:
        """Begin closed and without servers. `name`: of their kind, for messages."""
        rollout = config.rollout
        # requests that this rank keeps at one server: its share of the server's, and a group at least
        most = rollout.server.max_concurrency
        self._limit = max(min(rollout.samples_per_prompt, most), most // place.world_size)
        self.targets: list[Target] = []
        self._rank, self._world_size, self._name = place.rank, place.world_size, name
        self._waiting: list[Turn] = []  # for any server, as a heap
        self._homes: dict[int, Target] = {}  # by prompt: the server that has its prefix
        self._mean_tokens = rollout.max_response_tokens / 2  # of a response, as far as was seen
        self._is_open = False
        self._serial = itertools.count()

    def meet(self, capacities: Mapping[Server, int]) -> None:
        """Take these servers for the ones before. `capacities`: tokens that the cache of each holds."""
        before, share = self.targets, 1 / self._world_size
        self.targets = [Target(server, self._limit, tokens * share) for server, tokens in capacities.items()]
        self._leave(before)

    def close(self) -> None:
        """Let nobody go until `open`."""
        self._is_open = False

    def open(self) -> None:
        """Let requests go, to servers that are all alive and whose caches are empty."""
        for target in self.targets:
            target.why_lost = ""
        self._homes.clear()
        self._is_open = True
        self._hand_out()

    def lose(self, target: Target, why: str) -> None:
        """Send nothing more to a server until `open`. `why`: for messages."""
        target.why_lost = why
        self._leave([target])

    def saw(self, tokens: int) -> None:
        """Take the length of a response into the mean."""
        self._mean_tokens += _MEMORY * (tokens - self._mean_tokens)

    def backlog(self) -> tuple[int, int]:
        """Return how many requests wait for room, and the number of servers."""
        return len(self._waiting) + sum(len(target.waiting) for target in self.targets), len(self.targets)

    def take_busy(self) -> dict[str, list[tuple[float, float]]]:
        """Return, by the server's address, when it had requests of this rank since this was last asked."""
        busy, now = {}, time.time()
        for target in self.targets:
            busy[target.server.url] = target.busy + ([(target.since, now)] if target.in_flight else [])
            target.busy, target.since = [], now
        return busy

    async def acquire(self, request: Request) -> Turn:
        """Wait for the end of an update and for room at a server; return the turn, whose `target` is that server.

        It is the one that has the prompt's other samples, for its prefix cache has the prompt; of a new prompt the one
        with the fewest tokens of this rank.
        """
        turn = Turn(
            not request.at_once,
            -request.expected_tokens,
            next(self._serial),
            request.prompt_id,
            len(request.token_ids) + (request.expected_tokens or self._mean_tokens),
            asyncio.get_running_loop().create_future(),
        )
        heapq.heappush(self._waiting, turn)
        self._hand_out()
        try:
            await turn.target
        except asyncio.CancelledError:
            if not turn.target.cancelled():
                self.release(turn)
            raise
        return turn

    def release(self, turn: Turn) -> None:
        """Say that the request has left the server."""
        target = turn.target.result()
        target.in_flight -= 1
        target.tokens -= turn.tokens
        if not target.in_flight:
            target.busy.append((target.since, time.time()))
        self._hand_out()

    def _hand_out(self) -> None:
        """Give servers that have room to those that wait."""
        alive = [target for target in self.targets if not target.why_lost]
        if not alive:
            reasons = "\n".join(target.why_lost for target in self.targets)
            for turn in self._waiting:
                if not turn.target.done():
                    turn.target.set_exception(ServersLost(f"no {self._name} server is left:\n{reasons}"))
            self._waiting.clear()
        if not self._is_open:
            return
        for target in alive:
            while target.is_open and target.waiting:
                self._grant(heapq.heappop(target.waiting), target)
        while self._waiting:
            with_room = [target for target in alive if target.is_open or not self._waiting[0].can_wait]
            if not with_room:
                break
            turn = heapq.heappop(self._waiting)
            # ranks begin at different servers
            first = self._rank % len(with_room)
            lightest = min(with_room[first:] + with_room[:first], key=lambda target: target.tokens)
            home = self._homes.setdefault(turn.prompt_id, lightest)
            if home.is_open or not turn.can_wait:
                self._grant(turn, home)
            else:
                heapq.heappush(home.waiting, turn)

    def _grant(self, turn: Turn, target: Target) -> None:
        if not turn.target.done():  # else its request was cancelled
            target.since = target.since if target.in_flight else time.time()
            target.in_flight += 1
            target.tokens += turn.tokens
            turn.target.set_result(target)

    def _leave(self, targets: Sequence[Target]) -> None:
        for target in targets:  # who waits for them may go elsewhere
            self._waiting += target.waiting
            target.waiting = []
        heapq.heapify(self._waiting)
        self._homes = {prompt: home for prompt, home in self._homes.items() if home not in targets}
        self._hand_out()
