"""Updates of the policy against a plain torch loop on the transformers model, and what an update must not do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_rl.algorithms.methods.ppo_clip import PpoClipLoss
from megatron_rl.config import Config
from megatron_rl.convert.hf import hub_views
from tests.policy.tiny import (
    hf_model,
    make_advantages,
    make_batch,
    make_config,
    make_rollouts,
    policy_of,
    same_bits,
    save,
    weights_of,
    worst,
)
from tests.worlds import Worlds

LOSS = PpoClipLoss(eps_low=0.2, eps_high=0.28)
# every value differs from the default; eps is large enough that a gradient of rounding noise stays small after Adam
OPTIMIZER = {
    "lr": 3e-3,
    "beta1": 0.8,
    "beta2": 0.95,
    "eps": 1e-5,
    "weight_decay": 0.1,
    "clip_grad": 2.3,
    "schedule": "linear",
}
UPDATES = 4
CASES: dict[str, dict[str, Any]] = {
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 12},
    "moe": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
    },
}
ONE_PROCESS: dict[str, dict[str, Any]] = {
    "one": {},
    "one, without distributed optimizer": {"parallel": {"distributed_optimizer": False}},
    "one, full recompute": {"model": {"recompute": "full"}},
    "one, recompute of a block": {"model": {"recompute": "full", "recompute_method": "block", "recompute_layers": 1}},
    "one, recompute of parts": {"model": {"recompute": "selective", "recompute_modules": ["core_attn", "mlp"]}},
    "one, recompute of experts": {"model": {"recompute": "selective", "recompute_modules": ["moe"]}},
}
TWO_PROCESSES: dict[str, dict[str, Any]] = {
    "dp2": {"parallel": {"world_size": 2}},
    "dp2, without distributed optimizer": {"parallel": {"world_size": 2, "distributed_optimizer": False}},
    "tp2": {"parallel": {"tp": 2}},
    "tp2, sp": {"parallel": {"tp": 2, "sp": True}},
    "pp2": {"parallel": {"pp": 2}},
    "tp2, full recompute": {"parallel": {"tp": 2, "sp": True}, "model": {"recompute": "full"}},
    "ep2": {"parallel": {"world_size": 2, "ep": 2}},
    "ep2, without distributed optimizer": {"parallel": {"world_size": 2, "ep": 2, "distributed_optimizer": False}},
    "tp2, sp, ep2": {"parallel": {"tp": 2, "sp": True, "ep": 2}},
}


def _is_run(case: str, layout: str) -> bool:
    if case == "moe":
        return layout in ("one", "one, recompute of experts", "tp2, sp") or "ep2" in layout
    return "ep2" not in layout and "experts" not in layout and (case == "qwen2" or "without" not in layout)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("updates")
    return {case: save(hf_model(**changes), root / case) for case, changes in CASES.items()}


def _config(folder: Path, changes: dict[str, Any], **more: Any) -> Config:
    sections = {"optimizer": OPTIMIZER} | changes
    for name, section in more.items():
        sections[name] = sections.get(name, {}) | section
    return make_config(folder, **sections)


def _reference(case: str) -> tuple[dict[str, Tensor], list[float], list[float]]:
    """Weights, gradient norms and learning rates of a loop that shares no code with the policy."""
    model, rollouts, advantages = hf_model(**CASES[case]), make_rollouts(), make_advantages()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    adam = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": OPTIMIZER["weight_decay"]}, {"params": others, "weight_decay": 0.0}],
        betas=(OPTIMIZER["beta1"], OPTIMIZER["beta2"]),
        eps=OPTIMIZER["eps"],
    )
    norms, rates = [], []
    for update in range(UPDATES):
        total, count = torch.zeros(()), 0
        for i in range(8 * update, 8 * update + 8):
            rollout, advantage = rollouts[i], advantages[i]
            logp = model(rollout.token_ids[None]).logits[0, :-1].log_softmax(-1)
            logp = logp.gather(1, rollout.token_ids[1:, None])[:, 0][rollout.sampled[1:]]
            ratio = (logp - rollout.rollout_logprobs[rollout.sampled]).exp()
            total = total - torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage).sum()
            count += len(logp)
        model.zero_grad()
        (total / count).backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        if norm > OPTIMIZER["clip_grad"]:
            for p in model.parameters():
                p.grad.mul_(OPTIMIZER["clip_grad"] / (norm + 1e-6))
        rates.append(OPTIMIZER["lr"] * (1 - update / 8))
        for group in adam.param_groups:
            group["lr"] = rates[-1]
        adam.step()
        norms.append(norm.item())
    return hub_views({name: p.detach() for name, p in model.named_parameters()}), norms, rates


def _update(policy: Any, mini_batch: Any) -> Any:

    return policy.update(mini_batch, LOSS)


def _train(configs: dict[Any, Config]) -> dict[Any, Any]:
    """Per config: the weights after one and after all updates, gradient norms, learning rates."""
    found = {}
    for key, config in configs.items():
        with policy_of(config) as policy:
            batch = make_batch(config, policy.groups)
            assert all(len(mini_batch.micro_batches) > 1 for mini_batch in batch.mini_batches)
            results, after_one = [], {}
            for mini_batch in batch.mini_batches:
                results.append(_update(policy, mini_batch))
                after_one = after_one or weights_of(policy)
            assert not any(result.skipped for result in results)
            norms, rates = [r.grad_norm for r in results], [r.learning_rate for r in results]
            found[key] = after_one, weights_of(policy), norms, rates
    return found


@pytest.fixture(scope="module")
def trained(worlds: Worlds, folders: dict[str, Path]) -> dict[Any, list[Any]]:
    """(case, layout) -> what each rank reports."""
    found: dict[Any, list[Any]] = {}
    for size, layouts in ((1, ONE_PROCESS), (2, TWO_PROCESSES)):
        configs = {
            (case, layout): _config(folder, changes)
            for case, folder in folders.items()
            for layout, changes in layouts.items()
            if _is_run(case, layout)
        }
        if size == 1:
            configs["bf16", "one"] = _config(folders["qwen2"], {"model": {"dtype": "bfloat16"}})
        ranks = worlds.run(size, _train, configs)
        found |= {key: [rank[key] for rank in ranks] for key in configs}
    return found


@pytest.mark.parametrize("case", CASES)
def test_four_updates_equal_plain_torch(trained: dict[Any, list[Any]], case: str) -> None:
    """Measured: weights within 3.5e-6 (they move by 1e-2), gradient norms 2e-6 relative."""
    weights, norms, rates = _reference(case)
    assert min(norms) < OPTIMIZER["clip_grad"] < max(norms), f"clipping must bite in some updates only: {norms}"
    moved = worst(weights, hub_views(dict(hf_model(**CASES[case]).named_parameters())))
    for (name, layout), ranks in trained.items():
        if name != case:
            continue
        for _, got, got_norms, got_rates in ranks:
            norm_error = max(abs(g / w - 1) for g, w in zip(got_norms, norms, strict=True))
            print(f"{case} {layout}: weights {worst(got, weights):.1e} of {moved:.1e}, norm {norm_error:.1e}")
            assert worst(got, weights) < 1e-5, layout
            assert norm_error < 1e-5, layout
            assert got_rates == pytest.approx(rates, rel=1e-12), layout


def test_recomputation_gives_the_same_bits(trained: dict[Any, list[Any]]) -> None:
    pairs = {name: name.split(", ")[0] for name in (*ONE_PROCESS, *TWO_PROCESSES) if "recompute" in name}
    assert len(pairs) == 5
    for recomputed, plain in (pairs | {"tp2, full recompute": "tp2, sp"}).items():
        case = "moe" if "experts" in recomputed else "qwen2"
        for a, b in zip(trained[case, plain], trained[case, recomputed], strict=True):
            assert same_bits(a[1], b[1]) and a[2] == b[2]


def test_bfloat16_follows_float32(trained: dict[Any, list[Any]]) -> None:
    """Adam's first update moves each weight by about lr whatever the gradient's size: only its sign can differ, and
    bfloat16 weights near 1 are 2^-7 apart."""
    first32, last32, norms32, _ = trained["qwen2", "one"][0]
    first16, last16, norms16, _ = trained["bf16", "one"][0]
    assert all(tensor.dtype == torch.bfloat16 and torch.isfinite(tensor).all() for tensor in last16.values())
    print(f"bf16: weights {worst(first16, first32):.1e} then {worst(last16, last32):.1e}, norms {norms16} {norms32}")
    assert norms16 == pytest.approx(norms32, rel=0.1)
    assert worst(first16, first32) < 2 * OPTIMIZER["lr"] + 2**-7


def _learning_rates(configs: list[Config]) -> list[list[float]]:
    found = []
    for config in configs:
        with policy_of(config, total_updates=6) as policy:
            mini_batch = make_batch(config, policy.groups).mini_batches[0]
            found.append([_update(policy, mini_batch).learning_rate for _ in range(8)])
    return found


def test_learning_rate_schedules(worlds: Worlds, folders: dict[str, Path]) -> None:
    """6 updates, 2 of warm-up. Megatron counts finished updates, so the first one runs at 0 (as in transformers)."""
    expected = {
        "constant": [0, 0.5, 1, 1, 1, 1, 1, 1],
        "linear": [0, 0.5, 1, 0.75, 0.5, 0.25, 0, 0],
        "cosine": [0, 0.5, *(0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(5)), 0],
    }
    configs = [
        _config(folders["qwen2"], {}, optimizer={"lr": 2.0, "schedule": schedule, "warmup_steps": 2, "clip_grad": 1e-9})
        for schedule in expected
    ]
    for got, want in zip(worlds.run(1, _learning_rates, configs)[0], expected.values(), strict=True):
        assert got == pytest.approx([2.0 * fraction for fraction in want], abs=1e-12)


def _poisoned(mini_batch: Any, value: float) -> Any:
    """One counted token of the first micro-batch has the advantage `value`."""
    advantages = [mb.advantages.clone() for mb in mini_batch.micro_batches]
    advantages[0][mini_batch.micro_batches[0].loss_mask.nonzero()[0]] = value
    return mini_batch.replace_each("advantages", advantages)


def _nonfinite(config: Config) -> dict[str, Any]:
    from megatron_rl.policy.policy import NonFiniteError

    found: dict[str, Any] = {}
    with policy_of(config) as policy:
        batch = make_batch(config, policy.groups)

        def bad(i: int) -> Any:  # on the last data-parallel rank alone
            is_last = policy.groups.dp_rank == policy.groups.dp_size - 1
            value = math.inf if i == 1 else math.nan
            return _poisoned(batch.mini_batches[i], value) if is_last else batch.mini_batches[i]

        _update(policy, batch.mini_batches[0])
        found["before"] = weights_of(policy)
        results = [_update(policy, bad(1)), _update(policy, bad(2))]
        found["after"], found["skipped"] = weights_of(policy), [r.skipped for r in results]
        found["norms"], found["rates"] = [r.grad_norm for r in results], [r.learning_rate for r in results]
        _update(policy, batch.mini_batches[1])
        found["next"] = weights_of(policy)
        try:
            for i in range(5):  # the good update began a new row
                found["raised_at"] = i
                _update(policy, bad(2))
        except NonFiniteError as error:
            found["error"] = str(error)
        found["at the end"] = weights_of(policy)
    with policy_of(config) as policy:
        for mini_batch in make_batch(config, policy.groups).mini_batches[:2]:
            _update(policy, mini_batch)
        found["never poisoned"] = weights_of(policy)
    return found


def _nonfinite_each(configs: list[Config]) -> list[dict[str, Any]]:
    return [_nonfinite(config) for config in configs]


def test_nonfinite_gradients_move_nothing_and_end_the_run(worlds: Worlds, folders: dict[str, Path]) -> None:
    layouts = [
        {"world_size": 2},
        {"world_size": 2, "distributed_optimizer": False},
        {"pp": 2},
        {"tp": 2},
    ]
    configs = [_config(folders["qwen2"], {}, parallel=p, train={"max_nonfinite_updates": 2}) for p in layouts]
    for rank in worlds.run(2, _nonfinite_each, configs):
        for parallel, found in zip(layouts, rank, strict=True):
            assert found["skipped"] == [True, True] and not any(map(math.isfinite, found["norms"])), parallel
            assert same_bits(found["before"], found["after"]), parallel
            # neither moments nor schedule took part
            assert found["rates"] == pytest.approx([OPTIMIZER["lr"] * 7 / 8] * 2), parallel
            assert same_bits(found["next"], found["never poisoned"]), parallel
            assert found["raised_at"] == 2, parallel  # two are allowed, the third ends the run
            assert "3 updates in a row" in found["error"] and "max_nonfinite_updates=2" in found["error"]
            assert "loss/policy" in found["error"] or parallel.get("world_size")  # the metric is of one rank under DP
            assert same_bits(found["next"], found["at the end"]), parallel


def _emptied(mini_batch: Any) -> Any:
    """As overlong filtering leaves a mini-batch in which every response was cut."""
    return type(mini_batch)(
        mini_batch.index,
        tuple(
            mb.replace(
                loss_mask=torch.zeros_like(mb.loss_mask),
                token_weights=torch.zeros_like(mb.token_weights),
                loss_denominator=0,
            )
            for mb in mini_batch.micro_batches
        ),
    )


def _without_tokens(config: Config) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with policy_of(config) as policy:
        first, second, third, _ = make_batch(config, policy.groups).mini_batches
        _update(policy, first)  # so that there is momentum
        found["before"] = weights_of(policy)
        results = [_update(policy, _emptied(second)) for _ in range(2)]
        found["after"], found["skipped"] = weights_of(policy), [r.skipped for r in results]
        found["norms"] = [r.grad_norm for r in results]
        zero_advantages = [torch.zeros_like(mb.advantages) for mb in third.micro_batches]
        result = _update(policy, third.replace_each("advantages", zero_advantages))
        found["zero advantages"] = result.skipped, result.learning_rate, weights_of(policy)
        result = _update(policy, _emptied(third) if policy.groups.dp_rank else third)
        found["half empty"] = result.skipped, result.grad_norm
    return found


def test_a_mini_batch_without_tokens_is_no_update(worlds: Worlds, folders: dict[str, Path]) -> None:
    """Its mean is 0/0. A zero gradient would still let Adam's momentum and the weight decay move the weights."""
    config = _config(folders["qwen2"], {"parallel": {"world_size": 2}}, train={"max_nonfinite_updates": 0})
    for found in worlds.run(2, _without_tokens, config):
        assert found["skipped"] == [True, True] and found["norms"] == [0.0, 0.0]
        assert same_bits(found["before"], found["after"])
        # tokens whose advantages are all 0 are a sample like any other: the optimizer steps
        skipped, learning_rate, weights = found["zero advantages"]
        assert not skipped and not same_bits(weights, found["after"])
        assert learning_rate == pytest.approx(OPTIMIZER["lr"] * 7 / 8)  # empty updates do not advance the schedule
        assert not found["half empty"][0] and found["half empty"][1] > 0


