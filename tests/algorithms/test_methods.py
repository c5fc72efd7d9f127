"""The newer losses against their authors' formulas, what Clip_B and Clip_V take out, and REPO-R's controller."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rl.algorithms.methods import METHODS
from megatron_rl.config import parse_config
from megatron_rl.errors import ConfigError
from megatron_rl.kernels.vocab_torch import shard_stats
from megatron_rl.parallel.vocab import merge_stacked
from megatron_rl.types import MiniBatch, TokenStats, TrainBatch
from tests.algorithms.covariance_case import ALONE, build, by_hand, numpy_view
from tests.algorithms.losses_case import LENGTHS, PER_TOKEN
from tests.algorithms.methods_case import AUTHORS
from tests.algorithms.test_losses import random_inputs, run
from tests.tiny import tiny_raw

ONE, FOUR = [list(range(8))], [[0, 4], [], [3, 1, 2], [7, 6, 5]]
# the recipes of the authors, or options under which both sides of every branch are taken
RECIPES: list[tuple[str, dict[str, Any]]] = [
    ("ce_gppo", {}),
    ("ce_gppo", {"beta_low": 0.5, "dual_clip": 1.6}),
    ("erc", {}),
    ("erc", {"base": "gppo", "eps_high": 0.2, "dual_clip": 1.6}),
    ("sapo", {}),
    ("gmpo", {}),
    ("dppo", {}),
    ("dppo", {"divergence": "kl", "bound_low": 0.05, "bound_high": 0.05, "max_ratio": 1.3}),
    ("dppo", {"anchor": "old", "max_ratio": 20}),
    ("vespo", {}),
    ("repo_r", {"zeta": 0.05}),
    ("repo_r", {"zeta": -0.9, "target_entropy": None}),
]


@pytest.mark.parametrize(("name", "options"), RECIPES)
def test_equals_the_authors(name: str, options: dict[str, Any]) -> None:
    config = METHODS[name].model_validate(options)
    taken: dict[str, torch.Tensor] = {}
    for seed in range(6):
        inputs, denominator = random_inputs(config.aggregation, seed)
        probable = {name: getattr(inputs, name).clamp_max(-0.01) for name in ("logprobs", "rollout_logprobs")}
        inputs = dataclasses.replace(inputs, **probable)
        rows = torch.arange(sum(LENGTHS)).split(LENGTHS)
        index = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        filled = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
        logprobs = inputs.logprobs.clone().requires_grad_()
        x = {field: getattr(inputs, field)[index] for field in PER_TOKEN if field != "loss_mask"}
        x |= {"mask": inputs.loss_mask[index] & filled, "logprobs": logprobs[index]}
        losses, mask = AUTHORS[name](x, config), x["mask"]
        if losses.ndim == 1:
            expected = losses.sum() / mask.any(1).sum()
        elif config.aggregation == "token_mean":
            expected = (losses * mask).sum() / mask.sum()
        else:
            expected = ((losses * mask).sum(1) / (mask.sum(1) + 1e-8)).sum() / mask.any(1).sum()
        (expected_grad,) = torch.autograd.grad(expected, logprobs)
        loss, metrics, grad, entropy_grad = run(name, inputs, **options)
        torch.testing.assert_close(loss / denominator, expected.detach(), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(grad / denominator, expected_grad, rtol=1e-6, atol=1e-9)
        assert not entropy_grad.any()
        taken |= {key: taken.get(key, 0) + value for key, value in metrics.items() if "clip_fraction" in key}
    if getattr(config, "dual_clip", None) == 10:  # no ratio is as large
        del taken["loss/dual_clip_fraction"]
    for key, value in taken.items():
        assert 0 < value[0] < value[1], key  # the branch was taken, and not always


# ---- Clip_B and Clip_V


def mark(batch: tuple[MiniBatch, list[TokenStats]], name: str, **options: Any) -> tuple[set[int], MiniBatch]:
    """The global ids of the tokens that leave the gradient, and the marked mini-batch."""
    loss = METHODS[name].model_validate(options)
    mini_batch = loss.mark(batch[0].with_stats(batch[1]), ALONE, seed=1, step=0)
    weights = mini_batch.cat("surrogate_weights")
    assert ((weights == 0) | (weights == 1)).all()
    return set(mini_batch.cat("token_ids_global")[weights == 0].tolist()), mini_batch


def authors_outliers(view: dict[str, np.ndarray], name: str, mu: float, max_frac: float) -> set[int]:
    """`clipb_advantage.py` and `clipv_advantage.py` on one flat batch, in numpy."""
    lp, h, negative = view["logprobs"], view["entropy"], view["advantages"] < 0
    s = np.exp(lp) * (h + lp)
    if name == "clip_b":
        dropped = negative & ~(s - s.mean() >= -(mu * s.std()))
    else:
        x = (h * view["sum_p2"] + view["sum_p2_logp"]) - s
        dropped = negative & ~(x <= mu * x.std())
        most = max(int(max_frac * len(x)), 1)
        if dropped.sum() > most:
            keep = np.argsort(np.where(dropped, -x, np.inf), kind="stable")[:most]
            dropped = np.isin(np.arange(len(x)), keep)
    return set(view["token_ids_global"][dropped].tolist())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("clip_b", {"mu": 1.0}),
        ("clip_b", {"mu": 2.5}),
        ("clip_v", {"mu": 0.3, "max_fraction": 1.0}),
        ("clip_v", {"mu": 0.3, "max_fraction": 0.05}),
        ("clip_v", {"mu": 0.3}),
    ],
)
def test_takes_out_what_the_authors_do_in_any_packing(name: str, options: dict[str, Any]) -> None:
    for seed in range(6):
        batch = build(ONE, seed)
        expected = authors_outliers(numpy_view(batch), name, options["mu"], options.get("max_fraction", 1e-4))
        ids, mini_batch = mark(batch, name, **options)
        assert ids == expected and ids == mark(build(FOUR, seed), name, **options)[0]
        assert mini_batch.selection["weight/effective_fraction"] == pytest.approx(1 - len(ids) / 84)
        if name == "clip_v" and options.get("max_fraction") != 1.0:
            assert len(ids) == max(1, math.floor(options.get("max_fraction", 1e-4) * 84))


def test_outliers_by_hand() -> None:
    # S = p (H + log p): 9 tokens of p = 1/2, H = 1 have 0.1534; the last, p = 1/10 and H = 0.5, has -0.1803
    logp = [math.log(0.5)] * 9 + [math.log(0.1)]
    mini_batch, (stats,) = by_hand(logp, [-1.0] * 10)
    entropy = torch.tensor([1.0] * 9 + [0.5, 9e9, 9e9])
    zeros = torch.zeros(12)
    batch = mini_batch, [TokenStats(stats.logprobs, entropy, zeros, zeros)]
    # the mean is 0.1201, the standard deviation 0.1001: the last is 3.0003 of them below
    assert mark(batch, "clip_b", mu=2.9)[0] == {10} and mark(batch, "clip_b", mu=3.1)[0] == set()
    # D = -S: its own standard deviation is the same, the threshold counts from 0: 0.1803 / 0.1001 = 1.80
    assert mark(batch, "clip_v", mu=1.7)[0] == {10} and mark(batch, "clip_v", mu=1.9)[0] == set()
    positive = by_hand(logp, [1.0] * 10)[0], batch[1]
    assert mark(positive, "clip_b", mu=2.9)[0] == set() and mark(positive, "clip_v", mu=1.7)[0] == set()
    same = by_hand([-1.0] * 4, [-1.0] * 4)
    assert mark(same, "clip_b", mu=0.1)[0] == set()  # nothing stands out where nothing differs
    for name in ("clip_b", "clip_v"):
        ids, empty = mark(build([[], []]), name)
        assert ids == set() and dict(empty.selection) == {}


@pytest.mark.parametrize("widths", [(45,), (32, 13), (16, 16, 12, 1)], ids=str)
def test_clip_v_of_a_sharded_vocabulary_is_that_of_dense_float64(widths: tuple[int, ...]) -> None:
    """The discriminator's mean over the vocabulary comes from the statistics that the pass has anyway."""
    generator = torch.Generator().manual_seed(5)
    logits = 2 * torch.randn(300, 45, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    advantages = torch.randn(300, generator=generator).tolist()
    starts = np.cumsum([0, *widths[:-1]]).tolist()
    shards = [
        shard_stats(logits[:, a : a + n].contiguous(), labels - a, n, 0.8, True)
        for a, n in zip(starts, widths, strict=True)
    ]
    _, _, *merged = merge_stacked(torch.stack(shards), 0.8)
    padded = [torch.cat([value.float(), torch.full((2,), 1e30)]) for value in merged]
    batch = by_hand(merged[0].tolist(), advantages)[0], [TokenStats(*padded)]

    logp = (logits.double() / 0.8).log_softmax(1)
    p, entropy = logp.exp(), -(logp.exp() * logp).sum(1)
    every = p * (entropy[:, None] + logp)  # S of each token of the vocabulary
    d = (p * every).sum(1) - every.gather(1, labels[:, None])[:, 0]
    out = (torch.tensor(advantages) < 0) & (d > 1.5 * d.std(correction=0))
    ids, _ = mark(batch, "clip_v", mu=1.5, max_fraction=1.0)
    assert ids == set((out.nonzero()[:, 0] + 1).tolist()) and 3 < len(ids) < 60


# ---- REPO-R's controller


def entropy_step(value: float) -> TrainBatch:
    """A step whose tokens all have this entropy."""
    mini_batch, (stats,) = by_hand([-1.0] * 4, [1.0] * 4)
    entropy = torch.full_like(stats.entropy, value)
    return TrainBatch(0, (mini_batch.with_stats([TokenStats(stats.logprobs, entropy)]),))


def test_zeta_doubles_and_halves_towards_the_target_by_hand() -> None:
    loss: Any = METHODS["repo_r"].model_validate({"zeta": 2e-4})
    state: dict[str, float] = {}
    zetas = []
    for entropy in [0.5, 0.4, 0.4, 0.5, 0.6, 0.6, 0.6, 0.6, 0.6, 0.4, 0.4, 0.4]:
        in_force, state = loss.follow(entropy_step(entropy), ALONE, state)
        assert in_force.zeta == state["zeta"] and state["target_entropy"] == 0.5 and loss.zeta == 2e-4
        zetas.append(in_force.zeta)
    # at the target; twice below it; at it; above it: halved to the least, then to the other side and away from 0; back
    assert zetas == pytest.approx([2e-4, 4e-4, 8e-4, 8e-4, 4e-4, 2e-4, 1e-4, -1e-4, -2e-4, -1e-4, 1e-4, 2e-4])
    high = [loss.next_zeta(z, 0.1, 0.5) for z in (0.03, 0.05, -0.05)]
    assert high == pytest.approx([0.05, 0.05, -0.025])
    assert loss.next_zeta(0.03, math.nan, 0.5) == 0.03 and loss.next_zeta(-0.2, 0.5, 0.5) == -0.05
    in_force, state = loss.follow(entropy_step(math.nan), ALONE, {})
    assert in_force.zeta == 2e-4 and state == {"zeta": 2e-4}


def test_the_controller_goes_on_from_its_saved_state_bit_for_bit() -> None:
    loss: Any = METHODS["repo_r"].model_validate({"zeta": 3e-3, "target_entropy": 0.3})
    entropies = [0.1, 0.2, 0.5, 0.7, 0.2, 0.1]

    def go(state: dict[str, float], values: list[float]) -> tuple[list[float], dict[str, float]]:
        zetas = []
        for value in values:
            in_force, state = loss.follow(entropy_step(value), ALONE, state)
            zetas.append(in_force.zeta)
        return zetas, state

    whole, end = go({}, entropies)
    first, saved = go({}, entropies[:3])
    second, other_end = go(json.loads(json.dumps(saved)), entropies[3:])
    assert first + second == whole and end == other_end and len(set(whole)) > 2
    constant = loss.model_copy(update={"target_entropy": None})
    assert constant.follow(entropy_step(0.1), ALONE, {}) == (constant, {})


def test_refuses_what_cannot_work() -> None:
    with pytest.raises(ValueError, match="zeta=0.2 is adapted between zeta_min=0.0001 and zeta_max=0.05"):
        METHODS["repo_r"].model_validate({"zeta": 0.2})
    METHODS["repo_r"].model_validate({"zeta": 0.2, "target_entropy": None})
    corrected = {"rollout_correction": {"cap": 2.0}}
    for name, options, algorithm, message in [
        ("dppo", corrected, {}, "loss.anchor=rollout with loss.rollout_correction.weights=truncate.*or anchor=old"),
        ("vespo", corrected | {"anchor": "rollout"}, {}, "set weights=none, or anchor=old"),
        ("erc", {}, {"old_logprobs": "rollout"}, "loss.type=erc with.*set old_logprobs=recompute"),
        ("repo_r", {}, {"old_logprobs": "rollout"}, "set target_entropy to null, or old_logprobs=recompute"),
    ]:
        raw = tiny_raw(Path(), loss={"type": name} | options, algorithm=algorithm)
        with pytest.raises(ConfigError, match=message):
            parse_config(raw)
    parse_config(tiny_raw(Path(), loss={"type": "vespo"} | corrected))
    erc = parse_config(tiny_raw(Path(), loss={"type": "erc"}, train={"prompts_per_minibatch": 4}))
    assert erc.minibatches_per_step == 1 and "ERC then does nothing" in next(erc.loss.notes(erc))
    with pytest.raises(ValueError, match=r"erc needs LossInputs.old_entropy \[T\], got None"):
        run("erc", dataclasses.replace(random_inputs()[0], old_entropy=None))
