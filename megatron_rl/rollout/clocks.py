"""How long a rank may wait: every bound that the run sets for its servers, and what follows for ranks that wait for it.

Ranks wait for each other on gloo groups (`Reducer.gather_objects`, `any`, `barrier`). Such a wait ends when the slowest
rank is done, so its timeout is longer than all that a rank may do alone between two of them.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from megatron_rl.config import Config
from megatron_rl.config.benchmarks import PRESETS
from megatron_rl.config.evaluation import SetOptions, set_path
from megatron_rl.data.records import read_records

HEALTH_SECONDS = 10.0  # of a server that says whether it lives
CONTROL_SECONDS = 60.0  # of a server that does what should be done at once
LOAD_SECONDS = 600.0  # of a server that moves weights
GROUP_SECONDS = 300.0  # for the servers' workers to join the trainer's group, and for one broadcast
STOP_SECONDS = 20.0  # from a server's SIGTERM to its SIGKILL


def waiting_seconds(config: Config) -> float:
    """Return the timeout of the groups on which ranks wait: the longest wait for servers, then what a rank may do
    alone (parallel.timeout_seconds)."""
    return config.parallel.timeout_seconds + max(server_waits(config).values(), default=0.0)


def server_waits(config: Config) -> dict[str, float]:
    """Return what a rank may wait for its servers between two meetings with the other ranks: work -> most seconds."""
    rollout, server = config.rollout, config.rollout.server
    if rollout.is_embedded:
        return {}
    responses = {"rollouts": config.train.prompts_per_step * rollout.samples_per_prompt}
    if config.train.eval_every:
        responses["held-out evaluation"] = _held_out(config) * config.train.eval_samples
    for name in config.eval.sets:
        responses[f"evaluation of {name}"] = _problems(set_path(config.eval, name)) * _samples(config, name)
    turns = {work: math.ceil(count / _at_once(config)) for work, count in responses.items()}
    return {
        # restart of the dead, then one look a second; each is told once how to settle
        "start of servers": server.start_seconds + server.count * (HEALTH_SECONDS + STOP_SECONDS + CONTROL_SECONDS),
        # begin: config, pause, flush, begin_update, workers join; end: end_update in two calls, flush, resume, version
        "weight update": 2 * LOAD_SECONDS + max(GROUP_SECONDS, 5 * CONTROL_SECONDS),
        **{work: n * (server.request_seconds + 3 * HEALTH_SECONDS) for work, n in turns.items()},
    }


def _at_once(config: Config) -> int:
    """Return how many responses are computed together when as many servers are dead as may die in a run."""
    server, ranks = config.rollout.server, config.parallel.processes
    nodes = max(1, ranks // int(os.environ.get("LOCAL_WORLD_SIZE", ranks)))
    alive = max(1, (len(server.urls) or server.count * nodes) - server.max_failures)
    return alive * max(1, server.max_concurrency // ranks) * ranks


def _held_out(config: Config) -> int:
    if config.data.type == "countdown":
        return config.data.num_eval
    return _problems(Path(config.data.eval_path)) if config.data.eval_path else 0


def _problems(path: Path | str) -> int:
    """Return the problems of a file; 0 where there is none, which those who load it say."""
    return sum(1 for _ in read_records(path)) if isinstance(path, Path) and path.is_file() else 0


def _samples(config: Config, name: str) -> int:
    preset, options = PRESETS.get(name), config.eval.options.get(name, SetOptions())
    return options.samples or (preset.samples if preset else 1)
