"""How often bfloat16 turns the sign of logp - old_logp, the gradient of KL-Cov's penalty, on this device: with
bfloat16 and with float32 logits, against the same weights in float64. scripts/study_bf16_signs.py is the CPU's study.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from gpu_answer import Answer
from gpu_cases import batch_of, config_of, join, larger_model, policy_of, update
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_rl import device
from megatron_rl.policy.policy import MegatronPolicy
from megatron_rl.types import TrainBatch

BOUNDS = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, float("inf"))  # nats of true movement, between the rows
RATES = (1e-6, 1e-5)
MARGIN = 0.05  # of the tokens: where the layers' rounding hides the movement, neither kind of logits shows it


def signs(answer: Answer) -> None:
    """Measure the shares by the size of the true movement, and the distance of all three from float64."""
    shares = {}
    rates = RATES if device.ON_GPU else RATES[:1]
    for logits in ("model", "float32"):
        for rate in rates:
            shares[logits, rate] = one_step(answer, logits, rate)
    for rate in rates:
        rounded, exact = shares["model", rate], shares["float32", rate]
        answer.check(
            f"signs after an Adam step of {rate:g}",
            exact <= rounded + MARGIN,
            f"wrong or zero: {rounded:.0%} with bfloat16 logits, {exact:.0%} with float32 logits",
        )
    with TemporaryDirectory() as folder:
        policy, batch = ready(Path(folder), {"dtype": "float32"}, RATES[0])
        distance = float((logprobs(policy, batch) - truth(policy, batch)).abs().mean())
        answer.check("float32 policy", distance <= 1e-4, f"mean distance from float64 {distance:.1e} nats")


def one_step(answer: Answer, logits: str, rate: float) -> float:
    """Return the share of wrong signs after one update; keep the table."""
    with TemporaryDirectory() as folder:
        policy, batch = ready(Path(folder), {"dtype": "bfloat16", "logits_dtype": logits}, rate)
        mask = torch.cat([m.loss_mask for m in batch.mini_batches[0].micro_batches])
        old, again, exact_old = logprobs(policy, batch), logprobs(policy, batch), truth(policy, batch)
        if rate == RATES[0]:
            same = torch.equal(old, again)
            distance = float((old - exact_old)[mask].abs().mean())
            answer.check(f"{logits} logits, twice the same", same, f"mean distance from float64 {distance:.1e} nats")
        update(policy, batch, 0)
        moved = (logprobs(policy, batch) - old)[mask]
        exact = (truth(policy, batch) - exact_old)[mask]
        answer.figure(f"{logits} logits, rate {rate:g}", table(moved, exact))
        return wrong(moved, exact)


def ready(folder: Path, model: dict[str, Any], rate: float) -> tuple[MegatronPolicy, TrainBatch]:
    """Return a policy and a batch with old log-probabilities."""
    sections = {"model": {"hf_config": larger_model()} | model, "optimizer": {"lr": rate, "warmup_steps": 0}}
    config = config_of(folder, **sections)
    groups = join(config)
    policy = policy_of(config, groups)
    return policy, policy.with_old_logprobs(batch_of(config, groups))


def logprobs(policy: MegatronPolicy, batch: TrainBatch) -> Tensor:
    """Return those of the first mini-batch, float64 `[T]`."""
    return torch.cat([stats.logprobs for stats in policy.stats(batch.mini_batches[0])]).double()


@torch.no_grad()
def truth(policy: MegatronPolicy, batch: TrainBatch) -> Tensor:
    """Return the log-probabilities of the same weights in float64, by transformers."""
    with device.device():  # where it is initialised too, which on a CPU takes seconds
        model = AutoModelForCausalLM.from_config(policy.hf_config, dtype=torch.float64).eval()
    weights = {name: tensor.double() for name, tensor in policy.hf_weights()}
    unknown = model.load_state_dict(weights, strict=False)
    assert not unknown.unexpected_keys and not unknown.missing_keys, unknown
    parts = []
    for micro_batch in batch.mini_batches[0].micro_batches:
        sequences = micro_batch.token_ids.split(micro_batch.cu_seqlens.diff().tolist())
        rows = [logits for sequence in sequences for logits in model(input_ids=sequence[None]).logits]
        log_p = torch.cat(rows).log_softmax(-1)
        parts.append(log_p.gather(1, micro_batch.labels[:, None])[:, 0])
    return torch.cat(parts)


def wrong(moved: Tensor, exact: Tensor) -> float:
    """Return the share of signs that are wrong or zero."""
    return float((moved.sign() != exact.sign()).double().mean())


def table(moved: Tensor, exact: Tensor) -> list[dict[str, float]]:
    """Return a row for each size of the true movement: its bounds, tokens, and share of wrong signs."""
    rows = []
    for low, high in zip(BOUNDS, BOUNDS[1:], strict=False):
        inside = (exact.abs() >= low) & (exact.abs() < high)
        if inside.any():
            share = wrong(moved[inside], exact[inside])
            rows.append({"above": low, "tokens": int(inside.sum()), "wrong": share})
    return rows
