"""Losses: hand-computed numbers, loops, the authors' formulas, and invariance to packing and to masked garbage."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rl.algorithms.aggregation import AGGREGATIONS, token_weights
from megatron_rl.algorithms.methods import METHODS
from megatron_rl.algorithms.terms import sft
from megatron_rl.types import LossInputs
from tests.algorithms.losses_case import LENGTHS, PER_TOKEN, WEIGHTED, authors, by_loops

SHARED: dict[str, Any] = {"entropy_coef": 0.03, "ref_kl_coef": 0.2, "rollout_correction": {"cap": 1.1}}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("ppo_clip", {}),
    ("ppo_clip", {"eps_low": 0.1, "eps_high": 0.3, "dual_clip": 1.5, **SHARED, "ref_kl_estimator": "k1"}),
    ("clip_cov", {}),
    ("clip_cov", {"eps_low": 0.2, "eps_high": 0.2, **SHARED, "ref_kl_estimator": "k2"}),
    ("kl_cov", {}),
    ("kl_cov", {"kl_coef": 0.7, **SHARED}),
    ("gspo", {"eps_low": 0.1, "eps_high": 0.15}),
    ("gspo", {"eps_low": 0.1, "eps_high": 0.15, **SHARED}),
    ("cispo", {}),
    ("cispo", {"eps_low": 0.2, **SHARED}),
    ("forking", {**SHARED}),
    ("steer", {}),
    ("gaussian_cov", {"eps_high": 0.28, **SHARED}),
    ("entropy_advantage", {"alpha": 0.6, "kappa": 1.5, **SHARED}),
]


def run(name: str, inputs: LossInputs, **options: Any) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    """Loss sum, metrics, and the gradients of logprobs and entropy."""
    logprobs, entropy = (x.detach().clone().requires_grad_() for x in (inputs.logprobs, inputs.entropy))
    loss = METHODS[name].model_validate(options)
    outputs = loss(dataclasses.replace(inputs, logprobs=logprobs, entropy=entropy))
    grads = torch.autograd.grad(outputs.loss_sum, [logprobs, entropy], allow_unused=True)
    first, second = (torch.zeros_like(logprobs) if grad is None else grad for grad in grads)
    return outputs.loss_sum.detach(), outputs.metrics, first, second


def tokens(
    logprobs: list[float], old: list[float], advantages: list[float], selected: list[bool] | None = None, **more: Any
) -> LossInputs:
    """One sequence, all tokens counted with weight 1, float32."""
    zeros = torch.zeros(len(logprobs))
    values: dict[str, Any] = {
        "logprobs": torch.tensor(logprobs),
        "entropy": zeros,
        "old_logprobs": torch.tensor(old),
        "rollout_logprobs": torch.tensor(old),
        "ref_logprobs": None,
        "advantages": torch.tensor(advantages),
        "loss_mask": torch.ones(len(logprobs), dtype=torch.bool),
        "token_weights": torch.ones(len(logprobs)),
        "cu_seqlens": torch.tensor([0, len(logprobs)], dtype=torch.int32),
        "selected": None if selected is None else torch.tensor(selected),
    }
    return LossInputs(**{**values, **more})


def random_inputs(mode: str = "token_mean", seed: int = 0) -> tuple[LossInputs, int]:
    """Packed float64 inputs with ratios well outside the clip ranges, prompts masked, and the denominator."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(LENGTHS)

    def normal(scale: float) -> Tensor:
        return torch.randn(total, generator=generator, dtype=torch.float64) * scale

    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    mask = torch.rand(total, generator=generator) < 0.7
    mask[-LENGTHS[-1] :] = False
    weights, denominator = token_weights(mode, mask, cu_seqlens, constant_length=12)
    old = -normal(1.0).abs()
    inputs = LossInputs(
        logprobs=old + normal(0.4),
        entropy=normal(0.5).abs(),
        old_logprobs=old,
        rollout_logprobs=old + normal(0.2),
        ref_logprobs=old + normal(0.5),
        advantages=torch.cat([normal(1.0)[:1].expand(length) for length in LENGTHS]),
        loss_mask=mask,
        token_weights=weights.double(),
        cu_seqlens=cu_seqlens,
        selected=mask & (torch.rand(total, generator=generator) < 0.3),
        surrogate_weights=torch.rand(total, generator=generator, dtype=torch.float64) * 3,
    )
    return inputs, denominator


