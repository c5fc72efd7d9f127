"""From a response to the reward that the advantage estimator sees."""

from megatron_rl.reward.shape import (
    RewardError,
    build_grader,
    check_failures,
    filter_overlong,
    graded,
    response_text,
    shape_rewards,
    submit,
)

__all__ = [
    "RewardError",
    "build_grader",
    "check_failures",
    "filter_overlong",
    "graded",
    "response_text",
    "shape_rewards",
    "submit",
]
