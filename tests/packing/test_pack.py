from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from megatron_rl.algorithms.balance import Work, deal
from megatron_rl.config import Config, parse_config
from megatron_rl.packing import Layout, computed, pack_supervised, packing_metrics
from megatron_rl.packing import pack as pack_step
from megatron_rl.types import MicroBatch, MiniBatch, Rollout, TrainBatch


def make_config(
    prompts: int = 6,
    per_minibatch: int = 3,
    samples: int = 4,
    budget: int = 64,
    share_prompts: bool = False,
    **sections: dict[str, object],
) -> Config:
    tiny = {
        "model_type": "qwen2",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 64,
    }
    raw = {
        "model": {"hf_config": tiny},
        "data": {"type": "countdown", "max_prompt_tokens": 10},
        "rollout": {"samples_per_prompt": samples, "max_response_tokens": 20},
        "train": {
            "prompts_per_step": prompts,
            "prompts_per_minibatch": per_minibatch,
            "micro_batch_tokens": budget,
            "share_prompts": share_prompts,
        },
    }
    return parse_config({**raw, **sections})


def pack(
    rollouts: list[Rollout], advantages: torch.Tensor, config: Config, *, step: int = 0, **changes: int
) -> TrainBatch:
    """`changes`: to the layout of a process alone."""
    return pack_step(rollouts, advantages, dataclasses.replace(Layout.of(config), **changes), step=step)


def make_rollout(prompt_id: int, sample_index: int, prompt: list[int], response: list[int]) -> Rollout:
    length = len(prompt) + len(response)
    mask = torch.arange(length) >= len(prompt)
    # -0.1 * index: every position has a logprob of its own, so that a shift by one shows
    logprobs = torch.arange(length) * -0.1 * mask
    return Rollout(prompt_id, sample_index, torch.tensor(prompt + response), logprobs, mask, "stop", 0)


