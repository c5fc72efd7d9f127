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
    local venv=$MEGATRON_RL_ROOT/.venv-gpu # `make gpu` and `make gpu-one` make it
    if [[ ! -f $venv/bin/activate ]]; then
        echo "$(hostname): no $venv: type \`make gpu\` in $MEGATRON_RL_ROOT (docs/install_gpu.md), or edit slurm/site.sh" >&2
        return 1
    fi
    # shellcheck source=/dev/null
    source "$venv/bin/activate"

    # What is compiled while running, on the node's own disk: many processes that write one shared folder wait for each
    # other's locks. Kept between jobs of a user, so that only the first waits.
    local cache=${MEGATRON_RL_CACHE:-/tmp/megatron-rl-cache-$(id -u)}
    export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$cache/triton}
    export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor}
    export SGLANG_CACHE_DIR=${SGLANG_CACHE_DIR:-$cache/sglang}
    export VLLM_CACHE_ROOT=${VLLM_CACHE_ROOT:-$cache/vllm}
    export FLASHINFER_WORKSPACE_BASE=${FLASHINFER_WORKSPACE_BASE:-$cache}
    mkdir -p "$cache"

    # NCCL over InfiniBand pins memory
    ulimit -l unlimited 2> /dev/null || echo "$(hostname): locked memory is limited to $(ulimit -l) KiB: ask for more" >&2
}

# Options of every srun. A container (pyxis) must see the project's, the models', the data's and the runs' folders under
# the same paths:
#   site_srun=(--container-image=/path/image.sqsh --container-mounts=/shared:/shared)
# shellcheck disable=SC2034  # read by launch.sh
site_srun=()

# Of the network. Without these lines NCCL and gloo choose for themselves, on some clusters a card that leads nowhere;
# `ip -brief address` and `ibv_devices` name what a node has:
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0    # what the ranks find each other by
#   export NCCL_IB_HCA=mlx5                                 # what the data goes over: all cards that begin so
# torch keeps each rank's last 2,000 collectives and writes them when its watchdog ends a hung run. More, and where to:
#   export TORCH_NCCL_TRACE_BUFFER_SIZE=20000 TORCH_FR_DUMP_TEMP_FILE=$MEGATRON_RL_RUNS/hung_rank_
