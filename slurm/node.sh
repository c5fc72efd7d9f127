#!/usr/bin/env bash
# On a node, inside the container if there is one: a command in the site's environment.
#   node.sh agent SUBCOMMAND CONFIG [OPTION ...]
#                   torchrun, and under it megatron-rl SUBCOMMAND CONFIG OPTION ... as this node's ranks
#   node.sh COMMAND...
set -euo pipefail
# shellcheck source=slurm/site.sh
source "$MEGATRON_RL_SITE"
site_setup
# the frozen code, whatever is installed, and not what lies in the current folder
export PYTHONPATH=$MEGATRON_RL_CODE${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
[[ $1 == agent ]] || exec "$@"
shift

export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # Megatron overlaps sequence parallelism only so
# Slurm's signals are for the ranks, which save: a torchrun that saw them would kill the ranks after 30 s.
trap '' TERM USR1
options=()
torch=$(python -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])")
if grep -q signals-to-handle "$torch/distributed/run.py"; then # releases before that cannot be told
    options+=(--signals-to-handle=SIGINT)
fi
# the pipe lets the last lines of the ranks through before the step ends, and no orphan can hold it open for long
exec 3> >(exec cat)
drain=$!
code=0
python -m torch.distributed.run --nnodes="$SLURM_JOB_NUM_NODES" --node-rank="$SLURM_NODEID" \
    --nproc-per-node="$MEGATRON_RL_PROCESSES" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" \
    "${options[@]}" --no-python bash "$MEGATRON_RL_CODE/slurm/rank.sh" "$@" >&3 2>&1 || code=$?
exec 3>&-
for _ in {1..50}; do
    kill -0 "$drain" 2> /dev/null || break
    sleep 0.1
done
exit "$code"
