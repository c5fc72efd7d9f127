"""When a server counts as lost: stand-ins that close connections, are slow, say nothing or are gone."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config import parse_config
from megatron_rl.rollout.build import start_fleet
from megatron_rl.rollout.engine import EngineError, Request, ServersLost
from megatron_rl.rollout.servers import http
from megatron_rl.rollout.servers.fleet import Fleet
from megatron_rl.rollout.servers.http import Loop, Server
from megatron_rl.rollout.servers.processes import free_port
from tests.rollout.servers.servers_case import HF, lone_place
from tests.rollout.servers.test_server_engine import engine_of, requests, whole
from tests.tiny import tiny_raw

__all__ = ["engine_of"]
PATIENCE = 4.0
# what a path's n-th request, n from 1, on a connection's k-th: seconds until the answer, or None: the connection closes
Behaviour = Callable[[str, int, int], float | None]


@contextlib.contextmanager
def stand_in(behaviour: Behaviour) -> Iterator[tuple[str, list[str]]]:
    """A server on a thread: its address, and the paths that it was asked for."""
    loop, asked, talks = Loop(), list[str](), set[Any]()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talks.add(asyncio.current_task())
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError), contextlib.closing(writer):
            for turn in range(1, 1000):
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = re.search(r"content-length: (\d+)", head, re.I)
                await reader.readexactly(int(length[1]) if length else 0)
                path = head.split()[1]
                asked.append(path)
                seconds = behaviour(path, asked.count(path), turn)
                if seconds is None:
                    return
                await asyncio.sleep(seconds)
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}")
                await writer.drain()

    async def listen() -> Any:
        return await asyncio.start_server(talk, "127.0.0.1", 0)

    async def leave() -> None:
        server.close()
        for talk in talks:
            talk.cancel()
        await asyncio.gather(*talks, return_exceptions=True)

    server = loop.submit(listen()).result()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", asked
    finally:
        loop.submit(leave()).result()
        loop.close()


@pytest.fixture
def engine_at(engine_of: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """An engine that asks the server of an address for tokens and for its health."""
    monkeypatch.setattr(http, "LOST_SECONDS", PATIENCE)
    monkeypatch.setattr(http, "_RETRY_SECONDS", 0.05)

    def build(url: str) -> Any:
        async def generate(server: Any, request: Request, rid: str, *, seconds: float) -> Any:
            await server.post("/generate", {}, seconds=seconds)
            return whole(request, 0)

        engine = engine_of({url: whole})
        engine._dialect.generate = generate
        engine._dialect.health = _Http().health
        return engine

    return build


class _Http:
    """A dialect whose server is the stand-in of `SCRIPT`."""

    name = "stand-in"

    def command(self, spec: Any) -> tuple[list[str], dict[str, str]]:
        return [str(spec.python), "-c", SCRIPT, str(spec.port), str(spec.model_dir)], {}

    async def health(self, server: Server, seconds: float = 0.5) -> None:
        await server.get("/health", seconds=seconds)

    async def settle_in(self, server: Server) -> None:
        return None


def test_a_server_that_closes_idle_connections_is_not_lost(engine_at: Any, capfd: Any) -> None:
    """As if its keep-alive timeout ended at each second request: what is sent on such a connection gets no answer."""
    with stand_in(lambda path, count, turn: 0.0 if turn == 1 else None) as (url, asked):
        engine = engine_at(url)
        assert len(engine.generate(requests(8))) == 8 and len(engine.generate(requests(8))) == 8
        assert asked == ["/generate"] * 16, "a request was sent twice, or the server was looked after"
    assert "is lost" not in capfd.readouterr().out


def test_a_slow_server_and_one_that_breaks_connections_are_not_lost(engine_at: Any) -> None:
    def behaviour(path: str, count: int, turn: int) -> float | None:
        if path == "/generate":
            return None if count == 1 else 0.0
        return None if count < 3 else 1.0

    with stand_in(behaviour) as (url, asked):
        assert len(engine_at(url).generate(requests(1))) == 1
        assert asked == ["/generate", *["/health"] * 3, "/generate"]


def test_a_silent_server_is_lost_and_the_message_says_why(engine_at: Any, capfd: Any) -> None:
    with stand_in(lambda path, count, turn: None if path == "/generate" else 60.0) as (url, _):
        began = time.monotonic()
        with pytest.raises(ServersLost, match=f"(?s)no fake server is left.*{url} is lost") as lost:
            engine_at(url).generate(requests(1))
        assert PATIENCE <= time.monotonic() - began < PATIENCE + 5
    why = f"POST {url}/generate: no answer after 0.\\d of \\d+ s: ServerDisconnectedError .*; then its "
    why += f"health check failed 1 times in 4.\\d s, last with GET {url}/health: "
    why += "no answer after 4.\\d of 4 s: TimeoutError"
    assert re.search(why, str(lost.value)) and re.search(why, capfd.readouterr().out)


def test_a_server_that_is_gone_is_lost_at_once(engine_at: Any) -> None:
    url, began = f"http://127.0.0.1:{free_port()}", time.monotonic()
    with pytest.raises(ServersLost, match="ClientConnectorError.*failed 1 times in 0.. s"):
        engine_at(url).generate(requests(1))
    assert time.monotonic() - began < PATIENCE


def test_an_update_that_fails_says_which_servers_are_lost(engine_at: Any) -> None:
    with stand_in(lambda path, count, turn: 1.0) as (url, _):
        engine = engine_at(url)

        async def refuse(server: Any) -> int:
            raise EngineError("no")

        engine._dialect.weight_version = refuse
        with pytest.raises(EngineError, match="^no$") as refused:
            engine.update_weights([], 4)
        assert not isinstance(refused.value, ServersLost)
    with pytest.raises(ServersLost, match=f"(?s)^no\n{url} is lost: its health check failed 1 times"):
        engine.update_weights([], 4)


# --- servers of the run -----------------------------------------------------------------------------------------------

# answers after as many seconds as the file `delay` says; each start adds a line to `starts`
SCRIPT = """
import http.server, os, pathlib, sys, time
folder = pathlib.Path(sys.argv[2])
with (folder / "starts").open("a") as starts:
    print(os.getpid(), file=starts)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        time.sleep(float((folder / "delay").read_text()))
        self.send_response(200)
        self.end_headers()

