from __future__ import annotations

import math

import pytest
import torch

from megatron_rl.algorithms.hashing import hash_uniform
from megatron_rl.rollout import sampling
from megatron_rl.rollout.sampling import sample_tokens

PROBS = torch.tensor([0.05, 0.4, 0.0, 0.25, 0.1, 0.2])
LOGITS = PROBS.log() + 3.7  # a shift must not matter; token 2 has probability 0


def draw(count, temperature=1.0, top_p=1.0, top_k=0, logits=LOGITS):
    uniform = hash_uniform(1, torch.tensor(3), torch.arange(count), torch.tensor(0))
    return sample_tokens(logits.expand(count, -1), uniform, temperature, top_p, top_k)


def chi_square(tokens, probs):
    counts = torch.bincount(tokens, minlength=len(probs)).double()
    assert counts[probs == 0].sum() == 0
    expected = probs.double()[probs > 0] * len(tokens)
    return float(((counts[probs > 0] - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [0, 1, 3, 4, 5]),
        ({"top_k": 3}, [1, 3, 5]),
        ({"top_p": 0.5}, [1, 3]),  # 0.4 falls short of 0.5, 0.65 reaches it
        ({"top_p": 0.9, "top_k": 2}, [1, 3]),
        ({"top_p": 0.3, "top_k": 4}, [1]),
        ({"temperature": 2.0}, [0, 1, 3, 4, 5]),
        ({"temperature": 0.5, "top_k": 2}, [1, 3]),
    ],
)
def test_frequencies_match_exact_probabilities(options, kept):
    tokens, logprobs = draw(200_000, **options)
    scaled = PROBS.double() ** (1 / options.get("temperature", 1.0))
    full = scaled / scaled.sum()
    probs = torch.zeros(6, dtype=torch.float64)
    probs[kept] = full[kept] / full[kept].sum()
    assert chi_square(tokens, probs) < 23.5  # 4 degrees of freedom: p = 1e-4
    # of the distribution that was drawn from, so that importance weights undo the cut
    torch.testing.assert_close(logprobs, probs[tokens].log().float())


def test_ties_and_a_mass_reached_exactly():
    high = torch.tensor([0.99], dtype=torch.float64)
    assert sample_tokens(torch.zeros(1, 2), high, 1.0, top_p=0.5)[0].item() == 0
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    # equal probabilities: the lower id is kept
    assert sample_tokens(logits.flip(-1), high, 1.0, top_k=2)[0].item() == 2
    assert sample_tokens(logits.flip(-1), torch.tensor([0.0], dtype=torch.float64), 1.0, top_k=2)[0].item() == 0


def test_extreme_uniforms_never_pick_a_forbidden_token():
    logits = torch.full((2, 4), -math.inf)
    logits[:, 1:3] = torch.tensor([0.0, 0.0])
    uniform = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    tokens, logprobs = sample_tokens(logits, uniform, 1.0)
    assert tokens.tolist() == [1, 2]
    torch.testing.assert_close(logprobs, torch.full((2,), -math.log(2)))


def test_greedy_is_argmax_with_logprobs_at_temperature_one():
    logits = torch.randn(50, 31, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = sample_tokens(logits, torch.rand(50, dtype=torch.float64), temperature=0.0)
    assert torch.equal(tokens, logits.argmax(-1))
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).amax(-1))


def test_blocks_of_rows_change_nothing(monkeypatch):
    whole = draw(1000, top_p=0.9)
    monkeypatch.setattr(sampling, "_BLOCK_ENTRIES", 60)
    tokens, logprobs = draw(1000, top_p=0.9)
    assert torch.equal(tokens, whole[0]) and torch.equal(logprobs, whole[1])


def test_draws_depend_on_every_coordinate():
    base = (1, torch.tensor(2), torch.tensor(3), torch.tensor(4))
    values = {float(hash_uniform(*base))}
    for i in range(4):
        values.add(float(hash_uniform(*(x + (i == j) for j, x in enumerate(base)))))
    assert len(values) == 5


def test_a_nan_row_is_visible_to_the_caller():
    logits = torch.zeros(2, 3)
    logits[1, 0] = math.nan
    tokens, logprobs = sample_tokens(logits, torch.tensor([0.5, 0.5], dtype=torch.float64), 1.0)
    assert logprobs.isnan().tolist() == [False, True] and 0 <= int(tokens[1]) < 3
