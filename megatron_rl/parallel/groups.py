"""The process groups of one run, as plain data: nothing else in the trainer asks Megatron's global state."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rl import device
from megatron_rl.config import ParallelConfig
from megatron_rl.parallel.reduce import Reducer
from megatron_rl.parallel.world import host_group, join_world
from megatron_rl.types import Float

device.prepare_megatron()

from megatron.core import parallel_state as mpu  # noqa: E402  after the shim
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402


@dataclass(frozen=True, slots=True)
class Groups:
    """This rank's place in the world.

    `dp_cp` holds the ranks that share weights and hold different tokens: those with other micro-batches (data
    parallelism) and those with another part of the same ones (context parallelism). `dp_rank` and `dp_size` count
    data parallelism alone.
    `ep` holds ranks of one pipeline stage that deal a layer's experts out among them; without expert parallelism it is
    this rank alone, and experts are split over `tp` as the other weights are. `dp_cp_hosts` and `pp_hosts` are gloo
    groups of the same ranks, for objects.
    """

    all_ranks: Reducer
    tp: ProcessGroup
    pp: ProcessGroup
    pp_hosts: ProcessGroup
    dp_cp: ProcessGroup
    dp_cp_hosts: ProcessGroup
    cp: ProcessGroup
    ep: ProcessGroup
    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    cp_rank: int
    cp_size: int
    ep_rank: int
    ep_size: int

    @property
    def token_ranks(self) -> Reducer:
        """Return what reduces over the ranks that hold different tokens."""
        return Reducer(self.dp_cp, device.device(), self.dp_cp_hosts)

    @property
    def context_ranks(self) -> Reducer | None:
        """Return what reduces over the ranks that hold the rest of this rank's sequences; None: they are whole."""
        return Reducer(self.cp, device.device()) if self.cp_size > 1 else None

    @property
    def stage_ranks(self) -> Reducer:
        """Return what reduces over the stages of this rank's pipeline."""
        return Reducer(self.pp, device.device(), self.pp_hosts)

    @property
    def dp_ranks(self) -> tuple[int, ...]:
        """Return the data-parallel rank of every process, in the order of the world's ranks (tp-cp-dp-pp)."""
        return tuple(rank // (self.tp_size * self.cp_size) % self.dp_size for rank in range(self.world_size))

    @property
    def is_first_stage(self) -> bool:
        """Tell whether this rank holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Tell whether this rank holds the output layer."""
        return self.pp_rank == self.pp_size - 1

    @property
    def pp_ranks(self) -> list[int]:
        """Global ranks of this pipeline, by stage."""
        return dist.get_process_group_ranks(self.pp)


def expert_tp(parallel: ParallelConfig) -> int:
    """Tensor-parallel size inside an expert. Experts that are dealt out over EP stay whole: their ranks would have to
    gather token blocks of different sizes, which gloo cannot."""
    return 1 if parallel.ep > 1 else parallel.tp


def init_groups(parallel: ParallelConfig, seed: int, waiting_seconds: float = 0.0) -> Groups:
    """Join the world that torchrun's environment describes and lay out TP, CP, DP and PP (order tp-cp-dp-pp, as
    Megatron does); EP takes neighbouring ranks of a stage, over TP first, then CP and DP.

    waiting_seconds: how long ranks may wait for each other (rollout/clocks.py), at least parallel.timeout_seconds.
    Raises: RuntimeError when WORLD_SIZE differs from the config's.
    """
    seconds = parallel.timeout_seconds
    all_ranks = join_world(seconds, max(seconds, waiting_seconds))
    if dist.get_world_size() != parallel.processes:
        raise RuntimeError(
            f"torchrun started {dist.get_world_size()} processes, the config asks for "
            f"parallel.world_size={parallel.processes}"
        )
    mpu.initialize_model_parallel(
        parallel.tp,
        parallel.pp,
        parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=expert_tp(parallel),
        distributed_timeout_minutes=math.ceil(seconds / 60),
    )
    model_parallel_cuda_manual_seed(seed)
    tp, pp = mpu.get_tensor_model_parallel_group(), mpu.get_pipeline_model_parallel_group()
    cp, ep = mpu.get_context_parallel_group(), mpu.get_expert_model_parallel_group()
    dp_cp = mpu.get_data_parallel_group(with_context_parallel=True)
    by_name = {"tp": tp, "pp": pp, "cp": cp, "ep": ep}
    return Groups(
        all_ranks=all_ranks,
        tp=tp,
        pp=pp,
        pp_hosts=host_group(pp, all_ranks, seconds),
        dp_cp=dp_cp,
        dp_cp_hosts=host_group(dp_cp, all_ranks, seconds),
        cp=cp,
        ep=ep,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        dp_rank=mpu.get_data_parallel_rank(),
        dp_size=mpu.get_data_parallel_world_size(),
        **{f"{name}_rank": dist.get_rank(group) for name, group in by_name.items()},
        **{f"{name}_size": dist.get_world_size(group) for name, group in by_name.items()},
    )


def destroy_groups() -> None:
    """Leave the world; a later `init_groups` in the same process may lay out another."""
    mpu.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def broadcast_from_last_stage(
    tensors: list[Float[Tensor, "T"] | None], groups: Groups, like: Float[Tensor, "T"]
) -> list[Float[Tensor, "T"]]:
    """Give every pipeline stage the last stage's tensors (all typed as `like`), in one broadcast.

    Losses and selection then run the same code on every stage; the traffic is a few floats a token.
    """
    if groups.pp_size == 1:
        return [tensor for tensor in tensors if tensor is not None]
    last = groups.is_last_stage
    packed = torch.stack([t if last and t is not None else torch.zeros_like(like) for t in tensors])
    dist.broadcast(packed, src=groups.pp_ranks[-1], group=groups.pp)
    return list(packed.unbind(0))
