"""The host's part of a step on one rank, with stand-ins for the engine, the policy and the other ranks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rl.config import parse_config
from megatron_rl.errors import UserError
from megatron_rl.packing import Layout
from megatron_rl.rehearse import host
from megatron_rl.rehearse.host import REST, STAND_INS, Crowd, HostBook, rehearse_host
from tests.tiny import measured, rows_of, tiny_raw, trained
from tests.worlds import Worlds

VOCABULARY = 22  # of the countdown game


def rehearsed(folder: Path, rank: int = 0, **sections: Any) -> HostBook:
    """A step of 4 prompts x 4 samples; the parts of `sections` are the config's."""
    raw = tiny_raw(folder, **{"parallel": {"tp": 1}, "logging": {"samples_per_step": 3}, **sections})
    return rehearse_host(parse_config(raw), rank)


def train_one_step(raw: dict[str, Any]) -> None:
    with trained(raw):
        pass


def test_a_rehearsed_step_reports_what_a_real_one_does(worlds: Worlds, tmp_path: Path) -> None:
    sections = {"loss": {"type": "kl_cov", "select_fraction": 0.1}, "train": {"num_steps": 1, "eval_every": 0}}
    raw = tiny_raw(tmp_path, **sections, parallel={"tp": 1})
    worlds.run(1, train_one_step, raw, timeout=240)  # a worker's first import of Megatron on a busy machine
    (row,) = rows_of(raw)
    assert measured(row).keys() - {"step"} == measured(rehearsed(tmp_path, **sections).metrics).keys()


def test_phases_sum_to_the_step(tmp_path: Path) -> None:
    book = rehearsed(tmp_path, train={"prompts_per_step": 64, "prompts_per_minibatch": 32})
    seconds = {name: cost.seconds for name, cost in book.phases.items()}
    # a clock of their own: the run's timers, which end before the row is written
    assert sum(seconds.values()) - seconds["log"] == pytest.approx(book.metrics["time/total"], rel=0.1, abs=0.05)
    for name in ("rollout", "pack", "select", "update", "log"):
        assert 0 < seconds[name] <= book.metrics.get(f"time/{name}", 60), name
    assert seconds["metrics"] + seconds["ledger"] <= book.metrics["time/metrics"]
    assert seconds[REST] < sum(seconds.values()) / 2
    assert [row[0] for row in book.rows()] == ["phase", *book.phases] and [*book.phases][-1] == STAND_INS
    assert json.loads(json.dumps(dataclasses.asdict(book)))["phases"].keys() == book.phases.keys() and book.left_out


LAYOUTS: list[dict[str, Any]] = [
    {"tp": 1},
    {"world_size": 2},
    {"world_size": 8, "tp": 2},  # ranks without a whole group of answers
    {"world_size": 4, "tp": 1, "cp": 2},
    {"world_size": 8, "tp": 2, "pp": 2, "sp": True},
]


@pytest.mark.parametrize("parallel", LAYOUTS, ids=lambda layout: "-".join(f"{k}{v}" for k, v in layout.items()))
def test_all_answers_come_through_in_every_layout(tmp_path: Path, parallel: dict[str, Any]) -> None:
    """What does not depend on drawn statistics is the same, whichever rank is rehearsed, and the ranks that hold
    different tokens have all of them together."""
    alone = rehearsed(tmp_path).metrics
    config = parse_config(tiny_raw(tmp_path, parallel=parallel))
    books = [rehearsed(tmp_path, rank, parallel=parallel) for rank in range(config.parallel.processes)]
    facts = [name for name in alone if name.startswith(("reward/", "response/", "sampling/"))]
    for book in books:
        for name in [*facts, "batch/sequence_tokens"]:
            assert book.metrics[name] == alone[name], name
    tokens = sum(book.metrics["packing/tokens"] for book in books)
    repeated = config.parallel.tp * config.parallel.pp  # ranks with the same tokens
    assert tokens == repeated * alone["batch/sequence_tokens"] == repeated * alone["packing/tokens"]


def test_a_broken_stand_in_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parallel, right = {"world_size": 2, "tp": 1}, host._Others.in_world

    def without_tokens(self: Any, value: Any) -> list[Any]:
        return [[] for _ in right(self, value)] if isinstance(value, list) else right(self, value)

    def of_the_wrong_rank(self: Any, value: Any) -> list[Any]:
        return right(self, value)[::-1] if isinstance(value, tuple) else right(self, value)

    for wrong, message in ((without_tokens, "no rank holds the tokens"), (of_the_wrong_rank, "was answered twice")):
        monkeypatch.setattr(host._Others, "in_world", wrong)
        with pytest.raises(RuntimeError, match=message):
            rehearsed(tmp_path, parallel=parallel)


