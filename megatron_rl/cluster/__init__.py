"""Steps of a Slurm job before and after training; `slurm/launch.sh` calls them, nobody types them."""
