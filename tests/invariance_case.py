"""One frozen step of rollouts through the real `train.run_step`, under any layout, micro-batch count and packing.

Only the sampling is replaced. What the test compares is recorded where the step passes by: the covariances and the
selection after the loss's `mark`, the loss sum and its denominator inside `policy.update`, the gradient norm, the
metrics, and the
exported weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor

from megatron_rl.algorithms.covariance import covariance
from megatron_rl.algorithms.entropy import entropy_spent
from megatron_rl.config import Config, parse_config
from megatron_rl.rollout.answers import facts_of, from_facts
from megatron_rl.types import MiniBatch, Rollout

PROMPTS, SAMPLES, MAX_PROMPT, MAX_RESPONSE, VOCAB = 6, 4, 8, 20, 37  # 37: padded at TP 2
TEMPERATURE = 0.8

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {"world_size": 1},
    "tp2": {"world_size": 2, "tp": 2},
    "pp2": {"world_size": 2, "pp": 2},
    "dp2": {"world_size": 2},
    "tp2_sp": {"world_size": 2, "tp": 2, "sp": True},
    "tp2_pp2": {"world_size": 4, "tp": 2, "pp": 2},
    "cp2": {"world_size": 2, "cp": 2},
    "pp2_vpp2": {"world_size": 2, "pp": 2, "vpp": 2},
    "ep2": {"world_size": 2, "ep": 2},
    "pp2_uneven": {"world_size": 2, "pp": 2},
    "dp2_overlap": {
        "world_size": 2,
        "ddp": {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 3000},
    },
    "tp2_sp_allgather": {"world_size": 2, "tp": 2, "sp": True},
    "cp2_tp2": {"world_size": 4, "cp": 2, "tp": 2},
    "cp2_tp2_sp": {"world_size": 4, "cp": 2, "tp": 2, "sp": True},
    "cp2_dp2": {"world_size": 4, "cp": 2},
    "cp4": {"world_size": 4, "cp": 4},
    "cp2_pp2_vpp2": {"world_size": 4, "cp": 2, "pp": 2, "vpp": 2},
    "tp2_pp2_vpp2": {"world_size": 4, "tp": 2, "pp": 2, "vpp": 2},
    "tp2_sp_ep2": {"world_size": 2, "tp": 2, "sp": True, "ep": 2},
    "cp2_ep2": {"world_size": 2, "cp": 2, "ep": 2},
    "ep2_pp2_vpp2": {"world_size": 4, "ep": 2, "pp": 2, "vpp": 2},
}

# what these layouts pass to Megatron's TransformerConfig
MEGATRON: dict[str, dict[str, Any]] = {
    "pp2_uneven": {"num_layers_in_first_pipeline_stage": 1},
    "tp2_sp_allgather": {"moe_token_dispatcher_type": "allgather"},
}

_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
_COMMON = {**_SIZES, "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 64}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2", **_COMMON, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **_COMMON, "tie_word_embeddings": False, "head_dim": 8},
    "llama": {"model_type": "llama", **_COMMON, "tie_word_embeddings": False},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **_COMMON,
        "tie_word_embeddings": False,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
    },
}

LOSSES: dict[str, dict[str, Any]] = {
    "clip_cov": {"type": "clip_cov", "select_fraction": 0.06, "cov_low": 0.4, "cov_high": 3.0, "eps_high": 0.25},
    "kl_cov": {"type": "kl_cov", "select_fraction": 0.06},
    "kl_cov_vocab": {"type": "kl_cov", "select_fraction": 0.06, "cov_estimator": "vocab"},
    "forking": {
        "type": "forking",
        "keep_fraction": 0.3,
        "adaptive_entropy": {"target_entropy": 9, "initial_coef": 0.01},
    },
    "steer": {"type": "steer", "weight_min": 0.3},
    "gaussian_cov": {"type": "gaussian_cov"},
    "ppo_clip": {
        "type": "ppo_clip",
        "aggregation": "seq_mean_token_mean",
        "entropy_coef": 0.01,
        "ref_kl_coef": 0.1,
        "rollout_correction": {"weights": "mask", "level": "sequence", "cap": 1.4, "floor": 0.7, "max_kl": 0.05},
    },
    "gspo": {"type": "gspo", "aggregation": "seq_mean_token_mean", "eps_low": 0.2, "eps_high": 0.3},
    "geometric": {
        "type": "ppo_clip",
        "rollout_correction": {
            "level": "geometric",
            "weights": "mask",
            "cap": 1.1,
            "floor": 0.9,
            "max_negative_kl": 0.1,
        },
    },
    # with the engine's log-probabilities as the old ones, in a step that does not recompute them
    "kl_cov_rollout": {
        "type": "kl_cov",
        "select_fraction": 0.06,
        "rollout_correction": {"weights": "none", "max_negative_kl": 0.02},
    },
    "ppo_clip_rollout": {"type": "ppo_clip", "ref_kl_coef": 0.1},
    "own": {"type": "examples.my_method:UsualLoss"},
}
# losses of which the quick tests meet a layout or two; in the slow ones they would have the others' splits again
NEWER: dict[str, dict[str, Any]] = {
    "erc": {"type": "erc", "entropy_low": 0.01, "entropy_high": 0.01},
    "clip_b": {"type": "clip_b", "mu": 0.5},
    "clip_v": {"type": "clip_v", "mu": 0.5, "max_fraction": 0.06},
    "repo_r": {"type": "repo_r", "zeta": 0.05},
    "gmpo": {"type": "gmpo", "eps_low": 0.1, "eps_high": 0.1},
    "vespo": {"type": "vespo"},
}
SELECTING = ("clip_cov", "kl_cov")


class Letters:
    """A tokenizer of digits, signs and letters."""

    all_special_tokens = ()

    def decode(self, ids: list[int]) -> str:
        return chr(ord("0") + ids[0] % 60)


@dataclass(frozen=True)
class Case:
    """One way to compute the step. `num_micro_batches` None lets `budget` (tokens) decide; `reordered` deals sequences
    differently."""

    loss: str
    num_micro_batches: int | None = 1
    reordered: bool = False
    budget: int = 512
    model: str = "qwen2"
    scope: str = "minibatch"
    share_prompts: bool | Literal["auto"] = "auto"
    filtered: int = 0  # rollouts at the end of the step that overlong filtering has masked

    @property
    def takes_rollout(self) -> bool:
        return self.loss.endswith("_rollout")


@dataclass
class Update:
    """One mini-batch, over all ranks. Tensors are sorted by global token id."""

    ids: Tensor  # [N] of the response tokens
    cov: Tensor  # [N] float64, what the selection ranks
    advantages: Tensor  # [N] float32
    log_ratio: Tensor  # [N] float32, current against old policy: 0 while the weights have not moved
    selected: Tensor  # [N] bool
    weights: Tensor  # [N] float32, of the policy-gradient term
    loss_sum: float = 0.0
    denominator: float = 0.0
    grad_norm: float = 0.0
    skipped: bool = False


@dataclass
class Outcome:
    """What one step did."""

    updates: list[Update] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    ledger: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


def initial_weights(model: str) -> dict[str, Tensor]:
    """`_own_weights` under the names of checkpoints on disk, which know no stacked experts."""
    from megatron_rl.convert.hf import hub_views

    return hub_views(_own_weights(model))


def _own_weights(model: str) -> dict[str, Tensor]:
    """Every tensor distinct: transformers starts norms at 1 and biases at 0, which would hide an exchange of two of
    them."""
    generator = torch.Generator().manual_seed(7)
    weights = {}
    for name, tensor in _hf_model({**MODELS[model], "initializer_range": 0.2}).state_dict().items():
        weights[name] = tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
    if MODELS[model]["tie_word_embeddings"]:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return weights


def _hf_model(raw: dict[str, Any]) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    from megatron_rl.models.architecture import resolve_hf_config

    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(resolve_hf_config(raw), dtype=torch.float32).eval()


def make_config(case: Case, layout: str) -> Config:
    """The run's config. Adam's eps of 0.1 makes the update nearly proportional to the gradient: with the usual 1e-8 the
    first updates are its sign, which hides a wrong scale and amplifies rounding where a gradient is almost 0."""
    loss = dict((LOSSES | NEWER)[case.loss])
    if loss["type"] in SELECTING:
        loss["cov_scope"] = case.scope
    return parse_config(
        {
            "model": {"hf_config": MODELS[case.model], "megatron": MEGATRON.get(layout, {})},
            "parallel": LAYOUTS[layout],
            "data": {"type": "countdown", "max_prompt_tokens": MAX_PROMPT},
            "rollout": {
                "samples_per_prompt": SAMPLES,
                "max_response_tokens": MAX_RESPONSE,
                "temperature": TEMPERATURE,
                "stop_token_ids": [0],
            },
            "algorithm": {
                "overlong": {"filter": case.filtered > 0},
                "old_logprobs": "rollout" if case.takes_rollout else "recompute",
            },
            "loss": loss,
            "optimizer": {"lr": 0.02, "eps": 0.1, "clip_grad": 2.0},
            "train": {
                "num_steps": 1,
                "prompts_per_step": PROMPTS,
                "prompts_per_minibatch": PROMPTS // 2,
                "micro_batch_tokens": case.budget,
                "share_prompts": case.share_prompts,
                "entropy_tangent": True,
                "entropy_tangent_every": 1,
            },
            "logging": {"samples_per_step": 0},
        }
    )


def frozen_rollouts(model: str) -> list[Rollout]:
    """Half of the responses are likely under the initial weights, half are noise; rewards differ inside every group."""
    reference = _hf_model(MODELS[model])
    reference.load_state_dict(_own_weights(model))
    draw = torch.Generator().manual_seed(11)
    rollouts = []
    for prompt_id in range(PROMPTS):
        prompt = torch.randint(0, VOCAB, (int(torch.randint(3, MAX_PROMPT + 1, (), generator=draw)),), generator=draw)
        for sample in range(SAMPLES):
            length = int(torch.randint(1, MAX_RESPONSE + 1, (), generator=draw))
            tokens, logprobs = _respond(reference, prompt, length, 1.0 if sample % 2 else 3.0, draw)
            rollouts.append(
                Rollout(
                    prompt_id=100 + prompt_id,
                    sample_index=sample,
                    token_ids=tokens,
                    rollout_logprobs=logprobs + 0.1 * torch.randn(logprobs.shape, generator=draw) * (logprobs != 0),
                    sampled=torch.arange(len(tokens)) >= len(prompt),
                    finish_reason="stop",
                    weight_version=0,
                    score=float(sample == prompt_id % SAMPLES),
                    reward=float(sample == prompt_id % SAMPLES) + 0.25 * float(sample % 2),
                )
            )
    return rollouts


def _respond(
    reference: torch.nn.Module, prompt: Tensor, length: int, temperature: float, draw: torch.Generator
) -> tuple[Tensor, Tensor]:
    tokens, logprobs = prompt, [0.0] * len(prompt)
    with torch.no_grad():
        for _ in range(length):
            logits = reference(tokens[None]).logits[0, -1]
            token = torch.multinomial(torch.softmax(logits / temperature, 0), 1, generator=draw)
            logprobs.append(float(torch.log_softmax(logits / TEMPERATURE, 0)[token]))
            tokens = torch.cat([tokens, token])
    return tokens, torch.tensor(logprobs)


def run_cases(layout: str, cases: list[Case], rollouts: dict[str, list[Rollout]]) -> list[Outcome]:
    """On every rank of a world of the layout's size. `rollouts`: by model."""
    from megatron_rl.parallel.groups import init_groups

    torch.set_num_threads(1)
    groups = init_groups(make_config(cases[0], layout).parallel, seed=1)
    return [_run_case(make_config(case, layout), case, groups, rollouts[case.model]) for case in cases]


