"""KL estimators: values, the gradients they promise, and their behaviour at the edges."""

from __future__ import annotations

import math
import typing

import pytest
import torch

from megatron_rl.algorithms.kl import k3, kl_penalty, mismatch_metrics
from megatron_rl.algorithms.policy_loss import PolicyLoss

KINDS = ("k1", "k2", "k3")


def test_the_kinds_are_the_config() -> None:
    assert set(KINDS) == set(typing.get_args(PolicyLoss.model_fields["ref_kl_estimator"].annotation))


@pytest.mark.parametrize(
    ("kind", "value", "slope"),
    # pi = 1/2, ref = 1/4: d = ln 2, e^-d = 1/2
    [("k1", 0.6931472, 0.6931472), ("k2", 0.2402265, 0.6931472), ("k3", 0.1931472, 0.5)],
)
def test_hand_computed(kind: str, value: float, slope: float) -> None:
    logprobs = torch.tensor([math.log(0.5)], requires_grad=True)
    kl = kl_penalty(logprobs, torch.tensor([math.log(0.25)]), kind)
    kl.sum().backward()
    assert kl.item() == pytest.approx(value, abs=1e-6)
    assert logprobs.grad is not None and logprobs.grad.item() == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_expectations_over_a_whole_distribution(kind: str) -> None:
    """Summed over a vocabulary with the policy's probabilities there is no sampling noise: both are exact."""
    torch.manual_seed(0)
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(7, dtype=torch.float64).log_softmax(0)
    logprobs = logits.log_softmax(0)
    reverse = (logprobs.exp() * (logprobs - ref)).sum()
    forward = (ref.exp() * (ref - logprobs)).sum()

    estimate = (logprobs.exp().detach() * kl_penalty(logprobs, ref, kind)).sum()
    (got,) = torch.autograd.grad(estimate, logits, retain_graph=True)
    (expected,) = torch.autograd.grad(forward if kind == "k3" else reverse, logits)
    torch.testing.assert_close(got, expected)
    if kind != "k2":  # k2 is the biased estimator of the value
        torch.testing.assert_close(estimate, reverse)


@pytest.mark.parametrize("kind", KINDS)
def test_far_apart_policies_stay_finite(kind: str) -> None:
    logprobs = torch.tensor([-1000.0, -0.1], requires_grad=True)
    kl = kl_penalty(logprobs, torch.tensor([-0.1, -1000.0]), kind)
    kl.sum().backward()
    assert kl.isfinite().all() and logprobs.grad is not None and logprobs.grad.isfinite().all()
    assert logprobs.grad[1] > 0  # the policy is pulled down where the reference would hardly ever go
    assert logprobs.grad[0] <= 0  # and never further away where the reference would


def test_k3_keeps_small_values_in_float32() -> None:
    for size in (1e-2, 1e-3, 1e-4, -1e-4):
        got = k3(torch.tensor(size)).item()
        assert got == pytest.approx(math.expm1(size) - size, rel=2e-2)


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="'k4' is unknown; expected k1, k2 or k3"):
        kl_penalty(torch.zeros(1), torch.zeros(1), "k4")


def test_mismatch_counts_only_the_mask() -> None:
    old = torch.tensor([-1.0, -2.0, float("-inf"), float("nan")])
    rollout = torch.tensor([-1.0 - math.log(2.0), -2.0 + math.log(2.0), float("-inf"), 0.0])
    metrics = mismatch_metrics(old, rollout, torch.tensor([True, True, False, False]))
    assert metrics["mismatch/abs_mean"].tolist() == pytest.approx([2 * math.log(2.0), 2.0], abs=1e-6)
    assert metrics["mismatch/kl_k1"].tolist() == pytest.approx([0.0, 2.0], abs=1e-6)  # -ln 2 + ln 2
    # r = 2 and r = 1/2: (2 - 1 - ln 2) + (1/2 - 1 + ln 2) = 1/2
    assert metrics["mismatch/kl"].tolist() == pytest.approx([0.5, 2.0], abs=1e-6)