def make_rollouts(config: Config, seed: int = 0, one_prompt: bool = False) -> list[Rollout]:
    """`one_prompt`: for all samples of a group, as in a run; else groups share nothing."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    rollouts = []
    for p in range(config.train.prompts_per_step):
        for s in range(config.rollout.samples_per_prompt):
            if s == 0 or not one_prompt:
                prompt = [draw(1, 60) for _ in range(draw(1, 11))]
            rollouts.append(make_rollout(100 + p, s, prompt, [draw(1, 60) for _ in range(draw(1, 21))]))
    return rollouts


def micro_batches(batch: TrainBatch) -> list[MicroBatch]:
    return [mb for mini in batch.mini_batches for mb in mini.micro_batches]


def two_sequences() -> tuple[Config, list[Rollout]]:
    loss = {"type": "ppo_clip", "aggregation": "seq_mean_token_mean"}
    config = make_config(prompts=1, per_minibatch=1, samples=2, budget=30, loss=loss)
    return config, [make_rollout(7, 0, [11, 12], [13, 14, 15]), make_rollout(7, 1, [21], [22])]


def test_two_sequences_by_hand() -> None:
    config, rollouts = two_sequences()
    (mini,) = pack(
        rollouts, torch.tensor([0.5, -2.0]), config, step=3, dp_rank=0, dp_size=1, pad_multiple=5
    ).mini_batches
    (mb,) = mini.micro_batches
    assert mb.token_ids.tolist() == [11, 12, 13, 14, 15, 21, 22, 0, 0, 0]
    assert mb.labels.tolist() == [0, 13, 14, 15, 0, 22, 0, 0, 0, 0]
    assert mb.loss_mask.tolist() == [False, True, True, True, False, True, False, False, False, False]
    assert mb.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 0, 1, 2]
    assert mb.cu_seqlens.tolist() == [0, 5, 7, 10] and mb.cu_seqlens.dtype == torch.int32
    torch.testing.assert_close(mb.rollout_logprobs, torch.tensor([0, -0.2, -0.3, -0.4, 0, -0.1, 0, 0, 0, 0]))
    assert mb.advantages.tolist() == [0, 0.5, 0.5, 0.5, 0, -2, 0, 0, 0, 0]
    assert mb.token_ids_global.tolist() == [1, 2, 3, 4, 5, 31, 32, -1, -1, -1]
    assert mb.prompt_ids.tolist() == [7] * 7 + [-1] * 3
    assert mb.sample_indices.tolist() == [0] * 5 + [1] * 2 + [-1] * 3
    torch.testing.assert_close(mb.token_weights, torch.tensor([0, 1 / 3, 1 / 3, 1 / 3, 0, 1, 0, 0, 0, 0]))
    assert (mb.loss_denominator, mb.num_sequences, mb.num_tokens) == (2, 2, 4)


def test_two_sequences_over_two_context_parallel_ranks_by_hand() -> None:
    """Lengths 5 and 2 become 8 and 4; each rank holds the first and the last, or the middle two, of their quarters."""
    config, rollouts = two_sequences()
    options = {"step": 3, "dp_rank": 0, "dp_size": 1, "cp_size": 2, "pad_multiple": 4}
    outer, inner = (
        pack(rollouts, torch.tensor([0.5, -2.0]), config, cp_rank=rank, **options).mini_batches[0].micro_batches[0]
        for rank in (0, 1)
    )
    assert outer.token_ids.tolist() == [11, 12, 0, 0, 21, 0] and inner.token_ids.tolist() == [13, 14, 15, 0, 22, 0]
    assert outer.labels.tolist() == [0, 13, 0, 0, 22, 0] and inner.labels.tolist() == [14, 15, 0, 0, 0, 0]
    assert outer.position_ids.tolist() == [0, 1, 6, 7, 0, 3] and inner.position_ids.tolist() == [2, 3, 4, 5, 1, 2]
    assert outer.cu_seqlens.tolist() == inner.cu_seqlens.tolist() == [0, 4, 6]
    assert outer.token_ids_global.tolist() == [1, 2, -1, -1, 31, -1]
    assert inner.token_ids_global.tolist() == [3, 4, 5, -1, 32, -1]
    torch.testing.assert_close(outer.token_weights, torch.tensor([0, 1 / 3, 0, 0, 1, 0]))
    torch.testing.assert_close(inner.token_weights, torch.tensor([1 / 3, 1 / 3, 0, 0, 0, 0]))
    assert (outer.loss_denominator, inner.loss_denominator) == (2, 0)  # sequences, counted once
    assert (outer.num_tokens, inner.num_tokens) == (2, 2)


def test_a_shared_prompt_by_hand() -> None:
    """The model computes the prompt 11 12 13 once and no last tokens; the micro-batch holds the three predictions."""
    loss = {"type": "ppo_clip", "aggregation": "seq_mean_token_mean"}
    config = make_config(prompts=1, per_minibatch=1, samples=2, budget=30, share_prompts=True, loss=loss)
    rollouts = [make_rollout(7, 0, [11, 12, 13], [14, 15]), make_rollout(7, 1, [11, 12, 13], [16])]
    options = {"step": 3, "dp_rank": 0, "dp_size": 1}
    (mb,) = micro_batches(pack(rollouts, torch.tensor([0.5, -2.0]), config, pad_multiple=8, **options))
    inputs = mb.model_inputs()
    assert inputs.token_ids.tolist() == [11, 12, 13, 14, 0, 0, 0, 0]
    assert inputs.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert inputs.real.tolist() == [True] * 4 + [False] * 4
    assert inputs.cu_seqlens.tolist() == [0, 3, 4, 8]
    assert inputs.prefixes is not None and inputs.prefixes.tolist() == [-1, 0, -1]
    assert inputs.rows is not None and inputs.rows.tolist() == [2, 3, 2]
    assert mb.token_ids.tolist() == [13, 14, 13] and mb.labels.tolist() == [14, 15, 16]
    assert mb.loss_mask.tolist() == [True] * 3 and mb.cu_seqlens.tolist() == [0, 2, 3]
    assert mb.position_ids.tolist() == [2, 3, 2] and mb.response_positions.tolist() == [0, 1, 0]
    assert mb.response_lengths.tolist() == [2, 2, 1]
    torch.testing.assert_close(mb.rollout_logprobs, torch.tensor([-0.3, -0.4, -0.3]))
    assert mb.advantages.tolist() == [0.5, 0.5, -2] and mb.token_weights.tolist() == [0.5, 0.5, 1]
    assert mb.token_ids_global.tolist() == [3, 4, 33]
    assert (mb.loss_denominator, mb.num_sequences, mb.num_tokens) == (2, 2, 3)
    # tokens; pairs 1 + 2 + 3 + 4; positions; response tokens
    assert computed(TrainBatch(3, (MiniBatch(0, (mb,)),))).tolist() == [4, 10, 8, 3]
    longer = [make_rollout(7, s, [11, 12, 13], [14 + s, 16, 17]) for s in (0, 1)]
    apart = pack(longer, torch.zeros(2), config, count_multiple=2, **options)
    parts = [mb.model_inputs() for mb in micro_batches(apart)]
    assert [part.token_ids.tolist() for part in parts] == [[11, 12, 13, 14, 16], [11, 12, 13, 15, 16]]
    assert [part.rows.tolist() for part in parts] == [[2, 3, 4]] * 2  # type: ignore
    assert [part.prefixes for part in parts] == [None, None]
    other = [make_rollout(7, s, [11, 12 + s, 13], [14]) for s in (0, 1)]
    with pytest.raises(ValueError, match="samples of prompt 7 begin with other tokens; expected its 3 first in all"):
        pack(other, torch.zeros(2), config, **options)
    # one token each: the prompt alone predicts them, and no sequence has a prefix
    short = [make_rollout(7, s, [11, 12, 13], [14 + s]) for s in (0, 1)]
    (mb,) = micro_batches(pack(short, torch.zeros(2), config, **options))
    inputs = mb.model_inputs()
    assert inputs.token_ids.tolist() == [11, 12, 13] and mb.labels.tolist() == [14, 15]
    assert inputs.prefixes is None and inputs.rows is not None and inputs.rows.tolist() == [2, 2]


def test_a_sample_of_which_nothing_counts_is_not_computed() -> None:
    config = make_config(
        prompts=1, per_minibatch=1, samples=3, share_prompts=True, algorithm={"overlong": {"filter": True}}
    )
    rollouts = [make_rollout(7, s, [11, 12], [13, 14 + s]) for s in range(3)]
    cut = [r.replace(counts=False, finish_reason="length") for r in rollouts]
    options = {"step": 0, "dp_rank": 0, "dp_size": 1}
    (mb,) = micro_batches(pack([rollouts[0], cut[1], rollouts[2]], torch.ones(3), config, **options))
    assert mb.model_inputs().token_ids.tolist() == [11, 12, 13, 13] and mb.labels.tolist() == [13, 14, 13, 16]
    assert (mb.num_sequences, mb.loss_denominator) == (3, 4)
    (mb,) = micro_batches(pack(cut, torch.ones(3), config, pad_multiple=4, **options))
    assert mb.model_inputs().real.tolist() == [False] * 4 and mb.model_inputs().rows.tolist() == [0]  # type: ignore
    assert mb.loss_mask.tolist() == [False] and (mb.num_sequences, mb.loss_denominator) == (3, 0)


def test_groups_stay_together_as_far_as_that_balances() -> None:
    """Two groups over two ranks: one each. One group over two ranks, or over two micro-batches: half and half."""
    lengths = {i: 10 for i in range(8)}
    two = Work(lengths, {i: i // 4 for i in lengths}, {0: 8, 1: 8})
    assert deal(two, 99, 2) == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    one = Work(lengths, dict.fromkeys(lengths, 0), {0: 8})
    assert deal(one, 99, 2) == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    assert one.load([0, 1, 2, 3]) == 8 + 4 * 2 and one.load([0]) == 10
    # a prefix and four samples fill 16 tokens, with all eight 24
    assert deal(one, 16, 1) == [[[0, 1, 2, 3], [4, 5, 6, 7]]]
    with pytest.raises(ValueError, match="a sample of 10 tokens exceeds the 9 of a micro-batch"):
        deal(one, 9, 1)


def test_interleaved_pipelines_get_a_multiple_of_micro_batches() -> None:
    config = make_config(prompts=1, per_minibatch=1, samples=3, budget=30)
    rollouts = [make_rollout(7, i, [11], [12] * 19) for i in range(3)]  # 20 tokens: one to a micro-batch
    options = {"step": 0, "dp_rank": 0, "dp_size": 1, "equal_lengths": True}
    (mini,) = pack(rollouts, torch.zeros(3), config, count_multiple=2, **options).mini_batches
    assert [mb.num_sequences for mb in mini.micro_batches] == [1, 1, 1, 0]
    with pytest.raises(ValueError, match="pad_multiple=2 must be a multiple of 4 tokens"):
        pack(rollouts, torch.zeros(3), config, cp_size=2, pad_multiple=2, **options)


@pytest.mark.parametrize("dp_size", [1, 2, 3])
@pytest.mark.parametrize("forced", [None, 4, 9])
@pytest.mark.parametrize(("pad_multiple", "equal_lengths"), [(1, False), (8, False), (8, True)])
@pytest.mark.parametrize("shared", [False, True])
def test_every_token_exactly_once(
    dp_size: int, forced: int | None, pad_multiple: int, equal_lengths: bool, shared: bool
) -> None:
    config = make_config(budget=64 if forced is None else 300, share_prompts=shared)
    rollouts = make_rollouts(config, one_prompt=shared)
    advantages = torch.arange(len(rollouts)) - 5.5
    ranks = [
        pack(rollouts, advantages, config, step=0, dp_rank=rank, dp_size=dp_size, pad_multiple=pad_multiple,
             equal_lengths=equal_lengths, count_multiple=forced or 1)
        for rank in range(dp_size)
    ]  # fmt: skip
    for j in range(2):
        minis = [batch.mini_batches[j] for batch in ranks]
        assert len({len(mini.micro_batches) for mini in minis}) == 1
        assert forced is None or len(minis[0].micro_batches) == forced
        seen: dict[int, tuple[int, float, float, int, int]] = {}
        for mini in minis:
            sizes = [len(mb.model_inputs().token_ids) for mb in mini.micro_batches]
            assert all(size % pad_multiple == 0 and size <= config.train.micro_batch_tokens for size in sizes)
            assert not equal_lengths or len(set(sizes)) == 1
            for mb in mini.micro_batches:
                assert mb.cu_seqlens[-1] == len(mb.token_ids)
                real = mb.token_ids_global >= 0
                assert not mb.loss_mask[~real].any() and not mb.token_ids[~real].any()
                for t in torch.nonzero(mb.loss_mask).flatten().tolist():
                    token = int(mb.token_ids_global[t])
                    assert token not in seen
                    seen[token] = (int(mb.labels[t]), float(mb.advantages[t]), float(mb.rollout_logprobs[t]),
                                   int(mb.prompt_ids[t]), int(mb.sample_indices[t]))  # fmt: skip
        expected = {}
        for i in range(12 * j, 12 * j + 12):
            rollout = rollouts[i]
            for position in torch.nonzero(rollout.sampled).flatten().tolist():
                expected[30 * i + position] = (
                    int(rollout.token_ids[position]), float(advantages[i]), float(rollout.rollout_logprobs[position]),
                    rollout.prompt_id, rollout.sample_index)  # fmt: skip
        assert seen == expected


def test_sequences_stay_whole_and_ordered() -> None:
    config = make_config()
    rollouts = make_rollouts(config)
    batch = pack(rollouts, torch.zeros(24), config, step=0, dp_rank=1, dp_size=2, pad_multiple=16)
    found = 0
    for mb in micro_batches(batch):
        for start, stop in zip(mb.cu_seqlens[:-1].tolist(), mb.cu_seqlens[1:].tolist(), strict=True):
            assert mb.position_ids[start:stop].tolist() == list(range(stop - start))
            if mb.prompt_ids[start] >= 0:
                i = (int(mb.prompt_ids[start]) - 100) * 4 + int(mb.sample_indices[start])
                assert torch.equal(mb.token_ids[start:stop], rollouts[i].token_ids)
                found += 1
    assert found == sum(mb.num_sequences for mb in micro_batches(batch)) > 0


@pytest.mark.parametrize("forced", [None, 2])
def test_shared_inputs_are_the_samples_without_their_last_tokens(forced: int | None) -> None:
    """A sequence behind its prefix is a sample's beginning, and each prediction is made where its token is."""
    config = make_config(budget=96, share_prompts=True)
    rollouts = make_rollouts(config, one_prompt=True)
    options = {"step": 0, "dp_rank": 1, "dp_size": 2, "pad_multiple": 16, "count_multiple": forced or 1}
    whole = {tuple(rollout.token_ids[:-1].tolist()) for rollout in rollouts}
    shared = 0
    for mb in micro_batches(pack(rollouts, torch.zeros(24), config, **options)):
        inputs = mb.model_inputs()
        assert inputs.rows is not None and torch.equal(inputs.token_ids[inputs.rows], mb.token_ids)
        assert torch.equal(inputs.position_ids[inputs.rows], mb.position_ids)
        pieces = list(itertools.pairwise(inputs.cu_seqlens.tolist()))
        prefixes = [-1] * len(pieces) if inputs.prefixes is None else inputs.prefixes.tolist()
        for number, ((start, stop), prefix) in enumerate(zip(pieces, prefixes, strict=True)):
            before = inputs.token_ids[slice(*pieces[prefix]) if prefix >= 0 else slice(0)]
            assert inputs.position_ids[start:stop].tolist() == list(range(len(before), len(before) + stop - start))
            if inputs.real[start] and number not in prefixes:
                assert tuple(torch.cat([before, inputs.token_ids[start:stop]]).tolist()) in whole
            shared += prefix >= 0
    assert shared > 4


