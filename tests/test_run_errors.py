"""Bad input, rewards and gradients: the same clear error on every rank, or a counted skip; never a hang."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_rl.config import parse_config
from tests.tiny import errors_of_each, measured, rows_of, tiny_raw, train_each
from tests.worlds import Worlds

LIMIT = 280.0  # seconds a world may take: on a machine that does other things too, ranks wait for each other
TRAIN = {"prompts_per_step": 4, "prompts_per_minibatch": 2, "micro_batch_tokens": 96}


def always_raises(response: str, answer: str) -> float:
    raise ZeroDivisionError("graders cannot divide by zero")


def never_a_number(response: str, answer: str) -> float:
    return float("nan")


def seldom_raises(response: str, answer: str) -> float:
    """Raises on the responses that start with a 7, about one in twenty of an untrained policy."""
    if response.startswith("7"):
        raise ValueError("unlucky")
    return float(len(response) > 9)


def always_wrong(response: str, answer: str) -> float:
    return 0.0


EIGHT_UPDATES = {"num_steps": 2, "prompts_per_step": 8, "prompts_per_minibatch": 1, "micro_batch_tokens": 96}

# name -> (sections, the error, parts of its message)
FAULTS: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "long countdown prompt": (
        {"data": {"max_prompt_tokens": 5}},
        "DataError",
        ["has 9 tokens, data.max_prompt_tokens=5; raise that limit"],
    ),
    "empty file": (
        {"data": {"type": "jsonl", "train_path": "{folder}/empty.jsonl", "tokenizer": "{folder}/tokenizer"}},
        "DataError",
        ["empty.jsonl: holds no problem", "one JSON object per line"],
    ),
    "long problem": (
        {"data": {"type": "jsonl", "train_path": "{folder}/long.jsonl", "tokenizer": "{folder}/tokenizer"}},
        "DataError",
        ["long.jsonl, line 2: the prompt has 19 tokens, data.max_prompt_tokens=16", "data.overlong_prompts=drop"],
    ),
    "no such module": (
        {"reward": {"function": "nonesuch:score"}},
        "RewardError",
        ["importing nonesuch failed with ModuleNotFoundError", "PYTHONPATH"],
    ),
    "no such function": (
        {"reward": {"function": "tests.tiny:mostly_digit"}},
        "RewardError",
        ["no 'mostly_digit'; did you mean 'mostly_digits'?"],
    ),
    "reward raises": (
        {"reward": {"function": "tests.test_run_errors:always_raises"}},
        "RewardError",
        ["failed on 16 of 16 responses", "reward.max_failures=0.1", "ZeroDivisionError: graders cannot divide by zero"],
    ),
    "reward is NaN": (
        {"reward": {"function": "tests.test_run_errors:never_a_number"}},
        "RewardError",
        ["failed on 16 of 16 responses", "returned nan (float), expected a finite number"],
    ),
    "no group differs": (
        {
            "reward": {"function": "tests.test_run_errors:always_wrong"},
            "algorithm": {"dynamic_sampling": {"enabled": True, "max_batches": 3}},
        },
        "CollectError",
        ["kept 0 of 12 groups", "all wrong 1.000", "max_batches (3)"],
    ),
    "too few prompts to refill": (
        {
            "reward": {"function": "tests.test_run_errors:always_wrong"},
            "algorithm": {"dynamic_sampling": {"enabled": True, "max_batches": 99}},
        },
        "DataError",
        ["1 prompts are wanted, but of the data set's 64 only 0 have not been drawn", "dynamic_sampling.max_batches"],
    ),
    "exploding update": (
        {"optimizer": {"lr": 1e30, "clip_grad": 0.0}, "train": EIGHT_UPDATES},
        "NonFiniteError",
        ["in 4 updates in a row", "train.max_nonfinite_updates=3", "optimizer.lr"],
    ),
}


@pytest.fixture(scope="module")
def faults(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[str, bool, str]]]:
    """What each of FAULTS raises on ranks 0 and 1, in one world: had one rank hung, this would time out."""
    from megatron_rl.data.tokenizer import build_tokenizer

    folder = tmp_path_factory.mktemp("faults")
    build_tokenizer(parse_config(tiny_raw(folder))).save_pretrained(folder / "tokenizer")
    (folder / "empty.jsonl").write_text("\n\n")
    problems = ["1+1=", "1+2+3+4+5+6+7+8+9+="]
    (folder / "long.jsonl").write_text("\n".join(json.dumps({"problem": p, "answer": "2"}) for p in problems))
    raws = []
    for name, (sections, _, _) in FAULTS.items():
        raw = tiny_raw(folder, name.replace(" ", "_"), **sections)
        if raw["data"]["type"] == "jsonl":
            paths = {key: raw["data"][key].format(folder=folder) for key in ("train_path", "tokenizer")}
            raw["data"] = {"type": "jsonl", "max_prompt_tokens": 16, **paths}
            raw["model"] = {"hf_config": raw["model"]["hf_config"] | {"vocab_size": 21}}
        raws.append(raw)
    ranks = worlds.run(2, errors_of_each, raws, timeout=LIMIT)
    return {name: [found[i] for found in ranks] for i, name in enumerate(FAULTS)}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_the_same_clear_error_on_every_rank(
    faults: dict[str, list[tuple[str, bool, str]]], name: str
) -> None:
    _, error, parts = FAULTS[name]
    for kind, for_the_user, message in faults[name]:
        assert (kind, for_the_user) == (error, True), message
        for part in parts:
            assert part in message


def test_gradings_that_seldom_fail_are_counted(worlds: Worlds, tmp_path: Path) -> None:
    raw = tiny_raw(
        tmp_path,
        reward={"function": "tests.test_run_errors:seldom_raises", "max_failures": 0.5},
        rollout={"samples_per_prompt": 8},
        logging={"samples_per_step": 999},
    )
    worlds.run(2, train_each, [raw], timeout=LIMIT)
    samples = rows_of(raw, "samples.jsonl")
    for step, row in enumerate(rows_of(raw)):
        of_step = [sample for sample in samples if sample["step"] == step]
        unlucky = [sample for sample in of_step if sample["response"].startswith("7")]
        assert len(of_step) == 32 and row["reward/failed_fraction"] == len(unlucky) / 32
        assert all(sample["score"] == 0 for sample in unlucky)
    assert any(row["reward/failed_fraction"] > 0 for row in rows_of(raw))


def _train_with_poison(raws: list[dict[str, Any]], poisoned: range) -> list[dict[str, Any]]:
    """The losses of the micro-batches with these numbers, over all runs, become infinite."""
    from megatron_rl.policy.policy import MegatronPolicy

    calls, update = iter(range(10**9)), MegatronPolicy.update

    def poisoned_update(policy: Any, mini_batch: Any, loss: Any, *spans: Any) -> Any:
        def poisoned_loss(inputs: Any) -> Any:
            outputs = loss(inputs)
            if next(calls) in poisoned:
                object.__setattr__(outputs, "loss_sum", outputs.loss_sum * torch.inf)
            return outputs

        return update(policy, mini_batch, poisoned_loss, *spans)

    with mock.patch.object(MegatronPolicy, "update", poisoned_update):
        return train_each(raws)


def test_a_non_finite_loss_is_a_counted_skip(worlds: Worlds, tmp_path: Path) -> None:
    """One micro-batch an update; updates 2 and 3, those of step 1, are poisoned: as if the run had ended at step 0."""
    train = TRAIN | {"micro_batch_tokens": 512, "save_final": False}
    poisoned, short = (
        tiny_raw(tmp_path, name, train=train | {"num_steps": steps}) for name, steps in (("poisoned", 2), ("short", 1))
    )
    weights = worlds.run(2, _train_with_poison, [poisoned, short], range(2, 4), timeout=LIMIT)[0]
    rows = rows_of(poisoned)
    assert [row["optimizer/skipped_fraction"] for row in rows] == [0.0, 1.0]
    assert rows[1]["optimizer/grad_norm"] is None and "optimizer/grad_norm" in rows[1]["non_finite"]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    assert measured(rows[0]) == measured(rows_of(short)[0])
