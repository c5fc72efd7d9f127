from __future__ import annotations

import json
import math

import pytest
import torch

from megatron_rl.config import parse_config
from megatron_rl.data.tokenizer import character_tokenizer
from megatron_rl.grading.registry import REWARDS, RewardError, load_reward
from megatron_rl.grading.rules import countdown
from megatron_rl.grading.verdict import InProcess
from megatron_rl.reward.shape import check_failures, filter_overlong, graded, response_text, shape_rewards
from megatron_rl.types import Rollout

ANSWER = json.dumps({"numbers": [5, 3, 7], "target": 22})


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("5*3+7", 1.0),
        (" 7 + (3*5) ", 1.0),
        ("((((5))))*3+7", 1.0),
        ("5*3+7=22", 0.0),
        ("5*3", 0.0),  # 7 is unused
        ("5*3+7+3-3", 0.0),  # 3 three times
        ("22", 0.0),
        ("5+3+7", 0.0),
        ("-(0-5)*3+7", 0.0),  # unary sign
        ("9**9**9", 0.0),
        ("5*3+7//1", 0.0),
        ("05*3+7", 0.0),
        ("5_0*3+7", 0.0),
        ("5*3+7.0", 0.0),
        ("5*3+7#", 0.0),
        ("5*3+7\n", 0.0),
        ("５*3+7", 0.0),  # a full-width digit
        ("__import__('os').system('true')", 0.0),
        ("5*3+7 if 1 else 0", 0.0),
        ("5/0*3+7", 0.0),
        ("5/(3-3)+7", 0.0),
        ("5*3+7<pad>", 0.0),
        ("5 3 7", 0.0),
        ("5(3)+7", 0.0),  # a call
        ("(5,3,7)", 0.0),
        ("", 0.0),
        ("   ", 0.0),
        ("5*3+", 0.0),
        ("(" * 100_000 + "5*3+7" + ")" * 100_000, 0.0),
        ("(" * 60 + "5*3+7" + ")" * 60, 1.0),
        ("9" * 1_000_000, 0.0),
        ("1" * 128, 0.0),
        ("1/" * 63 + "1", 0.0),
    ],
)
def test_countdown_truth_table(response, score):
    assert countdown(response, ANSWER) == score


def test_countdown_is_exact_and_counts_equal_numbers():
    assert countdown("1/3*3", json.dumps({"numbers": [3, 1, 3], "target": 1})) == 1.0
    assert countdown("8/(3-8/3)", json.dumps({"numbers": [3, 3, 8, 8], "target": 24})) == 1.0
    assert countdown("8/(3-8/3)", json.dumps({"numbers": [3, 8, 8, 3, 1], "target": 24})) == 0.0
    # 1/49*49 is 0.9999999999999999 in floating point
    assert countdown("1/49*49", json.dumps({"numbers": [1, 49, 49], "target": 1})) == 1.0


def test_countdown_agrees_with_reasoning_gym():
    from reasoning_gym.games.countdown import CountdownConfig, CountdownDataset

    dataset = CountdownDataset(
        CountdownConfig(min_numbers=3, max_numbers=3, max_value=9, min_target=1, size=50, seed=4)
    )
    entry = {"metadata": {"numbers": [5, 3, 7], "target": 22}}
    for response in ("5*3+7", "7+5*3", "5*3", "5+3+7", "5*3+7+7-7", "3*(5+7)-14"):
        assert countdown(response, ANSWER) == float(dataset.score_answer(response, entry) == 1.0)


def test_exact():
    assert REWARDS["exact"](" 42\n", "42") == 1.0 and REWARDS["exact"]("420", "42") == 0.0


