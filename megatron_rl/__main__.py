"""`python -m megatron_rl`: the command line."""

from megatron_rl.cli import main

main()