def mean(metric: Tensor) -> float:
    return (metric[0] / metric[1]).item()


def test_the_registry_is_the_config() -> None:
    assert {loss.model_fields["type"].default: loss for loss in METHODS.values()} == METHODS
    assert {name for name, _ in CASES} == set(METHODS)


# Hand-computed. log ratios: ln 1.5, ln 0.5, ln 1.1, ln 4 with advantages 2, -1, -1, -1 from old = -3.
RATIOS = [1.5, 0.5, 1.1, 4.0]
FOUR = tokens([-3 + math.log(r) for r in RATIOS], [-3.0] * 4, [2.0, -1.0, -1.0, -1.0], [True, False, True, False])


@pytest.mark.parametrize(
    ("name", "options", "loss", "grad"),
    [
        # clipped high, clipped low, inside, above but A < 0: -2 * 1.2 + 0.8 + 1.1 + 4
        ("ppo_clip", {}, 3.5, [0.0, 0.0, 1.1, 4.0]),
        # the last costs at most -A * 3
        ("ppo_clip", {"dual_clip": 3.0}, 2.5, [0.0, 0.0, 1.1, 0.0]),
        # bounds 0 and 2: nothing is cut by PPO; tokens 0 and 2 are selected and vanish: 0.5 + 4
        ("clip_cov", {}, 4.5, [0.0, 0.5, 0.0, 4.0]),
        # -2 * 1.5 + 0.5 + 1.1 + 4, plus 2 (ln 1.5 + ln 1.1) on the selected
        ("kl_cov", {"kl_coef": 2.0}, 2.6 + 2 * math.log(1.65), [-3.0 + 2, 0.5, 1.1 + 2, 4.0]),
        # weights 1.28, 0.5, 1.1, 1.28 without gradient, on -A logprobs: 6.6420093 - 1.8465736 - 3.1951588 - 2.0655432
        ("cispo", {}, -0.4652663, [-2.56, 0.5, 1.1, 1.28]),
    ],
)
def test_hand_computed(name: str, options: dict[str, Any], loss: float, grad: list[float]) -> None:
    got, _, got_grad, _ = run(name, FOUR, **options)
    assert got.item() == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(got_grad, torch.tensor(grad), rtol=1e-6, atol=1e-6)


def test_weights_and_shaped_advantages_hand_computed() -> None:
    entropy, weights = torch.tensor([0.5, 2.0, 0.1, 3.0]), torch.tensor([5.0, 0.5, 0.0, 2.0])
    inputs = dataclasses.replace(FOUR, entropy=entropy, surrogate_weights=weights, selected=None)
    # the clipped surrogates -2.4, 0.8, 1.1, 4 of `ppo_clip` above
    for name in WEIGHTED:
        loss, _, grad, _ = run(name, inputs, eps_high=0.2)
        assert loss.item() == pytest.approx(5 * -2.4 + 0.5 * 0.8 + 2 * 4, rel=1e-6)
        torch.testing.assert_close(grad, torch.tensor([0.0, 0.0, 0.0, 8.0]))
    # alpha H = 0.2, 0.8, 0.04, 1.2 against |A| / 2 = 1, 0.5, 0.5, 0.5: A becomes 2.2, -0.5, -0.96, -0.5
    loss, metrics, grad, entropy_grad = run("entropy_advantage", inputs)
    assert loss.item() == pytest.approx(-2.2 * 1.2 + 0.5 * 0.8 + 0.96 * 1.1 + 0.5 * 4, rel=1e-6)
    torch.testing.assert_close(grad, torch.tensor([0.0, 0.0, 0.96 * 1.1, 2.0]))
    assert not entropy_grad.any() and mean(metrics["loss/advantage_bonus"]) == pytest.approx(1.24 / 4, rel=1e-6)
    with pytest.raises(ValueError, match="SteerLoss.mark on the whole"):
        run("steer", FOUR)