def test_load_reward(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "number = 3\ndef one(text):\n    return 1.0\ndef good(r, a):\n    return 0.5\n"
    )
    (tmp_path / "broken_rewards.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_reward("countdown") is countdown
    assert load_reward("my_rewards:good")("", "") == 0.5
    for name, message in [
        ("maths", "expected one of countdown, exact, math, regex, format, remote, or module:function"),
        ("no_such_module:f", "importing no_such_module failed with ModuleNotFoundError"),
        ("broken_rewards:f", "importing broken_rewards failed with ZeroDivisionError"),
        ("my_rewards:god", "has no 'god'; did you mean 'good'"),
        ("my_rewards:number", "callable with two texts"),
        ("my_rewards:one", "callable with two texts"),
    ]:
        with pytest.raises(RewardError, match=message):
            load_reward(name)


class Letters:
    """Decodes token i to the i-th letter."""

    def decode(self, token_ids):
        return "".join(chr(ord("a") + i) for i in token_ids)


def make_rollout(prompt_id=0, response=(1, 2, 9), reason="stop", **fields):
    length = 2 + len(response)
    return Rollout(
        prompt_id=prompt_id,
        sample_index=0,
        token_ids=torch.tensor([5, 6, *response]),
        rollout_logprobs=torch.zeros(length),
        sampled=torch.arange(length) >= 2,
        finish_reason=reason,
        weight_version=0,
        **fields,
    )


def make_config(max_response_tokens=20, **options):
    hf = {
        "model_type": "qwen2",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return parse_config(
        {
            "model": {"hf_config": hf},
            "data": {"type": "countdown"},
            "rollout": {"max_response_tokens": max_response_tokens},
            **options,
        }
    )


ANSWERS = {0: "bc", 1: "zz"}  # by prompt


def grade(rollouts, *functions):
    """The rollouts with what the functions say of them, as a collector has it."""
    grader = InProcess(functions)
    verdicts = [grader.submit(response_text(rollout, Letters()), ANSWERS[rollout.prompt_id]) for rollout in rollouts]
    return [graded(rollout, verdict.result()) for rollout, verdict in zip(rollouts, verdicts, strict=True)]


def test_verifiers_see_the_response_without_its_stop_token():
    seen = []

    def watch(response, answer):
        seen.append((response, answer))
        return response == answer

    rollouts = [make_rollout(), make_rollout(prompt_id=1), make_rollout(reason="length")]
    scored = grade(rollouts, watch)
    assert seen == [("bc", "bc"), ("bc", "zz"), ("bcj", "bc")]
    assert [r.score for r in scored] == [1.0, 0.0, 0.0] and [r.error for r in scored] == [""] * 3


def test_special_tokens_are_seen_and_ids_that_pad_the_vocabulary_say_nothing():
    tokenizer = character_tokenizer()
    one, pad = tokenizer.convert_tokens_to_ids(["1", "<pad>"])
    padding = [len(tokenizer), len(tokenizer) + 40]
    rollout = make_rollout(response=[one, *padding, pad, tokenizer.eos_token_id, padding[0], one], reason="length")
    assert response_text(rollout, tokenizer) == "1<pad><eos>1"


@pytest.mark.parametrize("bad", [math.nan, math.inf, "1", None, 1j])
def test_a_bad_return_value_scores_zero_and_is_told(bad):
    (scored,) = grade([make_rollout()], lambda r, a: bad)
    assert scored.score == scored.reward == 0.0 and f"returned {bad!r}" in scored.error


def test_raising_scores_zero_and_ends_the_run_only_above_the_limit():
    calls = []

    def sometimes(response, answer):
        calls.append(1)
        if len(calls) in (3, 4):
            raise KeyError(f"call {len(calls)}")
        return 1.0

    scored = grade([make_rollout()] * 20, sometimes)
    assert sum(r.score for r in scored) == 18
    check_failures(scored, make_config(reward={"max_failures": 0.1}))  # 2 of 20 is not more than 0.1
    with pytest.raises(RewardError, match=r"failed on 2 of 20 .*max_failures=0\.09(.|\n)*KeyError: 'call 3'"):
        check_failures(scored, make_config(reward={"max_failures": 0.09}))


@pytest.mark.parametrize(("length", "penalty"), [(1, 0), (12, 0), (13, -0.25 / 2), (16, -0.5), (20, -1.0)])
def test_soft_overlong_penalty(length, penalty):
    # limit 20, buffer 8, factor 1: -(length - 12) / 8
    config = make_config(algorithm={"overlong": {"penalty_buffer": 8}})
    (shaped,) = shape_rewards([make_rollout(response=[1] * length, score=1.0)], config)
    assert shaped.reward == 1.0 + penalty and shaped.score == 1.0
    double = make_config(algorithm={"overlong": {"penalty_buffer": 8, "penalty_factor": 2.0}})
    assert shape_rewards([make_rollout(response=[1] * length, score=1.0)], double)[0].reward == 1.0 + 2 * penalty


def test_without_buffer_the_reward_is_the_score():
    assert shape_rewards([make_rollout(response=[1] * 20, score=0.5)], make_config())[0].reward == 0.5


def test_overlong_filter_masks_cut_responses_only_and_keeps_their_reward():
    rollouts = [make_rollout(reward=1.0), make_rollout(reason="length", reward=0.5)]
    whole, cut = filter_overlong(rollouts, make_config(algorithm={"overlong": {"filter": True}}))
    assert whole.counts and not cut.counts and cut.reward == 0.5 and cut.response_length == 3
    assert filter_overlong(rollouts, make_config())[1].counts
