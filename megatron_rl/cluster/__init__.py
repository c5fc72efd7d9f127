"""What a Slurm job asks of Python before and after training; `slurm/launch.sh` calls it, nobody types it."""