def test_no_empty_micro_batch_while_another_has_two() -> None:
    config = make_config(budget=300)
    counts = [
        mb.num_sequences
        for rank in range(2)
        for mb in pack(
            make_rollouts(config), torch.zeros(24), config, step=0, dp_rank=rank, dp_size=2, count_multiple=6
        ).mini_batches[0].micro_batches
    ]  # fmt: skip
    assert counts == [1] * 12


def test_empty_micro_batch_is_valid() -> None:
    config = make_config(prompts=1, per_minibatch=1, samples=2)
    rollouts = [make_rollout(0, s, [1, 2], [3, 4, 5]) for s in range(2)]
    batch = pack(rollouts, torch.ones(2), config, step=0, dp_rank=0, dp_size=1, pad_multiple=4, count_multiple=3)
    empty = batch.mini_batches[0].micro_batches[2]
    assert empty.cu_seqlens.tolist() == [0, 4] and empty.num_sequences == 0
    assert not empty.loss_mask.any() and empty.loss_denominator == 0 and not empty.token_weights.any()
    assert empty.token_ids_global.tolist() == [-1] * 4


def test_balance_and_smallest_count() -> None:
    # 12 sequences of 20 tokens, 60 fit: 4 micro-batches alone, 2 on each of two ranks
    config = make_config(prompts=1, per_minibatch=1, samples=12, budget=63)
    rollouts = [make_rollout(0, s, [1] * 5, [2] * 15) for s in range(12)]
    for dp_size, count in ((1, 4), (2, 2)):
        for rank in range(dp_size):
            batch = pack(rollouts, torch.zeros(12), config, step=0, dp_rank=rank, dp_size=dp_size)
            assert [len(mb.token_ids) for mb in micro_batches(batch)] == [60] * count
    metrics = packing_metrics(batch)
    assert metrics == {
        "packing/padding_fraction": 0.0,
        "packing/micro_batches": 2.0,
        "packing/tokens": 120.0,
        "packing/imbalance": 0.0,
    }
    # lengths 20, 5, 5 over two micro-batches: 20 | 10, imbalance 20/15 - 1; equal lengths pad 10 to 20
    rollouts = [make_rollout(0, s, [1] * 4, [2] * n) for s, n in enumerate((16, 1, 1))]
    config = make_config(prompts=1, per_minibatch=1, samples=3, budget=300)
    batch = pack(rollouts, torch.zeros(3), config, step=0, dp_rank=0, dp_size=1, count_multiple=2, equal_lengths=True)
    metrics = packing_metrics(batch)
    assert metrics["packing/padding_fraction"] == pytest.approx(10 / 40)
    assert metrics["packing/imbalance"] == pytest.approx(1 / 3)


