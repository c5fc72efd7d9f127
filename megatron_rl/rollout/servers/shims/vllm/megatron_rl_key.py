"""Runs inside vLLM's HTTP server, as its `--middleware`: lets nobody in without the run's key, on any route."""

import hmac
import os
from typing import Any

_EXPECTED = f"Bearer {os.environ['MEGATRON_RL_ENGINE_KEY']}".encode()


class KeyRequired:
    """An ASGI application around another, which requests without the key do not reach."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        if scope["type"] == "lifespan" or hmac.compare_digest(given, _EXPECTED):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b"Unauthorized"})
