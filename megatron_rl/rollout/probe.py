"""Proof after a weight update that the engine serves the policy's weights: a fixed prompt's continuation, scored by
both."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_rl import device
from megatron_rl.config import Config
from megatron_rl.packing import Layout, pack_supervised
from megatron_rl.policy.policy import MegatronPolicy
from megatron_rl.rollout.engine import EngineError, Request, RolloutEngine, SamplingParams
from megatron_rl.types import Prompt, Rollout

_TOKENS = 8  # of a continuation
_MAX_ERROR = {"float32": 1e-3, "bfloat16": 0.1}  # nats, mean over tokens


def probe_engine(engine: RolloutEngine, policy: MegatronPolicy, layout: Layout, prompts: Sequence[Prompt]) -> None:
    """Check that the engine serves the policy's weights. A collective.

    Raises: EngineError, on every rank, when the mean difference of the log-probabilities exceeds
    `rollout.weight_sync.max_probe_error`.
    """
    distance, tokens, version = probe_distance(engine, policy, layout, prompts)
    limit = probe_limit(policy.config)
    if not distance <= limit:
        raise EngineError(
            f"after the update to weight version {version} the engine's log-probabilities of {tokens} probe tokens "
            f"differ from the policy's by {distance:.3g} nats on average, allowed {limit:g}: it does not serve the "
            "weights that it was sent. Try another rollout.weight_sync.mode; if the engine merely computes less "
            "exactly, raise rollout.weight_sync.max_probe_error"
        )


def probe_limit(config: Config) -> float:
    """Return the largest mean difference that passes, in nats."""
    return config.rollout.weight_sync.max_probe_error or _MAX_ERROR[config.model.dtype]


def probe_distance(
    engine: RolloutEngine, policy: MegatronPolicy, layout: Layout, prompts: Sequence[Prompt]
) -> tuple[float, int, int]:
    """Return the mean difference between the engine's and the policy's log-probabilities, in nats, the number of
    tokens it is the mean of, and the engine's weight version, the same on every rank: the engine continues a few
    prompts, one per rank, and the policy scores its tokens. A collective.

    Raises: EngineError, on every rank, when the engine cannot answer.
    """
    config, groups = policy.config, policy.groups
    length = min(_TOKENS, config.rollout.max_response_tokens)
    sampling = SamplingParams(config.rollout.temperature, 1.0, 0, length, (), seed=0)
    prompt = prompts[groups.rank % len(prompts)]
    mine: Rollout | EngineError
    try:
        (mine,) = engine.generate([Request(prompt.prompt_id, groups.rank, prompt.token_ids, sampling, at_once=True)])
    except EngineError as error:
        mine = type(error)(f"the probe after a weight update failed: {error}")
    answers: list[Rollout | EngineError] = groups.all_ranks.gather_objects(mine)
    for answer in answers:
        if isinstance(answer, EngineError):
            raise answer
    rollouts = [answer for answer in answers if isinstance(answer, Rollout)]
    pairs = [(r.token_ids[~r.sampled].tolist(), r.response_ids.tolist()) for r in rollouts]
    mini_batch = pack_supervised(pairs, layout).to(device.device())
    total = torch.zeros(2, dtype=torch.float64, device=device.device())
    for micro_batch, stats in zip(mini_batch.micro_batches, policy.stats(mini_batch), strict=True):
        mask = micro_batch.loss_mask
        for index in micro_batch.prompt_ids[mask].unique().tolist():
            response = mask & (micro_batch.prompt_ids == index)
            predicted = micro_batch.position_ids[response].cpu() + 1
            difference = stats.logprobs[response] - rollouts[index].rollout_logprobs[predicted].to(stats.logprobs)
            total += torch.stack([difference.abs().double().sum(), response.double().sum()])
    distance, count = groups.token_ranks.sum(total).tolist()
    return distance / count, round(count), rollouts[0].weight_version
