"""What a GPU would refuse, found on a CPU: tensors of two devices in one operator, and those of the wrong kind in a
collective. `tests/device_book.py` keeps the book; every run of this file leaves its list of faults empty, and where a
step waits for the device is listed with the reason."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_rl.algorithms.methods import METHODS
from megatron_rl.algorithms.policy_loss import PolicyLoss
from megatron_rl.config import parse_config
from megatron_rl.metrics.collect import Metrics
from megatron_rl.parallel.reduce import pickled
from megatron_rl.types import LossInputs
from tests.device_book import DEVICE, Book, booked, install, rewritten
from tests.device_reads import OBJECTS, READS
from tests.invariance_case import LAYOUTS
from tests.tiny import HF, tiny_raw, trained
from tests.worlds import Worlds

LIMIT = 560.0
MOE: dict[str, Any] = HF | {
    "model_type": "qwen3_moe",
    "head_dim": 8,
    "tie_word_embeddings": False,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
}
ONE_STEP = {"num_steps": 1}
SAVING = {"save_every": 1, "eval_every": 1, "entropy_tangent": True, "entropy_tangent_every": 1, "save_hf": True}
KL_COV = {"type": "kl_cov", "select_fraction": 0.05, "ref_kl_coef": 0.1}
CLIP_COV = {"type": "clip_cov", "select_fraction": 0.05, "cov_low": 0.01}
TP2_BF16 = {
    "parallel": LAYOUTS["tp2_sp"],
    "model": {"dtype": "bfloat16", "recompute": "full"},
    "loss": KL_COV,
    "logging": {"samples_per_step": 4},
}
Runs = dict[str, dict[str, Any]]

# every loss, every way to lay a model out over two ranks
RUNS: Runs = {
    "tp2": TP2_BF16 | {"train": SAVING | ONE_STEP},
    "tp2 resumed": TP2_BF16 | {"train": SAVING},
    "pp2": {"parallel": LAYOUTS["pp2"], "model": {"fused_linear_stats": "on"}, "loss": CLIP_COV, "train": ONE_STEP},
    "cp2": {
        "parallel": LAYOUTS["cp2"],
        "loss": {
            "type": "gspo",
            "aggregation": "seq_mean_token_mean",
            "rollout_correction": {"weights": "mask", "level": "sequence", "cap": 1.4, "max_kl": 0.05},
        },
        "train": ONE_STEP,
    },
    "ep2": {
        "parallel": LAYOUTS["ep2"],
        "model": {"hf_config": MOE},
        "loss": {"type": "steer"},
        "train": {"share_prompts": False} | ONE_STEP,
    },
    "dp2": {
        "parallel": LAYOUTS["dp2"] | {"distributed_optimizer": False},
        "loss": {"type": "forking", "adaptive_entropy": {"target_entropy": 9, "initial_coef": 0.01}},
        "train": ONE_STEP,
    },
    **{
        loss: {"parallel": LAYOUTS["dp2"], "loss": {"type": loss}, "train": ONE_STEP}
        for loss in ("gaussian_cov", "entropy_advantage", "cispo", "ppo_clip", "erc", "clip_b", "clip_v", "repo_r")
    },
}

# faults that were mended: run, class, method, what it says now, what it said
MENDED = {
    "metrics of two devices": (
        "ppo_clip",
        "megatron_rl.metrics.collect.Metrics",
        "add",
        ".to(self._device, torch.float64)",
        ".double()",
    ),
    "a pipeline's sums as device objects": (
        "pp2",
        "megatron_rl.policy.policy.MegatronPolicy",
        "backward",
        "{name: pair.cpu() for name, pair in sums.items()}",
        "sums",
    ),
}


def keep_books(raws: Runs, faults: dict[str, tuple[str, ...]]) -> dict[str, Book]:
    """On a rank: one run after the other, each with a book of its own, and with a fault where there is one for it."""
    import importlib

    install()
    books = {}
    for name, raw in raws.items():
        books[name] = Book()
        with contextlib.ExitStack() as stack:
            if name in faults:
                _, owner, *change = faults[name]
                module, _, owner = owner.rpartition(".")
                stack.enter_context(rewritten(getattr(importlib.import_module(module), owner), *change))
            stack.enter_context(booked(books[name]))
            stack.enter_context(trained(raw))
    return books


def books_of(
    pool: Worlds, folder: Path, runs: Runs, size: int = 2, faults: dict[str, tuple[str, ...]] | None = None
) -> dict[str, Book]:
    """The book of each run, over all ranks. A run goes on from the one whose name it has before a blank."""
    raws = {}
    for name, sections in runs.items():
        parallel = {"tp": 1} | sections["parallel"]
        if "warm_start" in sections:
            sections = sections | {"warm_start": sections["warm_start"] | {"cache_dir": str(folder / "warm")}}
        raws[name] = tiny_raw(folder, name.split()[0], **sections | {"parallel": parallel})
    books = {name: Book() for name in runs}
    for rank in pool.run(size, keep_books, raws, faults or {}, timeout=LIMIT):
        for name, book in rank.items():
            for each in dataclasses.fields(Book):
                getattr(books[name], each.name).update(getattr(book, each.name))
    return books


@pytest.fixture(scope="module")
def pool() -> Iterator[Worlds]:
    """Processes of their own: a book can be kept only where Megatron was imported for it."""
    worlds = Worlds()
    yield worlds
    worlds.close()


@pytest.fixture(scope="module")
def books(pool: Worlds, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Book]:
    folder = tmp_path_factory.mktemp("devices")
    return books_of(pool, folder, RUNS)


@pytest.mark.timeout(600)
def test_no_operator_gets_tensors_of_two_devices(books: dict[str, Book]) -> None:
    assert {name: dict(book.faults) for name, book in books.items() if book.faults} == {}
    hooked = {
        name for name, loss in METHODS.items() if (loss.mark, loss.follow) != (PolicyLoss.mark, PolicyLoss.follow)
    }
    assert {run["loss"]["type"] for run in RUNS.values()} >= hooked  # for the others a test with fake tensors is enough


def test_a_step_waits_for_the_device_only_where_it_must(books: dict[str, Book]) -> None:
    """A new place is a decision: it goes into the list with its reason, or the wait goes."""
    waits = {where for book in books.values() for where in book.reads}
    objects = {where for book in books.values() for where in book.objects}
    assert (sorted(waits - READS.keys()), sorted(objects - OBJECTS.keys())) == ([], [])


@pytest.mark.timeout(600)
def test_faults_that_were_mended_would_be_found(pool: Worlds, tmp_path: Path) -> None:
    runs = {f"{i}": RUNS[fault[0]] for i, fault in enumerate(MENDED.values())}
    faults = dict(zip(runs, MENDED.values(), strict=True))
    found = books_of(pool, tmp_path, runs, faults=faults)
    assert any("stack of device and host tensors @ metrics/collect.py" in fault for fault in found["0"].faults)
    assert any("numpy() of a device tensor @ parallel/reduce.py" in fault for fault in found["1"].faults)


# --- the book itself --------------------------------------------------------------------------------------------------

FAULTS: dict[str, Callable[[Tensor, Tensor, Any], Any]] = {
    "add of device and host tensors": lambda d, h, _: d + h,
    "add_ of device and host tensors": lambda d, h, _: h[0].add_(d[0]),
    "cat of device and host tensors": lambda d, h, _: torch.cat([d, h]),
    "stack of device and host tensors": lambda d, h, _: torch.stack([d[0], h[0]]),
    "mul of device and host tensors": lambda d, h, _: d[0] * h,
    "index of device and host tensors": lambda d, h, _: h[d.long()],
    "index_put_ of device and host tensors": lambda d, h, _: d.clone().__setitem__([0, 1], h[:2]),
    "index_select of device and host tensors": lambda d, h, _: d.index_select(0, h.long()),
    "numpy() of a device tensor": lambda d, h, _: d.numpy(),
    "pickling of a device tensor": lambda d, h, _: pickle.dumps(d),
    "allreduce_ of a host tensor over NCCL": lambda d, h, _: dist.all_reduce(h),
    "allreduce_ of a device tensor over gloo": lambda d, h, gloo: dist.all_reduce(d, group=gloo),
}


def _right(d: Tensor, h: Tensor, gloo: Any) -> None:
    d + 1 + h[0] + h.to(DEVICE) + h.to(d) + torch.tensor([1.0, 2.0, 3.0], device=d.device) + torch.zeros_like(d)
    h + d.cpu() + d.to("cpu") + d.new_zeros(3, device="cpu") + torch.zeros(3, device="cpu")
    d[[0, 1]], d[h.long()], d[d > 0].sum() + d.new_tensor([1.0, 2.0]), torch.where(d > 0, d, 0.0)
    d[d > 0] = 1.0
    h.copy_(d)
    weight = d.clone().requires_grad_()
    (weight.index_select(0, torch.tensor([0, 0], device=DEVICE)) * weight[1:]).sum().backward()
    weight.grad.add_(d)  # type: ignore[union-attr]
    weight.data = weight.data.cpu()
    weight.detach() + h
    torch.save(d, io.BytesIO())
    dist.all_reduce(d)
    dist.all_reduce(h, group=gloo)
    dist.barrier()


def _small_books() -> tuple[dict[str, list[str]], list[str]]:
    """On a rank: the faults that each of FAULTS leaves, and those of what is right."""
    install()
    gloo = dist.new_group(backend="gloo")
    noted = {}
    for name, act in (FAULTS | {"": _right}).items():
        book = Book()
        with booked(book):
            act(torch.ones(3, device=DEVICE), torch.ones(3), gloo)
        noted[name] = [fault.partition(" @ ")[0] for fault in book.faults]
    right = noted.pop("")
    return noted, right


def test_the_book_notes_each_kind_of_fault_and_nothing_else(pool: Worlds) -> None:
    noted, right = pool.run(1, _small_books)[0]
    assert noted == {name: [name] for name in FAULTS} and right == []


# --- pure functions, with fake tensors on a GPU -----------------------------------------------------------------------


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    """Tensors without values, which refuse to meet on two devices."""
    with FakeTensorMode():
        yield torch.device("cuda", 0)


@pytest.mark.parametrize("loss", sorted(METHODS.keys() - {"gspo", "gmpo", "vespo"}))
def test_losses_stay_on_their_device(gpu: torch.device, loss: str) -> None:
    """Without gradients, and without what sums over sequences: torch for CPUs neither derives nor indexes fake tensors
    of a GPU."""
    options = {"type": loss, "entropy_coef": 0.1, "ref_kl_coef": 0.1}
    config = parse_config(tiny_raw(Path("runs"), loss=options)).loss
    numbers = ("logprobs", "entropy", "old_logprobs", "rollout_logprobs", "ref_logprobs", "advantages", "token_weights")
    fields = {name: torch.rand(6, device=gpu) for name in (*numbers, "surrogate_weights", "old_entropy")}
    masks = {name: torch.ones(6, dtype=torch.bool, device=gpu) for name in ("loss_mask", "selected")}
    ends = torch.tensor([0, 4, 6], dtype=torch.int32, device=gpu)
    outputs = config(LossInputs(cu_seqlens=ends, **fields, **masks))
    assert {each.device.type for each in (outputs.loss_sum, *outputs.metrics.values())} == {"cuda"}
    with pytest.raises(RuntimeError, match=r"cuda.*cpu|cpu.*cuda|same device"):
        config(LossInputs(cu_seqlens=ends, **fields | {"old_logprobs": torch.rand(6)}, **masks))


def test_metrics_reduce_on_one_device_whatever_they_were_given(gpu: torch.device) -> None:
    metrics, seen = Metrics(gpu), []
    metrics.add({"a": torch.ones(2, device=gpu), "b": torch.ones(2)})
    metrics.add({"a": torch.ones(2), "b": torch.ones(2, device=gpu)})
    metrics.add_means({"c": 1.0})

    def reduce(values: Tensor) -> Tensor:
        seen.append((values.device.type, tuple(values.shape)))
        raise InterruptedError  # a fake sum has no values to go on with

    metrics._check_same_names = lambda *_: None  # type: ignore[method-assign]
    with pytest.raises(InterruptedError):
        metrics.reduce(reduce, reduce)
    assert seen == [("cuda", (6,))]


def test_an_object_gather_refuses_a_device_tensor(gpu: torch.device) -> None:
    with pytest.raises(TypeError, match=r"tensor on cuda:0; give it as \.cpu\(\)"):
        pickled({"loss": torch.ones(2, device=gpu)})


# --- all layouts ------------------------------------------------------------------------------------------------------

FULL: dict[int, Runs] = {
    2: {
        "vpp": {"parallel": LAYOUTS["pp2_vpp2"], "model": {"hf_config": HF | {"num_hidden_layers": 4}}, "loss": KL_COV},
        "tp2_vocab": {"parallel": LAYOUTS["tp2"], "loss": KL_COV | {"cov_estimator": "vocab"}},
        "microbatch": {"parallel": LAYOUTS["dp2"], "loss": CLIP_COV | {"cov_scope": "microbatch"}},
        "selective": {
            "parallel": LAYOUTS["tp2"],
            "model": {"recompute": "selective"},
            "train": {"share_prompts": False},
        },
        "bf16_dp2": {"parallel": LAYOUTS["dp2"], "model": {"dtype": "bfloat16", "fused_linear_stats": "on"}},
        "bf16_pp2": {"parallel": LAYOUTS["pp2"], "model": {"dtype": "bfloat16"}, "train": {"save_every": 1}},
        "bf16_pp2 resumed": {"parallel": LAYOUTS["pp2"], "model": {"dtype": "bfloat16"}, "train": {"num_steps": 3}},
        "bf16_cp2": {"parallel": LAYOUTS["cp2"], "model": {"dtype": "bfloat16"}, "loss": CLIP_COV},
        "bf16_ep2": {"parallel": LAYOUTS["tp2_sp_ep2"], "model": {"dtype": "bfloat16", "hf_config": MOE}},
        "routes": {
            "parallel": LAYOUTS["ep2"],
            "model": {"hf_config": MOE},
            "rollout": {"routing_replay": True},
        },
        "host_adam": {
            "parallel": LAYOUTS["dp2"],
            "model": {"dtype": "bfloat16"},
            "optimizer": {"cpu_offload": True},
            "train": {"save_every": 1},
        },
        "host_adam resumed": {
            "parallel": LAYOUTS["dp2"],
            "model": {"dtype": "bfloat16"},
            "optimizer": {"cpu_offload": True},
            "train": {"num_steps": 3},
        },
        "in_background": {"parallel": LAYOUTS["dp2"], "train": {"save_every": 1, "async_save": True, "eval_every": 1}},
        "warm": {
            "parallel": LAYOUTS["tp2"],
            "warm_start": {"steps": 2, "batch_size": 4},
            "algorithm": {"advantage": "rloo", "overlong": {"filter": True}},
        },
        "dynamic": {
            "parallel": LAYOUTS["dp2"],
            "algorithm": {"dynamic_sampling": {"enabled": True}},
            "loss": {"type": "ppo_clip", "rollout_correction": {"weights": "truncate"}, "dual_clip": 3.0},
        },
    },
    4: {
        "tp2_pp2": {"parallel": LAYOUTS["tp2_pp2"], "loss": CLIP_COV, "train": {"save_every": 1, "save_hf": True}},
        "tp2_pp2 resumed": {"parallel": LAYOUTS["tp2_pp2"], "loss": CLIP_COV, "train": {"num_steps": 3}},
        "cp2_tp2_sp": {"parallel": LAYOUTS["cp2_tp2_sp"], "loss": KL_COV},
        "cp2_dp2": {"parallel": LAYOUTS["cp2_dp2"], "loss": {"type": "gaussian_cov"}},
        "tp2_dp2": {"parallel": {"world_size": 4, "tp": 2, "sp": True}, "model": {"dtype": "bfloat16"}, "loss": KL_COV},
        "warm_pp2_dp2": {"parallel": {"world_size": 4, "pp": 2}, "warm_start": {"steps": 2, "batch_size": 4}},
    },
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("size", FULL)
def test_no_layout_mixes_devices(pool: Worlds, tmp_path: Path, size: int) -> None:
    found = books_of(pool, tmp_path, FULL[size], size)
    assert {name: dict(book.faults) for name, book in found.items() if book.faults} == {}
    assert {where for book in found.values() for where in book.reads} <= READS.keys()
