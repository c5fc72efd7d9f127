from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_rl.convert.hf import hub_views
from megatron_rl.rollout.build import ENGINES
from megatron_rl.rollout.engine import EngineAborted, EngineError, Request, RolloutEngine, SamplingParams
from megatron_rl.rollout.transformers import TransformersEngine

HF = {
    "model_type": "qwen2",
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "initializer_range": 0.4,  # sharp enough that a wrong position or mask shows
}
SAMPLING = SamplingParams(
    temperature=0.8, top_p=1.0, top_k=0, max_response_tokens=12, stop_token_ids=(3, 4, 5), seed=11
)


def make_model(**changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**(HF | changes))).eval()


def make_engine(model, batch_size=64, version=7, **changes):
    engine = TransformersEngine(HF | changes, dtype=torch.float32, device=torch.device("cpu"), batch_size=batch_size)
    engine.update_weights(model.named_parameters(), version)
    return engine


def make_requests(num_prompts=10, samples=5, sampling=SAMPLING):
    generator = torch.Generator().manual_seed(1)
    prompts = [
        tuple(torch.randint(37, (length,), generator=generator).tolist())
        for length in torch.randint(1, 15, (num_prompts,), generator=generator).tolist()
    ]
    return [Request(i, j, prompt, sampling) for i, prompt in enumerate(prompts) for j in range(samples)]


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def rollouts(model):
    return make_engine(model).generate(make_requests())


def test_rollouts_are_complete_and_in_request_order(rollouts):
    reasons = set()
    for request, rollout in zip(make_requests(), rollouts, strict=True):
        prompt, length = len(request.token_ids), len(rollout.token_ids)
        assert (rollout.prompt_id, rollout.sample_index) == (request.prompt_id, request.sample_index)
        assert tuple(rollout.token_ids[:prompt].tolist()) == request.token_ids
        assert rollout.sampled.tolist() == [False] * prompt + [True] * (length - prompt)
        assert rollout.rollout_logprobs.dtype == torch.float32 and not rollout.rollout_logprobs[:prompt].any()
        assert rollout.weight_version == 7
        response = rollout.token_ids[prompt:].tolist()
        stops = [i for i, token in enumerate(response) if token in SAMPLING.stop_token_ids]
        if rollout.finish_reason == "stop":
            assert stops == [len(response) - 1]
        else:
            assert not stops and len(response) == 12
        reasons.add(rollout.finish_reason)
    assert reasons == {"stop", "length"}  # else the fixture proves little


# responses of up to 100 tokens have the other cache, from which finished rows leave several times
@pytest.mark.parametrize(("temperature", "longest"), [(0.8, 12), (0.0, 12), (0.8, 100)])
def test_logprobs_equal_a_plain_forward(model, temperature, longest):
    requests = make_requests(sampling=replace(SAMPLING, temperature=temperature, max_response_tokens=longest))
    for rollout in make_engine(model).generate(requests):
        with torch.no_grad():
            logits = model(rollout.token_ids[None]).logits[0, :-1]
        expected = (logits / (temperature or 1.0)).log_softmax(-1).gather(-1, rollout.token_ids[1:, None])[:, 0]
        mask = rollout.sampled[1:]
        torch.testing.assert_close(rollout.rollout_logprobs[1:][mask], expected[mask], atol=1e-5, rtol=1e-5)
        if temperature == 0:
            assert torch.equal(rollout.token_ids[1:][mask], logits.argmax(-1)[mask])


def test_the_cache_of_long_responses_changes_no_sample(model, rollouts):
    long = make_engine(model).generate(make_requests(sampling=replace(SAMPLING, max_response_tokens=100)))
    assert max(len(rollout.token_ids) for rollout in long) > 40
    for got, short in zip(long, rollouts, strict=True):
        size = len(short.token_ids)
        assert torch.equal(got.token_ids[:size], short.token_ids)
        torch.testing.assert_close(got.rollout_logprobs[:size], short.rollout_logprobs, atol=1e-5, rtol=1e-5)


def same(a, b):
    assert [r.token_ids.tolist() for r in a] == [r.token_ids.tolist() for r in b]
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x.rollout_logprobs, y.rollout_logprobs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_samples_do_not_depend_on_the_batch_size(model, rollouts, batch_size):
    same(make_engine(model, batch_size).generate(make_requests()), rollouts)


