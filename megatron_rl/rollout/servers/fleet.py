"""The engine servers of a run: those it was given, and those it starts, watches over, restarts and stops."""

import importlib.util
import os
import socket
import sys
import time
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_rl import device
from megatron_rl.config import Config
from megatron_rl.launch import say
from megatron_rl.rollout.engine import EngineError, Place
from megatron_rl.rollout.servers.nccl import check_same_nccl
from megatron_rl.rollout.servers.processes import EngineProcess, free_port
from megatron_rl.rollout.servers.protocol import Dialect, LaunchSpec

_CPU_KV_TOKENS = 16384
_RETRY_SECONDS = 1.0  # between two looks at a server that is not ready


@dataclass(slots=True)
class _Owned:
    process: EngineProcess
    url: str
    healthy: bool = False


@dataclass(slots=True)
class Fleet:
    """Servers by address. `heal` is a collective; the rest is local."""

    dialect: Dialect
    config: Config
    model_dir: Path  # what the run's own servers start from
    place: Place
    check: Callable[[str], None]  # one look at the server of that address; raises EngineError when it is not ready
    why_lost: Callable[[str], str]  # several looks; why the server of that address counts as lost, empty: it answers
    settle_in: Callable[[str], None]  # what a server of the run wants to be told once
    key: str = ""  # that the run's own servers ask of every request
    urls: list[str] = field(default_factory=list)  # of all nodes, in the order of ranks
    readers: list[list[int]] = field(default_factory=list)  # [server][worker] -> the trainer rank on its device
    failures: int = 0  # of all servers so far
    _owned: list[_Owned] = field(default_factory=list)

    def start(self) -> None:
        """Start this node's servers without waiting for them. Raises: EngineError when one cannot be started."""
        server = self.config.rollout.server
        if server.urls or self.place.local_rank != 0 or self._owned:
            return
        if device.ON_GPU and self.config.rollout.weight_sync.mode == "disaggregated":
            check_same_nccl(engine_python(self.config.rollout.engine, server.python), device.gpu_versions()["NCCL"])
        self._owned = [self._launch(index) for index in range(server.count)]

    def heal(self) -> None:
        """Wait until every server is ready, after a restart of those that died. Call it on all ranks.

        Raises: EngineError, on every rank, when a server does not come up, or more than `rollout.server.max_failures`
        died in the run.
        """
        problem, died, began = "", 0, time.monotonic()
        try:
            died = self._restart_dead()
            for address in self._local_urls():
                self._wait(address, began)
        except EngineError as error:
            problem = str(error)
        facts = self.place.gather((socket.gethostname(), self.place.local_rank, self._local_urls(), problem, died))
        self.failures += sum(fact[4] for fact in facts)
        allowed = self.config.rollout.server.max_failures
        problems = [fact[3] for fact in facts if fact[3]]
        if self.failures > allowed:
            problems.append(f"{self.failures} servers died in this run, rollout.server.max_failures={allowed}")
        if problems:
            raise EngineError("\n".join(problems))
        self.urls = [url for fact in facts for url in fact[2]]
        self.readers = [readers for fact in facts for readers in self._readers_of(fact[0], len(fact[2]), facts)]

    def close(self) -> None:
        """Stop every server that this rank started."""
        for owned in self._owned:
            owned.process.terminate()
        for owned in self._owned:
            owned.process.stop()
        self._owned.clear()

    def _local_urls(self) -> list[str]:
        if self.config.rollout.server.urls:
            return list(self.config.rollout.server.urls) if self.place.rank == 0 else []
        return [owned.url for owned in self._owned]

    def _readers_of(self, host: str, servers: int, facts: Sequence[tuple[Any, ...]]) -> list[list[int]]:
        """Return, by server and worker, the trainer rank whose buffer it reads: the one on its own device.

        Worker w of a node's server i runs on the node's device i * tp + w, as does the trainer's local rank of that
        number. Where there are more workers than ranks (on CPUs), workers share a rank.
        """
        ranks = [rank for _, rank in sorted((fact[1], rank) for rank, fact in enumerate(facts) if fact[0] == host)]
        tp = self.config.rollout.server.tp
        return [[ranks[(index * tp + worker) % len(ranks)] for worker in range(tp)] for index in range(servers)]

    def _restart_dead(self) -> int:
        died = 0
        for index, owned in enumerate(self._owned):
            if not owned.healthy:
                continue
            why = self.why_lost(owned.url) if owned.process.alive() else ""
            if not why and owned.process.alive():
                continue
            died += 1
            why = f"{why}; {owned.process.obituary()}" if why else owned.process.obituary()
            say(f"{self.dialect.name} server {owned.url} died: {why}", every_rank=True)
            owned.process.stop()
            if self.failures + died <= self.config.rollout.server.max_failures:
                self._owned[index] = self._launch(index)
        return died

    def _wait(self, url: str, began: float) -> None:
        owned = next((owned for owned in self._owned if owned.url == url), None)
        if owned is not None and owned.healthy:
            return
        limit, said = self.config.rollout.server.start_seconds, 0.0
        while True:
            if owned is not None and not owned.process.alive():
                raise EngineError(f"the {self.dialect.name} server did not start: {owned.process.obituary()}")
            try:
                self.check(url)
                break
            except EngineError as error:
                waited = time.monotonic() - began
                if waited > limit:
                    log = "" if owned is None else f"; its log: {owned.process.log}"
                    raise EngineError(
                        f"the {self.dialect.name} server {url} was not ready within rollout.server.start_seconds="
                        f"{limit:g}: {error}{log}"
                    ) from error
                if waited - said > 10:
                    said = waited
                    say(f"waiting for the {self.dialect.name} server {url}: {waited:.0f} s", every_rank=True)
            time.sleep(_RETRY_SECONDS)
        if owned is not None:
            self.settle_in(url)
            owned.healthy = True
            seconds = time.monotonic() - began
            say(f"{self.dialect.name} server {url} is ready after {seconds:.0f} s", every_rank=True)

    def _launch(self, index: int) -> _Owned:
        config, server = self.config, self.config.rollout.server
        spans_nodes = self.place.world_size > int(os.environ.get("LOCAL_WORLD_SIZE", self.place.world_size))
        first = 0 if config.rollout.weight_sync.mode == "colocated" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        first += self.place.devices_taken
        devices = range(first + index * server.tp, first + (index + 1) * server.tp) if device.ON_GPU else ()
        port = free_port()
        spec = LaunchSpec(
            python=engine_python(config.rollout.engine, server.python),
            model_dir=self.model_dir.resolve(),
            port=port,
            tp=server.tp,
            dtype=config.model.dtype,
            devices=tuple(devices),
            context_tokens=config.max_sequence_tokens,
            max_concurrency=server.max_concurrency,
            kv_tokens=server.kv_tokens or (None if device.ON_GPU else max(_CPU_KV_TOKENS, config.max_sequence_tokens)),
            memory_fraction=server.memory_fraction,
            colocated=server.share_memory,
            extra_args=server.extra_args,
            float32_logits=config.float32_logits,
            with_routes=config.rollout.routing_replay,
            deterministic=server.deterministic,
            key=self.key,
            host="0.0.0.0" if spans_nodes else "127.0.0.1",
        )
        argv, env = self.dialect.command(spec)
        name = f"{config.rollout.engine}-{socket.gethostname() if spans_nodes else 'local'}-{index}"
        process = EngineProcess(argv, env, config.run_dir / "logs" / f"{name}.log")
        return _Owned(process, f"http://{socket.gethostname() if spans_nodes else '127.0.0.1'}:{port}")


def engine_python(engine: str, configured: str | None) -> Path:
    """Return the interpreter to start `engine` with. Raises: EngineError with the command that installs it."""
    local = Path(".engines") / engine / "bin" / "python"
    if configured is not None:
        path = Path(configured)
    elif importlib.util.find_spec(engine) is not None:
        path = Path(sys.executable)
    else:
        path = local
    if not path.is_file():
        raise EngineError(
            f"rollout.engine={engine} is not installed: no {path}. In the project's folder type `make engines` for a "
            f"CPU or `make gpu-engine-{engine}` for GPUs (docs/install_gpu.md), or set rollout.server.python or .urls"
        )
    return path.absolute()


def address_for(url: str) -> str:
    """Return this machine's address as the server at `url` can reach it."""
    parts = urllib.parse.urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname or "", parts.port or 80))  # sends nothing: it asks for the route
        return probe.getsockname()[0]
