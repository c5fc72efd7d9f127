"""JSON over HTTP to one engine server: the client that every dialect speaks through."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any

import aiohttp

from megatron_rl.rollout.clocks import LOST_SECONDS
from megatron_rl.rollout.engine import EngineError

_RETRY_SECONDS = 1.0  # from a broken connection to the next look
# of the environment: the key that servers ask for, as --api-key told them; rank 0's counts for all
KEY_VARIABLE = "MEGATRON_RL_ENGINE_KEY"


class ServerRefused(EngineError):
    """The server answered with an error: the request was understood and not carried out."""

    def __init__(self, message: str, status: int) -> None:
        """Keep the message and the HTTP answer's `status`."""
        super().__init__(message)
        self.status = status


class ServerBusy(ServerRefused):
    """The server's queue is full (429, 503): the same request may succeed later."""


class ServerFailed(ServerRefused):
    """The server broke while it worked on the request (500 and above): perhaps it is dying."""


class ServerLost(EngineError):
    """No answer: the connection failed, broke or timed out."""


class ServerGone(ServerLost):
    """Nothing listens at the server's address."""


def open_session(key: str = "") -> aiohttp.ClientSession:
    """Return a session whose requests bring `key`, if there is one; call it on the event loop.

    Each request has a connection of its own: servers close idle ones after a few seconds, and a request that is sent at
    that moment would fail as if its server had died. A connection costs 0.1 ms.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else None
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True), headers=headers)


async def why_lost(look: Callable[[float], Awaitable[None]]) -> str:
    """Return why a server counts as lost, empty when it answers. `look`: asks it once, for that many seconds.

    It is lost when nothing listens at its address, when it answers that it cannot work, and when it says nothing for
    LOST_SECONDS: a healthy server on a busy machine may be slow, and one connection may break.
    """
    clock = asyncio.get_running_loop().time
    began, looks = clock(), 0
    while True:
        looks += 1
        try:
            await look(max(began + LOST_SECONDS - clock(), 0.001))
            return ""
        except EngineError as error:
            waited = clock() - began
            if not isinstance(error, ServerLost) or isinstance(error, ServerGone) or waited >= LOST_SECONDS:
                return f"its health check failed {looks} times in {waited:.1f} s, last with {error}"
        await asyncio.sleep(_RETRY_SECONDS)


class Loop:
    """An event loop in a thread, and the HTTP session that lives on it."""

    def __init__(self, key: str = "") -> None:
        """Start the thread. `key`: goes along with every request; empty: none."""
        self.key = key
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine-servers", daemon=True)
        self._thread.start()
        self.session: aiohttp.ClientSession = self.submit(self._open()).result()

    async def _open(self) -> aiohttp.ClientSession:
        return open_session(self.key)

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Run the coroutine on the loop; return a future of its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def call(self, action: Callable[[], Any]) -> Any:
        """Return what `action` returns on the loop's thread."""

        async def act() -> Any:
            return action()

        return self.submit(act()).result()

    def close(self) -> None:
        """End the session and the thread."""
        self.submit(self.session.close()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


class Server:
    """One server's address. All methods run on the event loop that owns `session`."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        """Keep the address. `url`: as in http://10.0.0.7:30000, without a path."""
        self.url = url.rstrip("/")
        self._session = session

    async def post(self, path: str, body: dict[str, Any] | None = None, *, seconds: float, **params: str) -> Any:
        """Post a JSON body and return the decoded answer (text when it is not JSON). `params` go into the query.

        Raises: ServerRefused, ServerBusy; ServerLost after `seconds` without an answer, or when the connection breaks;
        ServerGone.
        """
        return await self._request("POST", path, seconds, json=body, params=params)

    async def get(self, path: str, *, seconds: float, **params: str) -> Any:
        """Get the decoded answer, as `post` does, without sending a body."""
        return await self._request("GET", path, seconds, params=params)

    async def _request(self, method: str, path: str, seconds: float, **options: Any) -> Any:
        timeout, began = aiohttp.ClientTimeout(total=seconds), asyncio.get_running_loop().time()
        try:
            async with self._session.request(method, self.url + path, timeout=timeout, **options) as response:
                text = await response.text()
                if response.status >= 400:
                    kind = ServerFailed if response.status >= 500 else ServerRefused
                    kind = ServerBusy if response.status in (429, 503) else kind
                    hint = f"; set {KEY_VARIABLE} to the server's key" if response.status in (401, 403) else ""
                    raise kind(f"{self.url}{path}: HTTP {response.status}: {text[:500]}{hint}", response.status)
                is_json = "json" in response.headers.get("content-type", "")
                return await response.json() if is_json else text
        except (TimeoutError, aiohttp.ClientError, ConnectionError) as error:
            waited = asyncio.get_running_loop().time() - began
            refused = isinstance(getattr(error, "os_error", None), ConnectionRefusedError)
            what = f"after {waited:.1f} of {seconds:.0f} s: {type(error).__name__} {error}".rstrip()
            raise (ServerGone if refused else ServerLost)(f"{method} {self.url}{path}: no answer {what}") from error
