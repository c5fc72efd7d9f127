"""Responses that come in parts: the request for the rest, the parts put together, the check of the whole."""

import dataclasses
from typing import Any

import torch

from megatron_rl.algorithms.hashing import hash64
from megatron_rl.models.expert_routes import server_routes
from megatron_rl.rollout.engine import EngineError, Request
from megatron_rl.rollout.servers.protocol import Completion
from megatron_rl.types import Rollout


def rest(request: Request, done: Completion) -> Request:
    """Return the request for the rest of a response that was cut short: `done` counts as its prompt."""
    count = len(done.token_ids)
    if not count:
        return request
    sampling = dataclasses.replace(
        request.sampling,
        max_response_tokens=request.sampling.max_response_tokens - count,
        seed=int(hash64(request.sampling.seed, count)) & (2**63 - 1),  # the same seed would repeat the same draws
    )
    return dataclasses.replace(request, token_ids=(*request.token_ids, *done.token_ids), sampling=sampling)


def seed_of(request: Request) -> int:
    """Return the seed of a response's draws, below 2^63: the same in every run."""
    return int(hash64(request.sampling.seed, request.prompt_id, request.sample_index)) & (2**63 - 1)


def joined(done: Completion, part: Completion, weight_version: int) -> Completion:
    """Return `done` followed by `part`.

    weight_version: of the part, where the server does not tell. The routes are those of `part`: its server computed all
    earlier tokens anew, so they cover the whole.
    """
    spans = part.spans if part.spans is not None else ((weight_version, len(part.token_ids)),)
    merged = list(done.spans or ())
    for version, count in spans:
        if not count:
            continue
        if merged and merged[-1][0] == version:
            merged[-1] = (version, merged[-1][1] + count)
        else:
            merged.append((version, count))
    return Completion(
        done.token_ids + part.token_ids,
        done.logprobs + part.logprobs,
        part.finish_reason,
        tuple(merged),
        part.routes,
        done.cached_tokens + part.cached_tokens,
    )


def as_rollout(request: Request, done: Completion, hf: Any) -> Rollout:
    """Return the rollout of an answer. `hf`: the policy's transformers config.

    Raises: EngineError when the answer cannot be that of the request.
    """
    sampled, name = torch.tensor(done.logprobs), f"prompt {request.prompt_id}, sample {request.sample_index}"
    limit, counted = request.sampling.max_response_tokens, sum(count for _, count in done.spans or ())
    if not 0 < len(done.token_ids) <= limit or {len(done.logprobs), counted} != {len(done.token_ids)}:
        raise EngineError(
            f"generate: {name}: got {len(done.token_ids)} tokens with {len(done.logprobs)} log-probabilities and "
            f"weight versions for {counted}, expected 1 to {limit} of each"
        )
    if not bool(sampled.isfinite().all()):
        raise EngineError(
            f"generate: {name}: a sampled token's log-probability is not finite under weight versions {done.spans}; "
            "the weights have diverged"
        )
    stopped = done.token_ids[-1] in request.sampling.stop_token_ids
    if not stopped and (done.finish_reason == "stop" or len(done.token_ids) != limit):
        raise EngineError(
            f"generate: {name}: ended ({done.finish_reason}) after {len(done.token_ids)} of {limit} tokens with token "
            f"{done.token_ids[-1]}, which is none of the stop tokens {list(request.sampling.stop_token_ids)}"
        )
    prompt = len(request.token_ids)
    routes = None
    if request.with_routes:
        try:
            routes = server_routes(done.routes, prompt + len(done.token_ids), hf)
        except ValueError as error:
            raise EngineError(f"generate: {name}: its routed experts {error}") from error
    return Rollout(
        prompt_id=request.prompt_id,
        sample_index=request.sample_index,
        token_ids=torch.tensor([*request.token_ids, *done.token_ids]),
        rollout_logprobs=torch.cat([torch.zeros(prompt), sampled]),
        sampled=torch.arange(prompt + len(done.token_ids)) >= prompt,
        finish_reason="stop" if stopped else "length",  # servers differ on a stop token at the limit
        weight_version=min(version for version, _ in done.spans or ()),
        spans=done.spans or (),
        routes=routes,
    )


def too_late(request: Request, seconds: float, error: Exception) -> str:
    """Return the error message for a response that did not come in time."""
    return (
        f"generate: prompt {request.prompt_id}, sample {request.sample_index} had no answer within "
        f"rollout.server.request_seconds={seconds:g}: {error}. Raise it, lower rollout.server.max_concurrency, or add "
        "servers"
    )
