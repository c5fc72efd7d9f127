"""Puts the engine over servers together: dialect, servers, way of the weights."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_rl.config import Config
from megatron_rl.rollout.dialect import Dialect
from megatron_rl.rollout.engine import EngineError, EngineSetup
from megatron_rl.rollout.fleet import Fleet, address_for
from megatron_rl.rollout.http import Server
from megatron_rl.rollout.processes import free_port
from megatron_rl.rollout.servers import Loop, ServerEngine
from megatron_rl.rollout.sglang import SGLang
from megatron_rl.rollout.vllm import VLLM
from megatron_rl.rollout.weight_sync import Buffers, Channel, Colocated, Disaggregated, Disk, expected_weights

DIALECTS: dict[str, type[SGLang] | type[VLLM]] = {"sglang": SGLang, "vllm": VLLM}


def build_server_engine(config: Config, setup: EngineSetup) -> ServerEngine:
    """The engine, with the node's servers starting up. Raises: EngineError when they cannot be started."""
    dialect, loop = DIALECTS[config.rollout.engine](), Loop()

    def check(url: str) -> None:
        loop.submit(dialect.health(Server(url, loop.session))).result()

    fleet = Fleet(dialect, config, setup.model_dir, setup.place, check)
    try:
        fleet.start()
    except EngineError:
        loop.close()
        raise
    return ServerEngine(dialect, loop, fleet, _channel(config, setup, dialect, loop, fleet), setup.hf)


def _channel(config: Config, setup: EngineSetup, dialect: Dialect, loop: Loop, fleet: Fleet) -> Channel:
    options, place = config.rollout.weight_sync, setup.place
    shapes = expected_weights(setup.hf)
    if options.mode == "disk":
        folder = Path(options.folder) if options.folder else config.run_dir / "engine_weights"
        return Disk(dialect, folder, loop.submit, place.rank, setup.model_dir)
    buffers = Buffers(shapes, options.bucket_mib * 2**20, getattr(torch, config.model.dtype).itemsize)
    if options.mode == "colocated":
        return Colocated(dialect, shapes, buffers, loop.submit, place.gather, place.rank, lambda: fleet.readers)

    def address(server: Server) -> tuple[str, int]:
        return options.host or address_for(server.url), free_port()

    return Disaggregated(dialect, shapes, buffers, loop.submit, place.rank, address)