def _run_case(config: Config, case: Case, groups: Any, rollouts: list[Rollout]) -> Outcome:
    from megatron_rl import train
    from megatron_rl.algorithms.control import LossController
    from megatron_rl.metrics import Timers
    from megatron_rl.packing import Layout
    from megatron_rl.policy.policy import MegatronPolicy
    from megatron_rl.run import Run
    from megatron_rl.types import CollectResult

    fuse = config.model.fused_linear_stats == "on"
    policy = MegatronPolicy(MODELS[case.model], config, groups, total_updates=2, fuse_output_layer=fuse)
    policy.load(initial_weights(case.model).__getitem__)
    policy.reset_optimizer()
    if config.loss.ref_kl_coef > 0:
        policy.keep_reference()
    kept = len(rollouts) - case.filtered
    rollouts = rollouts[:kept] + [r.replace(counts=False, finish_reason="length") for r in rollouts[kept:]]
    collected = CollectResult(held_by(rollouts, groups.rank, groups.world_size), {}, {})
    layout = Layout.of(config, groups)
    if case.num_micro_batches is not None:  # the budget is large: one multiple of them is as many as there are
        layout = dataclasses.replace(layout, count_multiple=case.num_micro_batches)
    run = Run(
        config=config,
        groups=groups,
        world=groups.all_ranks,
        ranks=groups.token_ranks,
        layout=layout,
        tokenizer=Letters(),
        policy=policy,
        served=SimpleNamespace(session=lambda _: contextlib.nullcontext()),  # type: ignore[arg-type]
        collector=SimpleNamespace(collect=lambda _: collected, go_ahead=lambda _: None),  # type: ignore[arg-type]
        controller=LossController(config.loss, groups.token_ranks),
        timers=Timers(),
        train_prompts=[],
        eval_prompts=[],
        evaluator=None,  # type: ignore[arg-type]
        benchmarks=[],
        beside=None,  # type: ignore[arg-type]
    )
    outcome = Outcome()
    logger: Any = SimpleNamespace(
        log_samples=lambda *_: None, log_ledger=lambda _, entry, __: outcome.ledger.update(entry)
    )
    with _observed(run, case, outcome):
        outcome.metrics = train.run_step(run, int(case.takes_rollout), logger)
    outcome.weights = {name: tensor.clone() for name, tensor in policy.hf_weights()}
    return outcome


