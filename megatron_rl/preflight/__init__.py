"""Checks of what can go wrong before weights are loaded: `megatron-rl preflight CONFIG`, and the start of each Slurm
job."""
