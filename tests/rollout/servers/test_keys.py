"""The key of a run's servers: who makes it, who asks for it, and that nobody gets in without it."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from megatron_rl.config import parse_config
from megatron_rl.rollout.build import DIALECTS, engine_key, start_fleet
from megatron_rl.rollout.engine import EngineError, Place
from megatron_rl.rollout.servers.http import KEY_VARIABLE, Loop, Server, ServerRefused
from tests.rollout.servers.servers_case import lone_place
from tests.tiny import tiny_raw
from tests.worlds import ROOT


def test_the_key_is_new_or_the_environments_and_that_of_rank_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = parse_config(tiny_raw(tmp_path, rollout={"engine": "sglang"}))
    given = parse_config(tiny_raw(tmp_path, rollout={"engine": "sglang", "server": {"urls": ["http://127.0.0.1:1"]}}))
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    first, second = engine_key(own, lone_place()), engine_key(own, lone_place())
    assert len(first) == 32 and first != second and engine_key(given, lone_place()) == ""
    assert engine_key(own, Place(1, 2, 1, lambda value: ["of rank 0", value])) == "of rank 0"
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    assert engine_key(own, lone_place()) == engine_key(given, lone_place()) == "secret"


def test_servers_that_one_node_cannot_start_are_an_error_on_every_rank(tmp_path: Path) -> None:
    config = parse_config(tiny_raw(tmp_path, rollout={"engine": "sglang"}))
    place, loop = Place(1, 2, 1, lambda value: ["no interpreter", value]), Loop()
    with pytest.raises(EngineError, match="no interpreter"):
        start_fleet(config, tmp_path, place, DIALECTS["sglang"](), loop)
    assert loop.session.closed


def test_every_request_brings_the_key_and_a_refusal_names_the_variable() -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=200 if request.headers.get("Authorization") == "Bearer k" else 401, text="said")

    async def start() -> TestServer:
        app = web.Application()
        app.router.add_route("*", "/x", answer)
        server = TestServer(app)
        await server.start_server()
        return server

    loop, stranger = Loop("k"), Loop()
    try:
        server = loop.submit(start()).result()
        url = str(server.make_url("")).rstrip("/")
        assert loop.submit(Server(url, loop.session).get("/x", seconds=5)).result() == "said"
        assert loop.submit(Server(url, loop.session).post("/x", {}, seconds=5)).result() == "said"
        with pytest.raises(ServerRefused, match=f"HTTP 401: said; set {KEY_VARIABLE}"):
            stranger.submit(Server(url, stranger.session).get("/x", seconds=5)).result()
        loop.submit(server.close()).result()
    finally:
        loop.close()
        stranger.close()


def test_vllm_lets_nobody_in_without_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "k")
    path = ROOT / "megatron_rl/rollout/servers/shims/vllm/megatron_rl_key.py"
    spec = importlib.util.spec_from_file_location("megatron_rl_key", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    reached: list[str] = []

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        reached.append(scope["type"])

    async def status(kind: str, *headers: tuple[bytes, bytes]) -> int | None:
        said: list[dict[str, Any]] = []

        async def send(message: dict[str, Any]) -> None:
            said.append(message)

        await module.KeyRequired(app)({"type": kind, "path": "/collective_rpc", "headers": headers}, None, send)
        return said[0]["status"] if said else None

    assert asyncio.run(status("http")) == asyncio.run(status("http", (b"authorization", b"Bearer x"))) == 401
    assert asyncio.run(status("websocket")) is None and reached == []
    assert asyncio.run(status("http", (b"authorization", b"Bearer k"))) is None
    assert asyncio.run(status("lifespan")) is None and reached == ["http", "lifespan"]