def test_samples_do_not_depend_on_the_split_or_the_order(model, rollouts):
    engine, requests = make_engine(model), make_requests()
    same([r for rank in range(3) for r in engine.generate(requests[rank * 50 // 3 : (rank + 1) * 50 // 3])], rollouts)
    same(engine.generate(requests[::-1])[::-1], rollouts)
    assert engine.generate([]) == []


def test_samples_of_a_prompt_differ_and_follow_the_seed(model, rollouts):
    assert len({tuple(r.token_ids.tolist()) for r in rollouts}) > 45
    other = make_engine(model).generate(make_requests(sampling=replace(SAMPLING, seed=12)))
    assert sum(torch.equal(a.token_ids, b.token_ids) for a, b in zip(rollouts, other, strict=True)) < 10


def test_requests_with_other_sampling_mix(model, rollouts):
    short = replace(SAMPLING, max_response_tokens=2)
    requests = make_requests()
    mixed = [replace(r, sampling=short) if i % 2 else r for i, r in enumerate(requests)]
    got = make_engine(model).generate(mixed)
    same(got[::2], rollouts[::2])
    for request, short_one, long_one in zip(requests[1::2], got[1::2], rollouts[1::2], strict=True):
        assert torch.equal(short_one.token_ids, long_one.token_ids[: len(request.token_ids) + 2])


def test_uniforms_beyond_the_first_block_of_positions(model):
    long = replace(SAMPLING, max_response_tokens=100, stop_token_ids=())
    (together,) = make_engine(model).generate([Request(0, 0, (1, 2), long)])
    response = together.token_ids[2:].tolist()
    assert len(response) == 100 and together.finish_reason == "length"
    # a block that was drawn twice would repeat the draws, though not exactly the tokens; check against the definition
    from megatron_rl.algorithms.hashing import hash_uniform
    from megatron_rl.rollout.sampling import sample_tokens

    with torch.no_grad():
        logits = model(together.token_ids[None]).logits[0, 1:-1]
    draws = hash_uniform(SAMPLING.seed, torch.tensor(0), torch.tensor(0), torch.arange(100))
    assert sample_tokens(logits, draws, 0.8)[0].tolist() == response


def test_new_weights_take_over_and_are_stamped(model):
    engine = make_engine(model)
    torch.manual_seed(9)
    other = AutoModelForCausalLM.from_config(AutoConfig.for_model(**HF)).eval()
    engine.update_weights(other.named_parameters(), 8)
    got = engine.generate(make_requests())
    same(got, make_engine(other).generate(make_requests()))
    assert {r.weight_version for r in got} == {8}


def test_tied_embeddings(model):
    tied = make_model(tie_word_embeddings=True)
    names = [name for name, _ in tied.named_parameters()]
    assert "lm_head.weight" not in names
    engine = make_engine(tied, tie_word_embeddings=True)
    want = engine.generate(make_requests())
    head = ("lm_head.weight", tied.model.embed_tokens.weight)
    engine.update_weights([head, *tied.named_parameters()], 7)
    same(engine.generate(make_requests()), want)
    with pytest.raises(EngineError, match=r"tied to .* but came with other values"):
        engine.update_weights([*tied.named_parameters(), ("lm_head.weight", head[1] + 1)], 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: [*s, ("model.nonsense", torch.zeros(1))], "no weight 'model.nonsense'"),
        (lambda s: s[:-1], "1 weights did not come: 'lm_head.weight'"),
        (
            lambda s: [(s[0][0], s[0][1][:-1]), *s[1:]],
            r"embed_tokens.weight' has shape \(36, 32\), expected \(37, 32\)",
        ),
        (lambda s: [*s, s[3]], "came twice"),
    ],
)
def test_a_bad_stream_is_named_and_blocks_generation(model, change, message):
    engine = make_engine(model)
    with pytest.raises(EngineError, match=message):
        engine.update_weights(change(list(model.named_parameters())), 8)
    with pytest.raises(EngineError, match="last update_weights failed"):
        engine.generate(make_requests())
    engine.update_weights(model.named_parameters(), 9)
    engine.generate(make_requests()[:1])


def test_lifecycle(model, rollouts):
    engine = TransformersEngine(HF, dtype=torch.float32, device=torch.device("cpu"), batch_size=8)
    assert isinstance(engine, RolloutEngine) and set(ENGINES) == {"transformers", "sglang", "vllm"}
    with pytest.raises(EngineError, match="no weights yet"):
        engine.health()
    engine.update_weights(model.named_parameters(), 7)
    engine.sleep()
    with pytest.raises(EngineError, match="sleeps"):
        engine.generate(make_requests())
    with pytest.raises(EngineError, match="sleeps"):
        engine.update_weights(model.named_parameters(), 8)
    engine.wake()
    same(engine.generate(make_requests()), rollouts)
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.health()


def test_abort_ends_a_running_generate(model):
    engine = make_engine(model)
    forward, calls = engine.model.forward, []

    def aborting(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            engine.abort()
        return forward(*args, **kwargs)

    engine.model.forward = aborting
    with pytest.raises(EngineAborted):
        engine.generate(make_requests())
    assert len(calls) == 3
    engine.generate(make_requests()[:2])  # an earlier abort does not stop a later call


def test_bad_requests_and_diverged_weights(model):
    engine = make_engine(model)
    with pytest.raises(EngineError, match="prompt 4 is empty"):
        engine.generate([Request(4, 0, (), SAMPLING)])
    with pytest.raises(EngineError, match=r"prompt 4 has a token id outside \[0, 37\)"):
        engine.generate([Request(4, 0, (1, 37), SAMPLING)])
    broken = [(name, p * float("nan") if "norm" in name else p) for name, p in model.named_parameters()]
    engine.update_weights(broken, 8)
    with pytest.raises(EngineError, match="not finite under weight version 8"):
        engine.generate(make_requests()[:3])


def test_building_an_engine_leaves_the_global_rng_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    TransformersEngine(HF, dtype=torch.float32, device=torch.device("cpu"), batch_size=8)
    assert torch.equal(torch.get_rng_state(), before)


def test_experts_come_one_by_one():
    """As checkpoints name them; the model in memory stacks them."""
    changes = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    model = make_model(**changes)
    weights = hub_views(dict(model.named_parameters()))
    engine = TransformersEngine(HF | changes, dtype=torch.float32, device=torch.device("cpu"), batch_size=8)
    expert = "model.layers.1.mlp.experts.3.up_proj.weight"
    with pytest.raises(EngineError, match=rf"1 weights did not come: '{expert}'"):
        engine.update_weights([(name, tensor) for name, tensor in weights.items() if name != expert], 7)
    with pytest.raises(EngineError, match=rf"'{expert}' has shape \(15, 32\), expected \(16, 32\)"):
        engine.update_weights((weights | {expert: torch.zeros(15, 32)}).items(), 7)
    engine.update_weights(weights.items(), 7)
    loaded = engine.model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    rollout = engine.generate(make_requests(1, 1))[0]
    with torch.inference_mode():
        logprobs = (model(rollout.token_ids[None]).logits[0, :-1] / SAMPLING.temperature).log_softmax(-1)
    expected = logprobs.gather(1, rollout.token_ids[1:, None])[:, 0][rollout.sampled[1:]]
    torch.testing.assert_close(rollout.rollout_logprobs[rollout.sampled], expected, atol=1e-5, rtol=0)


def test_routes_are_those_of_a_plain_forward():
    """Of prompts of many lengths, shared by samples, of rows that leave the batch early; the last token was not fed."""
    moe = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
    }
    model, seen = make_model(**moe), []
    engine = TransformersEngine(HF | moe, dtype=torch.float32, device=torch.device("cpu"), batch_size=20)
    engine.update_weights(hub_views(dict(model.named_parameters())).items(), 7)
    requests = [replace(request, with_routes=request.prompt_id != 3) for request in make_requests()]
    rollouts = engine.generate(requests)
    assert len({len(rollout.token_ids) for rollout in rollouts}) > 5
    for layer in (0, 2):
        model.model.layers[layer].mlp.gate.register_forward_hook(lambda gate, inputs, output: seen.append(output[2]))
    for request, rollout in zip(requests, rollouts, strict=True):
        if not request.with_routes:
            assert rollout.routes is None
            continue
        seen.clear()
        with torch.no_grad():
            model(rollout.token_ids[None])
        assert rollout.routes.dtype == torch.uint8 and bool((rollout.routes[-1] == 255).all())
        assert torch.equal(rollout.routes[:-1].long(), torch.stack(seen, dim=1)[:-1])
    assert all(r.routes is None for r in engine.generate([replace(r, with_routes=False) for r in requests[:3]]))


def test_float32_logits_of_a_bfloat16_model():
    options = {"dtype": torch.bfloat16, "device": torch.device("cpu"), "batch_size": 4}
    ids = torch.arange(6).view(2, 3)
    for wide in (False, True):
        engine = TransformersEngine(HF, float32_logits=wide, **options)
        engine.update_weights(make_model().named_parameters(), 7)
        with torch.inference_mode():
            hidden, logits = engine.model.model(ids).last_hidden_state, engine.model(ids).logits
        exact = hidden.double() @ engine.model.lm_head.weight.double().t()
        assert logits.dtype == (torch.float32 if wide else torch.bfloat16)
        assert (float((logits.double() - exact).abs().max()) < 1e-6) == wide
        assert len(engine.generate(make_requests(2, 2))) == 4
