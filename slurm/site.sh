#!/usr/bin/env bash
# What differs between clusters, and nothing else. Sourced by launch.sh on the first node and by node.sh on every node.
# Edit it, or keep a copy elsewhere and say MEGATRON_RL_SITE=/path/to/it sbatch ...

# Folders that all nodes see. The recipes read them: models/Qwen2.5-32B, data/train_dapo_math_17k.jsonl, runs/NAME.
export MEGATRON_RL_MODELS=${MEGATRON_RL_MODELS:-$MEGATRON_RL_ROOT/models}
export MEGATRON_RL_DATA=${MEGATRON_RL_DATA:-$MEGATRON_RL_ROOT/data}
export MEGATRON_RL_RUNS=${MEGATRON_RL_RUNS:-$MEGATRON_RL_ROOT/runs}

# Runs on every node, inside the container if there is one: makes `python` the one with megatron-rl.
site_setup() {
    # module load cuda
    # shellcheck source=/dev/null
    source "$MEGATRON_RL_ROOT/.venv/bin/activate"
}

# Options of every srun. A container (pyxis) must see the project's, the models', the data's and the runs' folders under
# the same paths:
#   site_srun=(--container-image=/path/image.sqsh --container-mounts=/shared:/shared)
# shellcheck disable=SC2034  # read by launch.sh
site_srun=()

# Of the network, for example:
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
