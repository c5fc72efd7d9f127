"""The world of a run: what its ranks and its engines have to agree on, and how long a rank may wait there."""

from megatron_rl.config import Config
from megatron_rl.parallel.groups import Groups, init_groups
from megatron_rl.rollout.clocks import waiting_seconds
from megatron_rl.rollout.servers.nccl import agree_with_engines


def join(config: Config) -> Groups:
    """Return this rank's place in the world that torchrun's environment describes. Collective."""
    agree_with_engines(config.rollout)
    return init_groups(config.parallel, config.seed, waiting_seconds(config))
