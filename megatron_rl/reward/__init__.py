"""From a response to the reward that the advantage estimator sees."""

from megatron_rl.reward.shape import (
    RewardError,
    build_grader,
    check_failures,
    filter_overlong,
    graded,
    reads_gold,
    response_text,
    say_text_only,
    shape_rewards,
    submit,
)

__all__ = [
    "RewardError",
    "build_grader",
    "check_failures",
    "filter_overlong",
    "graded",
    "reads_gold",
    "response_text",
    "say_text_only",
    "shape_rewards",
    "submit",
]
