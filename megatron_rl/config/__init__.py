"""The run's config: its sections, how a file becomes one, and the checks that it must pass."""

from megatron_rl.config.load import dump_config, load_config, parse_config
from megatron_rl.config.sections import (
    AlgorithmConfig,
    Config,
    CountdownData,
    JsonlData,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
    WarmStartConfig,
)

__all__ = [
    "AlgorithmConfig",
    "Config",
    "CountdownData",
    "JsonlData",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "TrainConfig",
    "WarmStartConfig",
    "dump_config",
    "load_config",
    "parse_config",
]
