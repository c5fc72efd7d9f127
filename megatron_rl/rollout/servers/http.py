"""JSON over HTTP to one engine server: the client that every dialect speaks through."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp

from megatron_rl.rollout.engine import EngineError

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


class Server:
    """One server's address. All methods run on the event loop that owns `session`."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        """Keep the address. `url`: as in http://10.0.0.7:30000, without a path."""
        self.url = url.rstrip("/")
        self._session = session

    async def post(self, path: str, body: dict[str, Any] | None = None, *, seconds: float, **params: str) -> Any:
        """Post a JSON body and return the decoded answer (text when it is not JSON). `params` go into the query.

        Raises: ServerRefused, ServerBusy; ServerLost after `seconds` without an answer, or without a connection.
        """
        return await self._request("POST", path, seconds, json=body, params=params)

    async def get(self, path: str, *, seconds: float, **params: str) -> Any:
        """Get the decoded answer, as `post` does, without sending a body."""
        return await self._request("GET", path, seconds, params=params)

    async def _request(self, method: str, path: str, seconds: float, **options: Any) -> Any:
        timeout = aiohttp.ClientTimeout(total=seconds)
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
            what = f"no answer within {seconds:g} s" if isinstance(error, asyncio.TimeoutError) else str(error)
            raise ServerLost(f"{self.url}{path}: {what or type(error).__name__}") from error
