"""How often bfloat16 turns the sign of logp - old_logp, the gradient of KL-Cov's penalty: by the size of the true
movement, and how much of it comes from which rounding. docs/measurements.md holds the tables.

A Hugging Face model of Llama's architecture on a CPU. Its float32 main weights begin at bfloat16 numbers, as a run
does, or with --middle anywhere between two of them, as later in a run; they make Adam's first step for a
policy-gradient loss on real text, and are rounded to bfloat16 as a trainer does. The truth is the movement of the
rounded weights' log-probabilities, in float64.
`python scripts/study_bf16_signs.py MODEL_FOLDER TEXT_FILE`
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

SEQUENCE = 128  # tokens that see one another; each has one advantage of +1 or -1
BOUNDS = (1e-4, 1e-3, 1e-2, 1e-1)  # nats, between the rows of a table
BLOCK = 64  # rows of logits that exist at once


def logprobs(hidden: Tensor, weight: Tensor, labels: Tensor, round_logits: bool) -> Tensor:
    """Return float64 log-probabilities `[T]`; the product's inputs are taken as they are, its sums rounded if asked."""
    parts = []
    for h, y in zip(hidden.split(BLOCK), labels.split(BLOCK), strict=True):
        logits = h.double() @ weight.double().t()
        logits = (logits.float().bfloat16() if round_logits else logits).double()
        parts.append(logits.gather(1, y[:, None])[:, 0] - logits.logsumexp(1))
    return torch.cat(parts)


def hidden_states(model: Any, ids: Tensor) -> Tensor:
    """Return `[T, H]` of the tokens that predict another, in the model's dtype."""
    with torch.no_grad():
        hidden: Tensor = model.model(ids).last_hidden_state[:, :-1].flatten(0, 1)
    return hidden


def with_float32_residuals(model: Any, ids: Tensor) -> Tensor:
    """Return `hidden_states` of a bfloat16 model whose residual stream alone is float32."""
    decoder = model.model
    norms = [norm for layer in decoder.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    hooks = [norm.register_forward_hook(lambda _, __, x: x.bfloat16()) for norm in [*norms, decoder.norm]]
    hooks.append(decoder.embed_tokens.register_forward_hook(lambda _, __, x: x.float()))
    hooks.append(decoder.rotary_emb.register_forward_hook(lambda _, __, pair: tuple(x.bfloat16() for x in pair)))
    hidden = hidden_states(model, ids)
    for hook in hooks:
        hook.remove()
    return hidden


def adam_direction(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Return Adam's first step of learning rate 1 on -advantage * logp, by name of the weight."""
    advantages = torch.randint(0, 2, (len(ids), 1), generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    logp = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    (-advantages * logp).mean().backward()
    steps = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        steps[name] = -parameter.grad / (parameter.grad.abs() + 1e-8)
    model.zero_grad()
    return steps


def wrong(moved: Tensor, truth: Tensor) -> float:
    """Return the share of the signs that are wrong or zero."""
    return float((moved.sign() != truth.sign()).double().mean())


def table(title: str, truth: Tensor, ways: dict[str, Tensor]) -> None:
    """Print the share of wrong signs by the size of the true movement, a column for each way to compute it."""
    print(f"\n{title}\n|true movement|, nats | tokens | " + " | ".join(ways))
    edges = (0.0, *BOUNDS, float("inf"))
    for low, high in [*zip(edges, edges[1:], strict=False), (0.0, edges[-1])]:
        rows = (truth.abs() >= low) & (truth.abs() < high)
        if rows.any():
            cells = [f"{wrong(moved[rows], truth[rows]):.1%}" for moved in ways.values()]
            print(f"{low:g} to {high:g} | {int(rows.sum())} | " + " | ".join(cells))
    print(
        "median error, nats | | " + " | ".join(f"{(moved - truth).abs().median():.1e}" for moved in ways.values()),
        flush=True,
    )


def real(folder: str, text: str, tokens: int, rates: list[float], middle: bool) -> None:
    """Print a table for each learning rate: one Adam step of a real model."""
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(open(text).read()[: 8 * tokens])["input_ids"][:tokens])
    ids = ids.view(-1, SEQUENCE)
    labels = ids[:, 1:].flatten()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).float()
    start = {}
    for name, parameter in model.named_parameters():
        between = middle * (torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)) - 0.5)
        exponent = torch.frexp(parameter.detach()).exponent
        start[name] = parameter.detach() + torch.ldexp(between, exponent - 8)  # half a step of bfloat16 to either side
    steps = adam_direction(model, ids)

    def measure(change: float) -> dict[str, Tensor]:
        """Return the log-probabilities after a step, by what is rounded."""

        def use(dtype: torch.dtype, is_rounded: bool) -> Tensor:
            for name, parameter in model.named_parameters():
                moved = start[name] + change * steps[name]
                parameter.data = (moved.bfloat16() if is_rounded else moved).to(dtype)
            return model.get_output_embeddings().weight.detach()

        weight = use(torch.float64, False)
        values = {"weights not rounded": logprobs(hidden_states(model, ids), weight, labels, False)}
        weight, hidden = use(torch.float64, True), hidden_states(model, ids)
        values["truth"] = logprobs(hidden, weight, labels, False)
        values["logits alone"] = logprobs(hidden, weight, labels, True)
        weight = use(torch.bfloat16, True)
        hidden = hidden_states(model, ids)
        values["layers and logits"] = logprobs(hidden, weight, labels, True)
        values["layers"] = logprobs(hidden, weight, labels, False)
        values["layers, not residuals"] = logprobs(with_float32_residuals(model, ids), weight, labels, False)
        assert torch.equal(hidden, hidden_states(model, ids))  # the same weights twice give the same bits
        return values

    old = measure(0.0)
    print(f"{folder}: {len(labels)} tokens. Standard deviation of logp against the truth, nats:")
    print({way: f"{float((old[way] - old['truth']).std()):.1e}" for way in old}, flush=True)
    for rate in rates:
        new = measure(rate)
        moved = {way: new[way] - old[way] for way in new}
        table(f"one Adam step of lr {rate:g}; rounded are:", moved.pop("truth"), moved)


def synthetic(hidden_size: int, vocab: int, tokens: int) -> None:
    """Print tables for random hidden states and logits of standard deviation 5: the product's rounding alone."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, generator=generator).bfloat16()
    weight = (torch.randn(vocab, hidden_size, generator=generator) * 5.0 / hidden_size**0.5).bfloat16()
    labels = torch.cat([(h.float() @ weight.float().t()).topk(50).indices for h in hidden.split(BLOCK)])
    labels = labels.gather(1, torch.randint(0, 50, (tokens, 1), generator=generator))[:, 0]
    for size in (1e-4, 1e-3, 1e-2):
        noise = size * torch.randn(tokens, hidden_size, generator=generator)
        moved = []
        for rounds in (False, True):
            old, new = (logprobs(h, weight, labels, rounds) for h in (hidden.double(), hidden.double() + noise))
            moved.append(new - old)
        table(f"H={hidden_size}, V={vocab}, hidden states moved by {size:g}", moved[0], {"rounded": moved[1]})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("text")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-6, 1e-5])
    parser.add_argument("--middle", action="store_true")
    given = parser.parse_args()
    torch.manual_seed(0)
    real(given.folder, given.text, given.tokens, given.rates, given.middle)
    synthetic(5120, 152_064 // 8, 256)
