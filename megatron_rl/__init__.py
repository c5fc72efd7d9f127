"""megatron_rl: reinforcement learning for LLM reasoning on Megatron-Core, with an exact Entropy Mechanism."""

__version__ = "0.1.0"