http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    monkeypatch.setattr(http, "LOST_SECONDS", PATIENCE)
    server = {"python": sys.executable, "max_failures": 1}
    raw = tiny_raw(tmp_path, model={"hf_config": HF}, rollout={"engine": "sglang", "server": server})
    (tmp_path / "delay").write_text("0")
    loop, dialect = Loop(), _Http()
    fleet = start_fleet(parse_config(raw), tmp_path, lone_place(), dialect, loop)  # type: ignore[arg-type]
    try:
        fleet.heal()
        yield fleet
    finally:
        fleet.close()
        loop.close()


def starts(folder: Path) -> int:
    return len((folder / "starts").read_text().split())


def test_a_slow_server_of_the_run_is_not_restarted(fleet: Fleet, tmp_path: Path) -> None:
    (tmp_path / "delay").write_text("1.0")  # a look of `heal` for servers that start ends earlier
    fleet.heal()
    assert starts(tmp_path) == 1 and fleet.failures == 0


def test_a_server_of_the_run_that_died_or_fell_silent_is_restarted(fleet: Fleet, tmp_path: Path, capfd: Any) -> None:
    url = fleet.urls[0]
    fleet._owned[0].process.stop()
    fleet.heal()
    assert starts(tmp_path) == 2 and fleet.failures == 1 and fleet.urls != [url]
    assert f"server {url} died: killed by SIGTERM" in capfd.readouterr().out
    (tmp_path / "delay").write_text("60")
    with pytest.raises(EngineError, match="2 servers died in this run, rollout.server.max_failures=1"):
        fleet.heal()
    silent = (
        r"died: its health check failed 1 times in 4.\d s, last with GET .*TimeoutError; it runs, but does not answer"
    )
    assert re.search(silent, capfd.readouterr().out)
