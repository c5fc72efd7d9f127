#!/usr/bin/env bash
# One rank, started by torchrun: rank.sh SUBCOMMAND CONFIG. Its lines go to a log of its own, and marked to the merged one.
set -euo pipefail
exec > >(tee -a "$MEGATRON_RL_RUN_DIR/logs/rank$RANK.log" | sed -u "s/^/[rank $RANK] /") 2>&1
echo "--- $1, job $SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0} on ${SLURMD_NODENAME:-$HOSTNAME}, $(date -u +%FT%TZ)"
exec python -m megatron_rl "$@"
