"""Puts the engine over servers together: dialect, servers, way of the weights."""

import functools
import json
import os
import secrets
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import torch

from megatron_rl.config import Config
from megatron_rl.convert.disk import remove
from megatron_rl.convert.model_files import Described, policy_files, write_files
from megatron_rl.convert.weights import expected_weights
from megatron_rl.device import float32_activations
from megatron_rl.errors import UserError
from megatron_rl.rollout.engine import EngineError, EngineSetup, Place, RolloutEngine
from megatron_rl.rollout.servers import weight_sync
from megatron_rl.rollout.servers.engine import ServerEngine
from megatron_rl.rollout.servers.fleet import Fleet, address_for
from megatron_rl.rollout.servers.http import KEY_VARIABLE, Loop, Server, why_lost
from megatron_rl.rollout.servers.processes import free_port
from megatron_rl.rollout.servers.protocol import Dialect
from megatron_rl.rollout.servers.sglang import SGLang
from megatron_rl.rollout.servers.vllm import VLLM

DIALECTS: dict[str, Callable[[], Dialect]] = {"sglang": SGLang, "vllm": VLLM}


def write_model_dir(folder: Path, policy: Described, tokenizer: Any) -> None:
    """Write what the run's own servers start from: config.json and tokenizer, without weights and without
    end-of-sequence tokens, because the requests alone say what ends a response."""
    files = policy_files(policy, tokenizer)
    files.pop("generation_config.json", None)
    raw = json.loads(files["config.json"])
    files["config.json"] = json.dumps(raw | {"eos_token_id": None}, indent=2).encode()
    remove(folder)  # of an earlier start, perhaps with another tokenizer
    write_files(folder, files)


def build_server_engine(config: Config, setup: EngineSetup) -> ServerEngine:
    """The engine, with the node's servers starting up. Raises: EngineError when they cannot be started."""
    dialect, loop = DIALECTS[config.rollout.engine](), Loop(engine_key(config, setup.place))
    dialect.seeded = config.rollout.server.deterministic
    fleet = start_fleet(config, setup.model_dir, setup.place, dialect, loop)
    return ServerEngine(dialect, loop, fleet, _channel(config, setup, dialect, loop, fleet), setup.hf)


def engine_key(config: Config, place: Place) -> str:
    """Return the key that goes to every server, the same on all ranks: the environment's, else a new one for servers of
    the run, which listen to the network where the trainer spans machines. A collective."""
    fresh = "" if config.rollout.server.urls else secrets.token_hex(16)
    key: str = place.gather(os.environ.get(KEY_VARIABLE) or fresh)[0]
    return key


def start_fleet(config: Config, model_dir: Path, place: Place, dialect: Dialect, loop: Loop) -> Fleet:
    """The node's servers, starting up. Call it on all ranks.

    Raises: EngineError, on every rank, when those of some node cannot be started; the loop is then closed.
    """

    def ask(question: Callable[[Server], Coroutine[Any, Any, Any]]) -> Callable[[str], Any]:
        return lambda url: loop.submit(question(Server(url, loop.session))).result()

    def look(server: Server) -> Coroutine[Any, Any, str]:
        return why_lost(functools.partial(dialect.health, server))

    fleet = Fleet(dialect, config, model_dir, place, ask(dialect.health), ask(look), ask(dialect.settle_in), loop.key)
    problem = ""
    try:
        fleet.start()
    except (OSError, UserError) as error:
        problem = str(error)
    if problems := [text for text in place.gather(problem) if text]:
        fleet.close()
        loop.close()
        raise EngineError("\n".join(dict.fromkeys(problems)))
    return fleet


def _channel(config: Config, setup: EngineSetup, dialect: Dialect, loop: Loop, fleet: Fleet) -> weight_sync.Channel:
    options, place = config.rollout.weight_sync, setup.place
    shapes = expected_weights(setup.hf)
    if options.mode == "disk":
        folder = Path(options.folder) if options.folder else config.run_dir / "engine_weights"
        model_dir = None if place.has_weights else setup.model_dir
        return weight_sync.Disk(dialect, folder, loop.submit, place.rank, model_dir)
    buffers = weight_sync.Buffers(shapes, options.bucket_mib * 2**20, getattr(torch, config.model.dtype).itemsize)
    sender = weight_sync.Sender(dialect, shapes, buffers, loop.submit, place.rank)
    if options.mode == "colocated":
        return weight_sync.Colocated(sender, place.gather, lambda: fleet.readers)

    def address(server: Server) -> tuple[str, int]:
        return options.host or address_for(server.url), free_port()

    return weight_sync.Disaggregated(sender, address)


def _transformers(config: Config, setup: EngineSetup) -> RolloutEngine:
    from megatron_rl.rollout.transformers import TransformersEngine

    dtype = getattr(torch, config.model.dtype)
    return TransformersEngine(
        setup.hf.to_dict(),
        dtype=dtype,
        device=setup.device,
        batch_size=config.rollout.batch_size,
        float32_logits=config.float32_logits,
        float32_activations=float32_activations(config.model.activations, dtype),
    )


ENGINES: dict[str, Callable[[Config, EngineSetup], RolloutEngine]] = {
    "transformers": _transformers,
    "sglang": build_server_engine,
    "vllm": build_server_engine,
}


def build_engine(config: Config, setup: EngineSetup) -> RolloutEngine:
    """The engine that `rollout.engine` names, still without weights; servers of its own are starting up."""
    return ENGINES[config.rollout.engine](config, setup)