def test_the_books_grow_with_the_batch(tmp_path: Path) -> None:
    small, large = (
        rehearsed(tmp_path, train={"prompts_per_step": n, "prompts_per_minibatch": n // 2}) for n in (4, 128)
    )
    assert large.facts["responses"] == 32 * small.facts["responses"]
    tokens = [book.metrics["batch/response_tokens"] for book in (small, large)]
    assert 16 * tokens[0] < tokens[1] < 64 * tokens[0]
    assert small.phases.keys() == large.phases.keys() >= {"rollout", "pack", "update", "ledger"}


@pytest.mark.parametrize(
    "sections",
    [
        {"loss": {"type": "clip_cov", "select_fraction": 0.1, "ref_kl_coef": 0.1}},
        {"algorithm": {"dynamic_sampling": {"enabled": True}, "overlong": {"filter": True}}},
        {
            "rollout": {"engine": "sglang", "max_staleness": 1},
            "loss": {"type": "ppo_clip", "rollout_correction": {"cap": 2}},
        },
        {"loss": {"type": "kl_cov", "select_fraction": 0.1}, "algorithm": {"old_logprobs": "rollout"}},
        {"reward": {"terms": [{"name": "format", "function": "tests.tiny:mostly_digits", "weight": 0.5}]}},
        {
            "train": {"entropy_probe": False, "entropy_tangent": True, "entropy_tangent_every": 1},
            "logging": {"samples_per_step": 99},
        },
    ],
    ids=lambda sections: next(iter(sections)),
)
def test_options_of_all_kinds_run(tmp_path: Path, sections: dict[str, Any]) -> None:
    book = rehearsed(tmp_path, parallel={"world_size": 2, "tp": 1}, **sections)
    assert book.metrics["reward/accuracy"] == 0.5 and book.metrics["batch/response_tokens"] > 0


def test_a_tokenizer_that_is_absent_is_made_up(tmp_path: Path) -> None:
    raw = tiny_raw(tmp_path, parallel={"tp": 1})
    raw["data"] = {"type": "jsonl", "train_path": "none", "max_prompt_tokens": 16}
    raw["model"]["hf_config"] = raw["model"]["hf_config"] | {"vocab_size": 500}
    book = rehearse_host(parse_config(raw))
    assert book.facts["tokenizer"] == "500 made-up words"
    tokenizer = host._tokenizer(500)
    assert tokenizer.decode([3, 499]) == " w3 w499" and len(tokenizer) == 500
    assert rehearsed(tmp_path).facts["tokenizer"] == "the config's"


def test_a_rank_that_the_config_has_not(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rank 2: the config's processes are 0 to 1"):
        rehearsed(tmp_path, 2, parallel={"tp": 2})


def test_a_crowd_parses_what_others_send_and_copies_numbers() -> None:
    crowd = Crowd(1, 3, lambda value: [value, value, ("other", value)])
    value = {"tokens": torch.arange(3)}
    first, own, last = crowd.gather_objects(value)
    assert own is value and first is not value and first["tokens"].tolist() == [0, 1, 2]
    assert last[0] == "other" and last[1]["tokens"].tolist() == [0, 1, 2]
    assert crowd.exchange_objects([0, 1, 2]) == [1, 1, ("other", 1)]
    assert crowd.sum(torch.tensor([2.0, 3.0])).tolist() == [6, 9] and crowd.max(torch.tensor([2.0])).tolist() == [2]


def test_ranks_bring_the_ledger_keys_of_their_own(tmp_path: Path) -> None:
    config = parse_config(tiny_raw(tmp_path, parallel={"world_size": 2, "tp": 1}))
    layout = dataclasses.replace(Layout.of(config), dp_size=2, dp_ranks=(0, 1))
    sent = host._Others(config, layout, 0, []).of_other_tokens([(torch.tensor([0, 2]), torch.ones(2, 1))])
    assert [[keys.tolist() for keys, _ in of_rank] for of_rank in sent] == [[[0, 2]], [[1, 3]]]


def test_responses_have_the_mean_that_was_asked_for(tmp_path: Path) -> None:
    raw = tiny_raw(tmp_path, parallel={"tp": 1}, train={"prompts_per_step": 512, "prompts_per_minibatch": 512})
    raw["rollout"]["max_response_tokens"], raw["train"]["micro_batch_tokens"] = 2000, 2400
    raw["model"]["hf_config"] = raw["model"]["hf_config"] | {"max_position_embeddings": 2400}
    rollouts = host._answers(parse_config(raw), VOCABULARY, 200.0, 0)
    lengths = torch.tensor([rollout.lengths.response for rollout in rollouts]).double()
    assert lengths.mean().item() == pytest.approx(200, rel=0.05) and lengths.max() > 600
    assert all(rollout.replace(known_lengths=None).lengths == rollout.lengths for rollout in rollouts[:50])