def _reference_policy(configs: list[Config]) -> list[dict[str, Any]]:
    found = []
    for config in configs:
        with policy_of(config) as policy:
            batch = make_batch(config, policy.groups)
            mini_batch = batch.mini_batches[3]
            try:
                policy.ref_logprobs([mini_batch])
            except RuntimeError as error:
                message = str(error)
            policy.keep_reference()
            at_start = [s.logprobs for s in policy.stats(mini_batch)]
            for other in batch.mini_batches[:2]:
                _update(policy, other)
            moved, before = [s.logprobs for s in policy.stats(mini_batch)], weights_of(policy)
            reference = policy.ref_logprobs([mini_batch])[0]
            after = weights_of(policy)
            _update(policy, batch.mini_batches[2])
            again, last = policy.ref_logprobs([mini_batch])[0], weights_of(policy)
        with policy_of(config) as policy:
            for other in batch.mini_batches[:3]:
                _update(policy, other)
            undisturbed = weights_of(policy)
        found.append(
            {
                "message": message,
                "same": [torch.equal(a, b) for a, b in zip(at_start + at_start, reference + again, strict=True)],
                "moved": max((a - b).abs().max().item() for a, b in zip(at_start, moved, strict=True)),
                "restored": same_bits(before, after),
                "undisturbed": same_bits(last, undisturbed),
            }
        )
    return found