def test_gspo_hand_computed() -> None:
    # one sequence, ratios 2, 1, 0.5 * e^0.3: mean log ratio 0.1, so s = e^0.1
    log_ratios = [math.log(2.0), 0.0, math.log(0.5) + 0.3]
    weights = torch.full((3,), 1 / 3)
    inputs = tokens([-2 + x for x in log_ratios], [-2.0] * 3, [1.5] * 3, token_weights=weights)
    s = math.exp(0.1)
    loss, metrics, grad, _ = run("gspo", inputs, eps_low=0.2, eps_high=0.2)
    assert loss.item() == pytest.approx(-1.5 * s, rel=1e-6)
    torch.testing.assert_close(grad, torch.full((3,), -1.5 * s / 3))
    assert mean(metrics["loss/ratio"]) == pytest.approx(s, rel=1e-6)

    loss, metrics, grad, _ = run("gspo", inputs, eps_low=0.2, eps_high=0.05)
    assert loss.item() == pytest.approx(-1.5 * 1.05, rel=1e-6)
    assert torch.equal(grad, torch.zeros(3))
    assert metrics["loss/clip_fraction_high"].tolist() == [3.0, 3.0]


def test_shared_terms_hand_computed() -> None:
    """Importance weights scale the surrogate alone; entropy is subtracted, the reference KL added."""
    inputs = dataclasses.replace(
        tokens([-1.0, -1.0], [-1.0, -1.0], [1.0, -2.0], [True, False]),
        entropy=torch.tensor([0.5, 2.0]),
        rollout_logprobs=torch.tensor([-1.0 - math.log(4.0), -1.0 + math.log(2.0)]),
        ref_logprobs=torch.tensor([-1.0 - math.log(2.0), -1.0]),
        token_weights=torch.tensor([1.0, 0.25]),
    )
    # weights 3 (4 truncated) and 1/2; KL k3 0.1931472 (slope 1/2) and 0
    expected = (-1.0 * 3 - 0.1 * 0.5 + 0.2 * 0.1931472) + 0.25 * (2.0 * 0.5 - 0.1 * 2.0)
    for name in ("ppo_clip", "kl_cov"):
        loss, metrics, grad, entropy_grad = run(
            name, inputs, entropy_coef=0.1, ref_kl_coef=0.2, rollout_correction={"cap": 3.0}
        )
        assert loss.item() == pytest.approx(expected, rel=1e-6)
        torch.testing.assert_close(grad, torch.tensor([-3.0 + 0.2 * 0.5, 0.25 * 2.0 * 0.5]))
        torch.testing.assert_close(entropy_grad, torch.tensor([-0.1, -0.025]))
        assert mean(metrics["loss/is_weight"]) == pytest.approx(1.75)
        assert mean(metrics["loss/is_truncated_fraction"]) == 0.5
        assert mean(metrics["loss/policy"]) == pytest.approx((-3.0 + 1.0) / 2)
        assert mean(metrics["loss/entropy_bonus"]) == pytest.approx(0.125)
        assert mean(metrics["loss/ref_kl"]) == pytest.approx(0.1931472 / 2, rel=1e-6)