def held_by(rollouts: list[Rollout], rank: int, world_size: int) -> list[Rollout]:
    """The step's rollouts as a rank knows them that sampled every `world_size`-th."""
    measured = [rollout.replace(known_lengths=rollout.lengths) for rollout in rollouts]
    others = from_facts(facts_of(measured))
    return [measured[i] if i % world_size == rank else others[i] for i in range(len(rollouts))]


@contextlib.contextmanager
def _observed(run: Any, case: Case, outcome: Outcome) -> Iterator[None]:
    """Put other neighbours into the step's micro-batches where the case asks for it, and record what passes by."""
    from megatron_rl.algorithms import balance

    kind, real_update = type(run.config.loss), run.policy.update
    real_mark = kind.mark

    def mark(loss: Any, mini_batch: MiniBatch, reducer: Any, **options: int) -> Any:
        chosen = real_mark(loss, mini_batch, reducer, **options)
        has_stats = mini_batch.micro_batches[0].stats is not None
        assert has_stats or case.loss == "ppo_clip_rollout"
        logprobs = mini_batch.cat_stats("logprobs") if has_stats else mini_batch.cat("rollout_logprobs")
        cov, _ = covariance(logprobs, chosen.cat("advantages"), reducer)
        if getattr(loss, "cov_estimator", "batch") == "vocab":
            spent = [entropy_spent(m.stats, m.advantages)[m.loss_mask] for m in mini_batch.micro_batches]
            cov = torch.cat(spent)
        ids, log_ratio = chosen.cat("token_ids_global"), logprobs - chosen.cat("old_logprobs")
        marked, weights = torch.zeros_like(ids, dtype=torch.bool), torch.ones(len(ids))
        if chosen.micro_batches[0].selected is not None:  # padding and prompts are never selected
            marked = chosen.cat("selected")
            assert not any((m.selected & ~m.loss_mask).any() for m in chosen.micro_batches)
        if chosen.micro_batches[0].surrogate_weights is not None:
            weights = chosen.cat("surrogate_weights")
        of_all_ranks = reducer.gather_objects((ids, cov, chosen.cat("advantages"), log_ratio, marked, weights))
        gathered = [torch.cat(parts) for parts in zip(*of_all_ranks, strict=True)]
        order = gathered[0].argsort()
        outcome.updates.append(Update(*(values[order] for values in gathered)))
        return chosen

    def update(mini_batch: MiniBatch, loss: Any, spans: Any) -> Any:
        total = torch.zeros((), dtype=torch.float64)

        def counted(inputs: Any) -> Any:
            outputs = loss(inputs)
            total.add_(outputs.loss_sum.detach().double())
            return outputs

        result = real_update(mini_batch, counted, spans)
        denominator = torch.tensor(float(sum(m.loss_denominator for m in mini_batch.micro_batches)))
        sums = run.ranks.sum(torch.stack([total, denominator.double()]))
        record = outcome.updates[-1]
        # only the last pipeline stage computes the loss
        record.loss_sum, record.denominator = run.groups.stage_ranks.gather_objects(sums.tolist())[-1]
        record.grad_norm, record.skipped = result.grad_norm, result.skipped
        return result

    deal = _dealt_at_random if case.reordered else balance._longest_first
    with (
        mock.patch.object(kind, "mark", mark),
        mock.patch.object(balance, "_longest_first", deal),
        mock.patch.object(run.policy, "update", update),
    ):
        yield


def _dealt_at_random(lengths: list[int], count: int) -> list[list[int]]:
    """Other neighbours in each bin, in another order, than `balance._longest_first` gives."""
    order = list(range(len(lengths)))
    random.Random(5).shuffle(order)
    return [order[which::count] for which in range(count)]
