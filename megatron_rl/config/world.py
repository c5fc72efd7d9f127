"""The processes that a config asks for."""

from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_rl import launch
from megatron_rl.config.environment import for_libraries
from megatron_rl.config.load import dump_config
from megatron_rl.config.sections import Config
from megatron_rl.files import write_atomically


def in_world(config: Config, path: Path, work: Callable[[], None], command: str, options: Sequence[str] = ()) -> int:
    """Do `work` as one rank of the config's world, or, outside a world, start its ranks with `megatron-rl COMMAND PATH
    OPTIONS`; return the exit code. They read the config from `path`, whose folder holds their logs.

    Raises: UserError when this world is not the config's, or another run holds the folder.
    """
    return launch.in_world(
        work,
        [command, str(path), *options],
        path.parent,
        processes=config.parallel.processes,
        grace_seconds=config.train.grace_seconds,
        prepare=lambda: write_atomically(path, dump_config(config)),
        environment=for_libraries(config),
    )
