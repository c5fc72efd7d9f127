"""Gradients as vectors over the world: Megatron's own norm, equal products on every layout, and the entropy's slope."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_rl.algorithms.methods.forking import ForkingLoss
from megatron_rl.algorithms.methods.kl_cov import KlCovLoss
from megatron_rl.algorithms.methods.ppo_clip import PpoClipLoss
from megatron_rl.lab.commands import default_methods
from megatron_rl.types import TokenStats, TrainBatch
from tests.policy.tiny import hf_model, make_batch, make_config, policy_of, same_bits, save, weights_of
from tests.worlds import Worlds

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {"world_size": 2}),
    "dp2, without distributed optimizer": (2, {"world_size": 2, "distributed_optimizer": False}),
    "tp2, sp": (2, {"tp": 2, "sp": True}),
    "pp2, without distributed optimizer": (2, {"pp": 2, "distributed_optimizer": False}),
}
GAUSS = (0.2113249, 0.7886751)
LONG = 0.01  # a learning rate with which the entropy bends along the way
SGD_LIKE = {"lr": 1e-3, "eps": 1.0, "clip_grad": 0.0}


def _measure(config: Any) -> dict[str, Any]:
    """Products, a step's tangent and realised entropy change, and what `compare` says of all methods."""
    from megatron_rl.algorithms.control import LossController
    from megatron_rl.lab.compare import compare
    from megatron_rl.lab.shadow import _loss
    from megatron_rl.parallel.reduce import Reducer
    from megatron_rl.policy.gradients import EntropyTangent, gradient, inner

    with policy_of(config) as policy:
        ranks = Reducer(policy.groups.dp_cp)
        mini_batch = make_batch(config, policy.groups).mini_batches[0]
        before = weights_of(policy)
        stats = policy.stats(mini_batch, with_sum_p2=True)
        clipped = gradient(policy, mini_batch, PpoClipLoss())
        wide = gradient(policy, mini_batch, PpoClipLoss(eps_low=1, eps_high=100))
        products = [inner(policy, a, b) for a, b in ((clipped, clipped), (clipped, wide), (wide, wide))]
        batch = TrainBatch(0, (mini_batch.with_stats(stats),))
        stated = {name: _loss(name, raw) for name, raw in default_methods(PpoClipLoss()).items()}
        methods = {name: LossController(loss, ranks).next_loss(batch) for name, loss in stated.items()}
        found = compare(policy, batch.mini_batches[0], methods, ranks, seed=1, step=0)
        assert same_bits(weights_of(policy), before)
        steps = []
        for learning_rate in (SGD_LIKE["lr"], LONG):
            begin, before = policy.copy_weights(), _mean(mini_batch, policy.stats(mini_batch), ranks)
            tangent = EntropyTangent(policy, mini_batch, start=True, way=True)
            policy.set_learning_rate(learning_rate)
            norm = policy.update(mini_batch, PpoClipLoss()).grad_norm
            end, after = policy.copy_weights(), _mean(mini_batch, policy.stats(mini_batch), ranks)
            changes = tangent.changes()
            assert all(map(torch.equal, policy.copy_weights(), end))
            near = []
            for place in (point + side for point in GAUSS for side in (-0.02, 0.02)):
                with policy.at([torch.lerp(*ends, place) for ends in zip(begin, end, strict=True)]):
                    near.append(_mean(mini_batch, policy.stats(mini_batch), ranks))
            slope = (near[1] - near[0] + near[3] - near[2]) / 0.04 / 2
            steps.append({"norm": norm, "change": after - before, "slope": slope} | changes)
        return {"products": products, "steps": steps, "compared": found}


def _mean(mini_batch: Any, stats: list[TokenStats], ranks: Any) -> float:
    entropy = torch.cat([s.entropy[m.loss_mask] for s, m in zip(stats, mini_batch.micro_batches, strict=True)]).double()
    total, count = ranks.sum(torch.stack([entropy.sum(), torch.tensor(float(len(entropy)), dtype=torch.float64)]))
    return float(total / count)


@pytest.fixture(scope="module")
def measured(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = save(hf_model(tie_word_embeddings=True), tmp_path_factory.mktemp("gradients"))
    found = {}
    for name, (size, parallel) in LAYOUTS.items():
        config = make_config(folder, parallel=parallel, optimizer=SGD_LIKE)
        found[name] = worlds.run(size, _measure, config)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_products_do_not_depend_on_the_layout(measured: dict[str, list[dict[str, Any]]], layout: str) -> None:
    expected = measured["one"][0]
    for got in measured[layout]:
        assert got["products"] == pytest.approx(expected["products"], rel=1e-4)
        assert got["steps"][0]["norm"] ** 2 == pytest.approx(got["products"][0], rel=1e-5)  # Megatron's own
        for step, same in zip(got["steps"], expected["steps"], strict=True):
            assert step == pytest.approx(same, rel=2e-4, abs=2e-6)
        for name, row in expected["compared"]["methods"].items():
            assert got["compared"]["methods"][name] == pytest.approx(row, rel=1e-3, abs=1e-6), name
        for table in ("cosine", "overlap"):
            for a, b in zip(got["compared"][table], expected["compared"][table], strict=True):
                assert [x is None for x in a] == [x is None for x in b]
                assert [x or 0 for x in a] == pytest.approx([x or 0 for x in b], abs=1e-4)


def test_the_tangent_is_the_change_of_a_small_step(measured: dict[str, list[dict[str, Any]]]) -> None:
    step, _ = measured["one"][0]["steps"]
    assert abs(step["change"]) > 1e-5
    assert step["entropy/first_order_change"] == pytest.approx(step["change"], rel=0.03)


def test_the_gradient_on_the_way_tells_the_change_of_a_long_step(measured: dict[str, list[dict[str, Any]]]) -> None:
    _, step = measured["one"][0]["steps"]
    assert step["entropy/tangent_change"] == pytest.approx(step["slope"], rel=1e-3)  # a difference of forward passes
    assert abs(step["entropy/first_order_change"] - step["change"]) > 0.2 * abs(step["change"])
    assert step["entropy/tangent_change"] == pytest.approx(step["change"], rel=2e-3)


def test_what_the_comparison_says(measured: dict[str, list[dict[str, Any]]]) -> None:
    """Off-policy: ratios are spread, so clipping, selection and weights all bite."""
    found = measured["one"][0]["compared"]
    rows, names = found["methods"], list(found["methods"])
    tokens = found["tokens"]
    assert names == list(default_methods(PpoClipLoss())) and rows["kl_cov"]["restrained"] >= int(0.1 * tokens)
    assert 0 < rows["clip_higher"]["restrained"] <= rows["grpo"]["restrained"] < tokens
    kept = rows["forking"]["weight/effective_fraction"]
    assert kept == pytest.approx(0.2, abs=1 / tokens) and rows["forking"]["restrained"] >= tokens * (1 - kept) - 1
    for i in range(len(names)):
        assert found["cosine"][i][i] == pytest.approx(1) and found["overlap"][i][i] in (1, None)
    grpo, cispo = names.index("grpo"), names.index("cispo")
    assert -1 < found["cosine"][grpo][cispo] < 0.9999
    # the bonus raises the entropy along its gradient
    assert rows["adaptive_entropy"]["entropy_slope"] > rows["grpo"]["entropy_slope"]


def test_default_methods_are_configs() -> None:
    from megatron_rl.lab.shadow import _loss

    losses = {name: _loss(name, raw) for name, raw in default_methods(PpoClipLoss()).items()}
    assert isinstance(losses["forking"], ForkingLoss) and isinstance(losses["kl_cov"], KlCovLoss)
