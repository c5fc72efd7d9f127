#!/usr/bin/env bash
# One job of a run, on its first node; the .sbatch files start it: launch.sh CONFIG [a.b=c ...]
#
# 1. Takes a run folder and freezes code and resolved config in it (megatron_rl/cluster/freeze.py); from then on, through
#    all requeues, this job runs the frozen copy, this script included.
# 2. Preflight on all ranks, then training: one torchrun agent a node. The first rank of a node starts its engines.
# 3. Slurm's warning (USR1 before the time limit, TERM before a pre-emption) becomes the file `stop`, which every rank
#    looks for at a step's end and before more prompts are drawn: the run saves and ends, and the job goes back into the
#    queue. So does a job of which a node died. A requeued job goes on from the newest checkpoint.
set -euo pipefail

: "${SLURM_JOB_ID:?is not set: this script runs inside a job; submit one of slurm/*.sbatch}"
export MEGATRON_RL_ROOT=${MEGATRON_RL_ROOT:-$SLURM_SUBMIT_DIR}
export MEGATRON_RL_SITE=${MEGATRON_RL_SITE:-$MEGATRON_RL_ROOT/slurm/site.sh}
for file in "$MEGATRON_RL_ROOT/megatron_rl/__init__.py" "$MEGATRON_RL_SITE"; do
    [[ -f $file ]] || { echo "no $file: submit from the project's folder, or set MEGATRON_RL_ROOT" >&2; exit 1; }
done
cd "$MEGATRON_RL_ROOT"
# shellcheck source=slurm/site.sh
source "$MEGATRON_RL_SITE"

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun=(srun --kill-on-bad-exit=1 --cpu-bind=none --overlap --ntasks-per-node=1 "${site_srun[@]}")

on_head() { # COMMAND...: on this node, in the site's environment
    "${srun[@]}" --nodes=1 --ntasks=1 --nodelist="$head" bash "$code/slurm/node.sh" "$@"
}

# --- the run folder ---------------------------------------------------------------------------------------------------

record=$MEGATRON_RL_RUNS/.jobs/$SLURM_JOB_ID
if [[ -z ${MEGATRON_RL_FROZEN:-} ]]; then
    if [[ ! -s $record ]]; then
        code=$MEGATRON_RL_ROOT
        export MEGATRON_RL_CODE=$code
        on_head python -m megatron_rl.cluster claim --root "$MEGATRON_RL_ROOT" --record "$record" \
            --live-jobs "$(squeue --noheader --format=%A | sort -u | tr '\n' ' ')" "$@"
    fi
    { read -r _; read -r code; } < "$record"
    MEGATRON_RL_FROZEN=1 exec bash "$code/slurm/launch.sh" "$@"
fi
{ read -r run_dir; read -r code; read -r per_node; } < "$record"
export MEGATRON_RL_RUN_DIR=$run_dir MEGATRON_RL_CODE=$code

# --- all ranks --------------------------------------------------------------------------------------------------------

part=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0} # of the job between two requeues
# what Slurm itself reaches the node by
address=$(scontrol show node --oneliner "$head" | grep -o ' NodeAddr=[^ ]*' | cut -d= -f2)

free_port() {
    local port
    while port=$((20000 + RANDOM % 12000)); do # below the range from which the kernel takes ports for clients
        (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null || { echo "$port"; return; }
    done
}

warned=""
signalled=""
# shellcheck disable=SC2317  # the traps call it
warn() { # SIGNAL
    signalled=1
    [[ -z $warned ]] || return 0
    warned=$1
    echo "got $1: saving after this step, or before it draws more prompts"
    echo "$part $1" > "$run_dir/stop"
}

on_all() { # LOG SUBCOMMAND [OPTION ...]: megatron-rl SUBCOMMAND CONFIG on every rank; returns its exit code
    local log=$1 code_of_all=0 pid
    # torchrun reads MASTER_*; node.sh passes them on
    MASTER_ADDR=$address MASTER_PORT=$(free_port) MEGATRON_RL_PROCESSES=$per_node \
        "${srun[@]}" --nodes="$SLURM_JOB_NUM_NODES" --output="$log" \
        bash "$code/slurm/node.sh" agent "$2" "$run_dir/config.yaml" "${@:3}" &
    pid=$!
    while true; do
        signalled=""
        if wait "$pid"; then code_of_all=0; else code_of_all=$?; fi
        [[ -n $signalled ]] || break # else it was the signal that ended the wait
    done
    return "$code_of_all"
}

mkdir -p "$run_dir/logs"
rm -rf "$run_dir/stop" "$run_dir/failures"
trap 'warn USR1' USR1
trap 'warn TERM' TERM

echo "job $part: $SLURM_JOB_NUM_NODES nodes of $per_node processes, run folder $run_dir"
if ! on_all "$run_dir/logs/preflight-$part.log" preflight; then
    cat "$run_dir/logs/preflight-$part.log"
    echo "preflight failed: nothing was trained" >&2
    exit 1
fi
cat "$run_dir/logs/preflight-$part.log"

if [[ ${MEGATRON_RL_SUBCOMMAND:-train} == conform ]]; then # conform.sbatch
    code_of_conform=0
    read -ra options <<< "${MEGATRON_RL_CONFORM:-}"
    on_all "$run_dir/logs/conform-$part.log" conform "${options[@]}" || code_of_conform=$?
    cat "$run_dir/logs/conform-$part.log"
    exit "$code_of_conform"
fi

merged=$run_dir/logs/job-$part.log
touch "$run_dir/logs/rank0.log"
tail -n 0 -F "$run_dir/logs/rank0.log" 2> /dev/null &
tail=$!
code_of_run=0
on_all "$merged" train || code_of_run=$?
sleep 1 # for the last lines to be shown
kill "$tail" 2> /dev/null || true

# --- the end ----------------------------------------------------------------------------------------------------------

requeue() {
    echo "$1: back into the queue"
    scontrol requeue "$SLURM_JOB_ID" || {
        echo "this cluster does not let a job requeue itself; the same sbatch command continues" >&2
        exit 75
    }
    sleep 60 # Slurm ends this script
    exit 75
}

state() {
    scontrol show job --oneliner "$SLURM_JOB_ID" | grep -o 'JobState=[A-Z]*' | cut -d= -f2
}

nodes_answer() {
    timeout 60 "${srun[@]}" --nodes="$SLURM_JOB_NUM_NODES" --immediate=50 true > /dev/null 2>&1
}

steps=0
on_head python -m megatron_rl.cluster conclude "$run_dir" "$merged" "$code_of_run" || steps=$?
if ((code_of_run != 0)); then
    echo "failed with exit code $code_of_run; the merged log, reason first: $merged" >&2
    # the ranks see a dead node as a lost connection, long before Slurm gives it up
    nodes_answer || [[ $(state) != RUNNING ]] || requeue "a node does not answer"
    exit "$code_of_run"
fi
((steps == 75)) || exit "$steps"
if [[ $(state) != RUNNING ]] || [[ -e $run_dir/stop && -z $warned ]]; then
    echo "stopped by hand; the same sbatch command continues"
    exit 0
fi
requeue "steps are left"
