"""Proof after a weight update that the engine serves the policy's weights: a fixed prompt's continuation, scored by
both."""

from collections.abc import Sequence

import torch

from megatron_rl import device
from megatron_rl.algorithms.kl import mismatch_metrics
from megatron_rl.config import Config
from megatron_rl.packing import Layout, pack_supervised
from megatron_rl.policy.policy import MegatronPolicy
from megatron_rl.rollout.engine import EngineError, Request, RolloutEngine, SamplingParams
from megatron_rl.types import Prompt, Ranks, Rollout, TrainBatch

_TOKENS = 8  # of a continuation
_MAX_ERROR = {"float32": 1e-3, "bfloat16": 0.1}  # nats, mean over tokens
_MAX_MISMATCH = {"float32": 1e-3, "bfloat16": 0.05}  # the same of a step's tokens, where they stand for the trainer's


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


def check_mismatch(batch: TrainBatch, config: Config, ranks: Ranks) -> None:
    """Check, where the engine's log-probabilities are the old policy's and this step has recomputed them, that the two
    agree. A collective.

    Raises: EngineError, on every rank, when their mean difference exceeds `algorithm.max_mismatch`.
    """
    algorithm = config.algorithm
    if algorithm.old_logprobs == "recompute" or not algorithm.recomputes(batch.step):
        return
    total = torch.zeros(2, dtype=torch.float64, device=device.device())
    for micro_batch in batch.micro_batches:
        pair = micro_batch.computed_stats.logprobs, micro_batch.rollout_logprobs
        total += mismatch_metrics(*pair, micro_batch.loss_mask)["mismatch/abs_mean"]
    distance, count = ranks.sum(total).tolist()
    limit = algorithm.max_mismatch or _MAX_MISMATCH[config.model.dtype]
    if not distance <= limit * count:
        raise EngineError(
            f"step {batch.step + 1}, before its updates: engine and trainer differ in the log-probabilities of "
            f"{round(count)} tokens by {distance / count:.3g} nats on average, allowed {limit:g}. With algorithm."
            "old_logprobs=rollout one stands for the other: set recompute, find what the engine computes otherwise "
            "(precision, kernels, model.logits_dtype), or raise algorithm.max_mismatch"
        )


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