def test_reference_logprobs_stay_and_leave_the_weights_alone(worlds: Worlds, folders: dict[str, Path]) -> None:
    layouts: list[dict[str, Any]] = [
        {"parallel": {"pp": 2}},
        {"parallel": {"world_size": 2}},
        {"parallel": {"tp": 2}, "model": {"dtype": "bfloat16"}},
    ]
    configs = [_config(folders["qwen2"], changes) for changes in layouts]
    for rank in worlds.run(2, _reference_policy, configs):
        for found in rank:
            assert "keep_reference" in found["message"]
            assert found["moved"] > 1e-3
            assert all(found["same"]) and found["restored"] and found["undisturbed"]


def _begun_by_stats(configs: list[Config]) -> list[dict[str, Any]]:
    from megatron_rl.policy import policy as module

    found = []
    for config in configs:
        for ahead in (False, True):
            with policy_of(config) as policy:
                batch = make_batch(config, policy.groups)
                first, second = batch.mini_batches[:2]
                assert len(first.micro_batches) == 1
                with mock.patch.object(module, "run_schedule", wraps=module.run_schedule) as schedule:
                    stats = [policy.stats(first, keep=ahead, with_sum_p2=True)[0]]
                    # the update sees the same tokens with more known about them
                    first = first.replace_each("old_logprobs", [stats[0].logprobs])
                    results = [_update(policy, first), _update(policy, first)]
                    # of another mini-batch than the next update's: nothing to begin with
                    stats += policy.stats(second, keep=ahead)
                    results.append(_update(policy, batch.mini_batches[2]))
                    stats += policy.stats(second)
                begun = [call.kwargs.get("output") is not None for call in schedule.call_args_list]
                found.append(
                    {
                        "begun": begun,
                        "stats": [s.logprobs for s in stats],
                        "graph": any(s.logprobs.requires_grad for s in stats),
                        "norms": [r.grad_norm for r in results],
                        "weights": weights_of(policy),
                    }
                )
    return found


def test_an_update_begins_with_the_pass_of_its_statistics(worlds: Worlds, folders: dict[str, Path]) -> None:
    """Once, on one pipeline stage, and the bits are those of a pass of its own."""
    one = {"train": {"micro_batch_tokens": 4096}}
    layouts: list[dict[str, Any]] = [
        {"parallel": {"tp": 2}},
        {"parallel": {"world_size": 2}},
        {"parallel": {"world_size": 2}, "model": {"recompute": "full"}},
        {"parallel": {"tp": 2, "sp": True}, "model": {"fused_linear_stats": "on"}},
        {"parallel": {"pp": 2}},
    ]
    configs = [_config(folders["qwen2"], {**changes, **one}) for changes in layouts]
    for rank in worlds.run(2, _begun_by_stats, configs):
        for layout, plain, ahead in zip(layouts, rank[::2], rank[1::2], strict=True):
            staged = "pp" in layout["parallel"]
            assert ahead["begun"] == [False, not staged, *[False] * 4] and not any(plain["begun"])
            assert ahead["norms"] == plain["norms"] and same_bits(ahead["weights"], plain["weights"])
            assert all(torch.equal(a, b) for a, b in zip(ahead["stats"], plain["stats"], strict=True))
            assert not ahead["graph"]
