"""The run's config: its sections, how a file becomes one, and the checks that it must pass."""

from megatron_rl.config.load import dump_config as dump_config
from megatron_rl.config.load import load_config as load_config
from megatron_rl.config.load import parse_config as parse_config
from megatron_rl.config.sections import AlgorithmConfig as AlgorithmConfig
from megatron_rl.config.sections import Config as Config
from megatron_rl.config.sections import CountdownData as CountdownData
from megatron_rl.config.sections import JsonlData as JsonlData
from megatron_rl.config.sections import LoggingConfig as LoggingConfig
from megatron_rl.config.sections import ModelConfig as ModelConfig
from megatron_rl.config.sections import OptimizerConfig as OptimizerConfig
from megatron_rl.config.sections import ParallelConfig as ParallelConfig
from megatron_rl.config.sections import TrainConfig as TrainConfig
from megatron_rl.config.sections import WarmStartConfig as WarmStartConfig
