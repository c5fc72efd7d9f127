"""How long a rank may wait: every bound that the run sets for its servers, and what follows for ranks that wait for it.

Ranks wait for each other on gloo groups (`Reducer.gather_objects`, `any`, `barrier`). Such a wait ends when the slowest
rank is done, so its timeout is longer than all that a rank may do alone between two of them.
"""

import math
import os
from pathlib import Path

from megatron_rl.config import Config
from megatron_rl.config.benchmarks import PRESETS
from megatron_rl.config.evaluation import set_path
from megatron_rl.data.records import read_records
from megatron_rl.errors import DataError

HEALTH_SECONDS = 10.0  # of a server that is asked once whether it lives
LOST_SECONDS = 120.0  # of a server that does not answer, until it counts as lost
CONTROL_SECONDS = 60.0  # of a server that does what should be done at once
LOAD_SECONDS = 600.0  # of a server that moves weights
GROUP_SECONDS = 300.0  # for the servers' workers to join the trainer's group, and for one broadcast
STOP_SECONDS = 20.0  # from a server's SIGTERM to its SIGKILL


def waiting_seconds(config: Config) -> float:
    """Return the timeout of the groups on which ranks wait: the longest wait for servers, then what a rank may do
    alone (parallel.timeout_seconds)."""
    return config.parallel.timeout_seconds + max(server_waits(config).values(), default=0.0)


def server_waits(config: Config) -> dict[str, float]:
    """Return what a rank may wait for its servers between two meetings with the other ranks: work -> most seconds.

    For rollouts and held-out problems ranks meet all the time (rollout/collect.py): however long they take, none waits.
    """
    rollout, server = config.rollout, config.rollout.server
    if rollout.is_embedded:
        return {}
    ranks = config.parallel.processes
    nodes = max(1, ranks // int(os.environ.get("LOCAL_WORLD_SIZE", ranks)))
    # as many servers may be dead as may die in a run
    alive = max(1, (len(server.urls) or server.count * nodes) - server.max_failures)
    at_once = alive * max(1, server.max_concurrency // ranks) * ranks
    turns = {work: math.ceil(count / at_once) for work, count in _evaluated(config).items()}
    return {
        # restart of the dead, then one look a second; each is told once how to settle
        "start of servers": server.start_seconds + server.count * (LOST_SECONDS + STOP_SECONDS + CONTROL_SECONDS),
        # begin: config, pause, flush, begin_update, workers join; end: end_update in two calls, checksums, flush,
        # resume, version; after a failure: end_update, resume, a last look
        "weight update": 3 * LOAD_SECONDS + max(GROUP_SECONDS, 5 * CONTROL_SECONDS) + 2 * HEALTH_SECONDS + LOST_SECONDS,
        **{work: n * (server.request_seconds + LOST_SECONDS + HEALTH_SECONDS) for work, n in turns.items()},
    }


def _evaluated(config: Config) -> dict[str, int]:
    """Return the responses of each benchmark; none of a file that cannot be read, which those who load it say."""
    counts = {}
    for name in config.eval.sets:
        path, options, preset = set_path(config.eval, name), config.eval.options.get(name), PRESETS.get(name)
        samples = (options and options.samples) or (preset.samples if preset else 1)
        if isinstance(path, Path) and path.is_file():
            counts[f"evaluation, {name}"] = samples * _records(path)
    return counts


def _records(path: Path) -> int:
    try:
        return sum(1 for _ in read_records(path))
    except DataError:
        return 0