def test_metrics_hand_computed() -> None:
    _, metrics, _, _ = run("ppo_clip", FOUR, dual_clip=3.0)
    assert metrics["loss/clip_fraction_high"].tolist() == [1.0, 4.0]
    assert metrics["loss/clip_fraction_low"].tolist() == [1.0, 4.0]
    assert metrics["loss/dual_clip_fraction"].tolist() == [1.0, 4.0]
    assert mean(metrics["loss/ratio"]) == pytest.approx(sum(RATIOS) / 4, rel=1e-6)
    assert mean(metrics["loss/approx_kl"]) == pytest.approx(sum(r - 1 - math.log(r) for r in RATIOS) / 4, rel=1e-6)
    assert mean(metrics["loss/policy"]) == pytest.approx(2.5 / 4, rel=1e-6)
    _, metrics, _, _ = run("kl_cov", FOUR)
    assert metrics["loss/selected_fraction"].tolist() == [2.0, 4.0]
    assert metrics["loss/selected_abs_log_ratio"].tolist() == pytest.approx([math.log(1.65), 2.0], rel=1e-6)
    _, metrics, _, _ = run("cispo", FOUR, eps_low=0.2)
    assert metrics["loss/clip_fraction_high"].tolist() == [2.0, 4.0]
    assert metrics["loss/clip_fraction_low"].tolist() == [1.0, 4.0]


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_equals_loops(name: str, options: dict[str, Any], mode: str) -> None:
    for seed in range(5):
        inputs, _ = random_inputs(mode, seed)
        loss, _, grad, entropy_grad = run(name, inputs, **options)
        expected, expected_grad, expected_entropy_grad = by_loops(name, METHODS[name].model_validate(options), inputs)
        assert loss.item() == pytest.approx(expected, rel=1e-9)
        torch.testing.assert_close(grad, torch.tensor(expected_grad, dtype=torch.float64), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(entropy_grad, torch.tensor(expected_entropy_grad, dtype=torch.float64))


def test_gspo_is_the_sequence_objective() -> None:
    """With seq_mean_token_mean: value and gradient of `mean_i max(-A_i s_i, -A_i clip(s_i))` by plain autograd."""
    inputs, denominator = random_inputs("seq_mean_token_mean")
    logprobs = inputs.logprobs.clone().requires_grad_()
    objective = torch.zeros((), dtype=torch.float64)
    for part in torch.arange(sum(LENGTHS)).split(LENGTHS):
        keep = inputs.loss_mask[part]
        if keep.any():
            s = (logprobs[part] - inputs.old_logprobs[part])[keep].mean().exp()
            a = inputs.advantages[part[0]]
            objective = objective + torch.maximum(-a * s, -a * s.clamp(0.9, 1.15))
    (expected,) = torch.autograd.grad(objective / denominator, logprobs)
    loss, metrics, grad, _ = run("gspo", inputs, eps_low=0.1, eps_high=0.15)
    torch.testing.assert_close(loss / denominator, objective.detach() / denominator)
    torch.testing.assert_close(grad / denominator, expected)
    cut = metrics["loss/clip_fraction_low"][0] + metrics["loss/clip_fraction_high"][0]
    assert 0 < cut < inputs.loss_mask.sum()  # both branches were taken


@pytest.mark.parametrize(
    ("name", "options"), [("clip_cov", {}), ("clip_cov", {"eps_low": 0.2, "eps_high": 0.28}), ("kl_cov", {})]
)
def test_equals_the_authors(name: str, options: dict[str, Any]) -> None:
    inputs, denominator = random_inputs()
    logprobs = inputs.logprobs.clone().requires_grad_()
    expected = authors(name, inputs, logprobs, METHODS[name].model_validate(options))
    (expected_grad,) = torch.autograd.grad(expected, logprobs)
    loss, _, grad, _ = run(name, inputs, **options)
    torch.testing.assert_close(loss / denominator, expected.detach())
    torch.testing.assert_close(grad / denominator, expected_grad)


def take(inputs: LossInputs, sequences: list[int], mode: str) -> tuple[LossInputs, int, Tensor]:
    """Those sequences as a micro-batch of their own, its denominator, and where its tokens were."""
    bounds = inputs.cu_seqlens.tolist()
    where = torch.cat([torch.arange(bounds[i], bounds[i + 1]) for i in sequences])
    cu_seqlens = torch.tensor([0, *(LENGTHS[i] for i in sequences)]).cumsum(0).int()
    changes = {field: getattr(inputs, field)[where] for field in PER_TOKEN}
    weights, denominator = token_weights(mode, changes["loss_mask"], cu_seqlens, constant_length=12)
    changes.update(cu_seqlens=cu_seqlens, token_weights=weights.double())
    return dataclasses.replace(inputs, **changes), denominator, where


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_micro_batches_do_not_matter(name: str, options: dict[str, Any], mode: str) -> None:
    inputs, denominator = random_inputs(mode)
    loss, metrics, grad, _ = run(name, inputs, **options)
    parts_loss, parts_denominator, parts_grad = 0.0, 0, torch.zeros_like(grad)
    parts_metrics = {key: torch.zeros_like(value) for key, value in metrics.items()}
    for sequences in ([4, 0], [5], [2], [3, 1]):
        part, part_denominator, where = take(inputs, sequences, mode)
        part_loss, part_metrics, part_grad, _ = run(name, part, **options)
        parts_loss += part_loss.item()
        parts_denominator += part_denominator
        parts_grad[where] = part_grad
        for key, value in part_metrics.items():
            parts_metrics[key] += value
    assert parts_denominator == denominator
    assert parts_loss / parts_denominator == pytest.approx(loss.item() / denominator, rel=1e-12)
    torch.testing.assert_close(parts_grad, grad, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(parts_metrics, metrics, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_masked_garbage_changes_nothing(name: str, options: dict[str, Any], garbage: float) -> None:
    inputs, _ = random_inputs("seq_mean_token_mean")
    mask = inputs.loss_mask
    dirty: dict[str, Any] = {"selected": inputs.selected | ~mask if inputs.selected is not None else None}
    for field in ("logprobs", "entropy", "old_logprobs", "rollout_logprobs", "ref_logprobs", "advantages"):
        dirty[field] = torch.where(mask, getattr(inputs, field), garbage)
    dirty["token_weights"] = torch.where(mask, inputs.token_weights, garbage)
    loss, metrics, grad, entropy_grad = run(name, inputs, **options)
    got, got_metrics, got_grad, got_entropy_grad = run(name, dataclasses.replace(inputs, **dirty), **options)
    assert torch.equal(got, loss) and loss.isfinite()
    assert torch.equal(got_grad, grad) and torch.equal(got_entropy_grad, entropy_grad)
    assert torch.equal(grad[~mask], torch.zeros_like(grad[~mask]))
    assert all(torch.equal(got_metrics[key], value) for key, value in metrics.items())

    nothing = dataclasses.replace(inputs, **dirty, loss_mask=torch.zeros_like(mask))
    loss, metrics, grad, _ = run(name, nothing, **options)
    assert loss == 0 and not grad.any() and not any(value.any() for value in metrics.values())


@pytest.mark.parametrize(("name", "options"), CASES)
def test_huge_log_ratios_stay_finite(name: str, options: dict[str, Any]) -> None:
    far, near = [-500.0, -0.1] * 2, [-0.1, -500.0] * 2
    inputs = tokens(near, far, [1.0, 1.0, -1.0, -1.0], [True, True, False, False])
    others = {"ref_logprobs": torch.tensor(far), "rollout_logprobs": torch.tensor(near)}
    others["surrogate_weights"] = torch.full((4,), 2.0)
    inputs = dataclasses.replace(inputs, **others)  # type: ignore[arg-type]
    loss, metrics, grad, _ = run(name, inputs, **options)
    assert loss.isfinite() and grad.isfinite().all() and all(value.isfinite().all() for value in metrics.values())


@pytest.mark.parametrize(("name", "options"), CASES)
def test_no_value_is_read_on_the_host(name: str, options: dict[str, Any]) -> None:
    """Meta tensors have no values: `.item()`, a branch on a tensor or boolean indexing would raise."""
    inputs, _ = random_inputs()
    fields = {name: getattr(inputs, name).to("meta") for name in [*PER_TOKEN, "cu_seqlens"]}
    loss, metrics, _, _ = run(name, LossInputs(**fields), **options)
    assert loss.device.type == "meta" and all(value.shape == (2,) for value in metrics.values())


def test_refuses_missing_inputs() -> None:
    inputs, _ = random_inputs()
    for name in ("clip_cov", "kl_cov"):
        with pytest.raises(ValueError, match=f"{name} needs LossInputs.selected.*call .*.mark on the whole"):
            run(name, dataclasses.replace(inputs, selected=None))
    for name in METHODS:
        with pytest.raises(ValueError, match="ref_kl_coef=0.1 needs LossInputs.ref_logprobs"):
            run(name, dataclasses.replace(inputs, ref_logprobs=None), ref_kl_coef=0.1)


def test_sft_is_the_weighted_negative_log_likelihood() -> None:
    nan, mask = [math.nan] * 3, torch.tensor([True, True, False])
    inputs = tokens([-1.0, -2.0, math.nan], nan, nan, loss_mask=mask, token_weights=torch.tensor([1.0, 0.5, math.inf]))
    outputs = sft(dataclasses.replace(inputs, logprobs=inputs.logprobs.requires_grad_()))
    outputs.loss_sum.backward()
    assert outputs.loss_sum.item() == pytest.approx(2.0)
    assert inputs.logprobs.grad is not None and inputs.logprobs.grad.tolist() == [-1.0, -0.5, 0.0]
    assert outputs.metrics["loss/nll"].tolist() == [3.0, 2.0]