def test_budget_counts_padding() -> None:
    # budget 31 with multiple 8 leaves 24 usable: 13 + 12 no longer fit together
    config = make_config(prompts=1, per_minibatch=1, samples=2, budget=31)
    rollouts = [make_rollout(0, 0, [1], [2] * 12), make_rollout(0, 1, [1], [2] * 11)]
    unpadded = pack(rollouts, torch.zeros(2), config, step=0, dp_rank=0, dp_size=1)
    padded = pack(rollouts, torch.zeros(2), config, step=0, dp_rank=0, dp_size=1, pad_multiple=8)
    assert [len(mb.token_ids) for mb in micro_batches(unpadded)] == [25]
    assert [len(mb.token_ids) for mb in micro_batches(padded)] == [16, 16]


@pytest.mark.parametrize("share_prompts", [False, True])
def test_lengths_are_rounded_up_to_rows_where_the_budget_allows(share_prompts: bool) -> None:
    found = set()
    for budget in (64, 100):
        config = make_config(budget=budget, share_prompts=share_prompts)
        rollouts = make_rollouts(config, one_prompt=True)
        options = {"step": 0, "dp_rank": 0, "dp_size": 1, "pad_multiple": 2}
        plain = pack(rollouts, torch.zeros(len(rollouts)), config, **options)
        rounded = pack(rollouts, torch.zeros(len(rollouts)), config, **options, row_multiple=24)
        for before, after in zip(plain.mini_batches, rounded.mini_batches, strict=True):
            for a, b in zip(before.micro_batches, after.micro_batches, strict=True):
                short, long = len(a.model_inputs().token_ids), len(b.model_inputs().token_ids)
                assert long == min(budget, -(-short // 48) * 48)
                found.add((budget, long))
                # nothing but padding is added
                assert torch.equal(a.model_inputs().real.sum(), b.model_inputs().real.sum())
                assert torch.equal(a.token_ids_global[a.loss_mask], b.token_ids_global[b.loss_mask])
    assert found == {(64, 64), (100, 96)} | ({(64, 48)} if share_prompts else set())


def test_errors_name_what_is_wrong() -> None:
    config = make_config(prompts=1, per_minibatch=1, samples=2, budget=30)
    good = [make_rollout(4, s, [1, 2], [3]) for s in range(2)]

    def attempt(rollouts: list[Rollout], advantages: torch.Tensor | None = None, **options: int) -> TrainBatch:
        advantages = torch.zeros(len(rollouts)) if advantages is None else advantages
        return pack(rollouts, advantages, config, step=0, **{"dp_rank": 0, "dp_size": 1, **options})

    attempt(good)
    with pytest.raises(ValueError, match="got 1 rollouts, expected 2"):
        attempt(good[:1])
    with pytest.raises(ValueError, match="expected 2 samples of one prompt"):
        attempt([good[0], make_rollout(5, 1, [1], [2])])
    with pytest.raises(ValueError, match="ascending sample_index"):
        attempt(good[::-1])
    with pytest.raises(ValueError, match=r"prompt_id=4, sample_index=1\): the response has length 0"):
        attempt([good[0], make_rollout(4, 1, [1, 2], [])])
    with pytest.raises(ValueError, match=r"sample_index=1\): no tokens"):
        attempt([good[0], make_rollout(4, 1, [], [])])
    with pytest.raises(ValueError, match="starts at token 0"):
        attempt([good[0], make_rollout(4, 1, [], [1])])
    with pytest.raises(ValueError, match="31 tokens exceed micro_batch_tokens=30"):
        attempt([good[0], make_rollout(4, 1, [1] * 10, [2] * 21)])
    with pytest.raises(ValueError, match="29 tokens exceed micro_batch_tokens=30 .*28 are usable"):
        attempt([good[0], make_rollout(4, 1, [1] * 10, [2] * 19)], pad_multiple=4)
    with pytest.raises(ValueError, match=r"not finite for \(prompt_id=4, sample_index=1\)"):
        attempt(good, torch.tensor([0.0, float("nan")]))
    with pytest.raises(ValueError, match=r"shape \(3,\), expected \[2\]"):
        attempt(good, torch.zeros(3))
    with pytest.raises(ValueError, match="dp_rank=1"):
        attempt(good, dp_rank=1)


def test_a_rollout_that_does_not_count_is_packed_without_weight() -> None:
    rollouts = [make_rollout(4, s, [1, 2], [3]) for s in range(2)]
    config = make_config(prompts=1, per_minibatch=1, samples=2)
    (mb,) = micro_batches(pack([rollouts[0], rollouts[1].replace(counts=False)], torch.zeros(2), config))
    assert (mb.num_sequences, mb.num_tokens, mb.loss_denominator) == (2, 1, 1)


def test_supervised() -> None:
    layout = dataclasses.replace(Layout.of(make_config(budget=31, share_prompts=True)), pad_multiple=8)
    (mb,) = pack_supervised([([5, 6], [7]), ([8], [9, 10])], layout).micro_batches
    assert mb.labels.tolist() == [0, 7, 0, 9, 10, 0, 0, 0]
    assert mb.advantages.tolist() == mb.token_weights.tolist() == [0, 1, 0, 1, 1, 0, 0, 0]
    assert not mb.rollout_logprobs.any() and mb.loss_denominator == 3
    assert mb.prompt_ids.tolist() == [0, 0, 0, 1, 1, 1, -1, -1]
    with pytest.raises(ValueError, match="empty"):
        pack_supervised([], layout)
